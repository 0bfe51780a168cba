"""Draws of t and positions: functions of seed, step and stream."""

import pytest
import torch
from ropes import CONFIG, make_rope

from clex_kernels.distributed import StepGenerator


def draw(draws: StepGenerator, count: int = 4) -> list[int]:
    return torch.randint(1 << 40, (count,), generator=draws.generator).tolist()


def test_draws_depend_on_seed_step_and_stream_alone():
    draws = StepGenerator(7, stream=1)
    generator = draws.generator
    first = draw(draws)
    draws.advance()
    second = draw(draws)
    assert draws.generator is generator
    assert draw(StepGenerator(7, stream=1, step=1)) == second
    draws.at(0)
    assert draw(draws) == first
    others = [StepGenerator(*numbers) for numbers in ((7, 1, 1), (7, 2, 0), (7, 0, 1), (8, 1, 0), (1, 7, 0), (0, 1, 7))]
    found = [tuple(draw(other)) for other in others] + [tuple(first)]
    assert len(set(found)) == len(found)


def test_draws_within_a_step_go_on():
    draws = StepGenerator(7)
    both = draw(draws, 8)
    draws.at(0)
    assert draw(draws) + draw(draws) == both
    assert both[:4] != both[4:]


def test_neighbouring_steps_and_streams_draw_as_independent_ones():
    rope = make_rope()
    times = torch.tensor(
        [[rope.sample(2, generator=StepGenerator(0, n, m).generator).t for n in range(20)] for m in range(100)]
    )
    shares = torch.stack([(times == t).double().mean() for t in range(1, CONFIG.max_factor + 1)])
    # five standard deviations of a share among 2000 independent draws.
    assert (shares - 1 / CONFIG.max_factor).abs().max() < 5 * (0.125 * 0.875 / 2000) ** 0.5
    for together in (times[1:] == times[:-1], times[:, 1:] == times[:, :-1]):
        assert abs(float(together.double().mean()) - 1 / CONFIG.max_factor) < 0.04


def test_state_goes_on_in_another_stream():
    draws = StepGenerator(7, stream=3, step=5)
    other = StepGenerator(0, stream=1)
    other.load_state_dict(draws.state_dict())
    assert (other.seed, other.step, other.stream) == (7, 5, 1)
    other.advance()
    assert draw(other) == draw(StepGenerator(7, stream=1, step=6))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 0.5}, TypeError, "seed: expected an integer, got 0.5"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": 0, "stream": 1 << 63}, ValueError, "stream: expected at most 9223372036854775807"),
        ({"seed": 0, "step": None}, TypeError, "step: expected an integer, got None"),
    ],
)
def test_bad_numbers_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        StepGenerator(**arguments)


def test_bad_states_are_named_and_change_nothing():
    draws = StepGenerator(7, step=2)
    with pytest.raises(ValueError, match="state_dict: expected seed and step, got none of step"):
        draws.load_state_dict({"seed": 1})
    with pytest.raises(ValueError, match=r"state_dict\['step'\]: expected at least 0, got -1"):
        draws.load_state_dict({"seed": 1, "step": -1})
    assert draws.state_dict() == {"seed": 7, "step": 2}
