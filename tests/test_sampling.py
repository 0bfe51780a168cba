"""rope.sample: the law of its draws, and the way of gradients back to the weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from ropes import CONFIG, make_rope, seeded, solved
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clex_kernels import reference
from clex_kernels.config import ClexConfig
from clex_kernels.modules import ClexRotaryEmbedding
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack


def law(length: int, t: float, positions: Tensor) -> None:
    """First, last, sorted, distinct, whole numbers before the division."""
    divisor = max(1, length // CONFIG.train_length)
    whole = positions * divisor
    assert positions.shape == (length,)
    assert positions.dtype == torch.float64
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-9)
    assert whole[0] == 0
    assert round(whole[-1].item()) == math.floor(length * t) - 1
    assert (whole.round().diff() >= 1).all()


@pytest.mark.parametrize("positions", ["uniform", "runs"])
@pytest.mark.parametrize("factors", ["integer", "continuous"])
@pytest.mark.parametrize("length", [1, 2, 3, 33, 70])
def test_sampled_positions_keep_the_law(length, factors, positions):
    rope = make_rope()
    generator = seeded(length)
    for _ in range(8):
        table = rope.sample(length, generator=generator, positions=positions, factors=factors)
        assert isinstance(table, RotaryTable)
        assert 1 <= table.t <= 8
        assert factors == "continuous" or table.t == round(table.t)
        if length > 1:
            law(length, table.t, table.positions)
        else:
            assert table.positions.tolist() == [0.0]
        assert table.tile == 1
        assert table.length == length


def test_sampled_tables_hold_their_positions_frequencies():
    rope = make_rope().double()
    table = rope.sample(40, generator=seeded(3))
    torch.testing.assert_close(table.freq, solved(rope, table.t)[0], rtol=1e-12, atol=0)
    angle = table.positions[:, None] * table.freq
    torch.testing.assert_close(table.coarse[:, 0], angle.cos(), rtol=0, atol=1e-12)
    torch.testing.assert_close(table.coarse[:, 1], angle.sin(), rtol=0, atol=1e-12)
    assert not table.coarse.requires_grad


def test_uniform_positions_are_uniform():
    rope = make_rope(ClexConfig(head_dim=4, train_length=6, max_factor=2))
    generator, counts, draws = seeded(0), torch.zeros(12), 0
    while draws < 600:
        table = rope.sample(6, generator=generator)
        if table.t == 2:
            draws += 1
            counts[table.positions.long()] += 1
    # 4 of the 10 inner positions are drawn: share 0.4, standard deviation 0.02; five of them.
    assert counts[0] == counts[11] == draws
    assert (counts[1:11] / draws - 0.4).abs().max() < 0.1


@pytest.mark.parametrize(
    ("factors", "plain_share", "shares"),
    [
        ("integer", 0.0, [0.25, 0.25, 0.25, 0.25]),
        ("integer", 0.4, [0.55, 0.15, 0.15, 0.15]),
        ("integer", 1.0, [1.0, 0.0, 0.0, 0.0]),
        ("continuous", 0.0, [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ("continuous", 0.4, [0.6, 0.2, 0.2, 0.0]),
    ],
)
def test_length_factors_have_the_asked_distribution(factors, plain_share, shares):
    rope = make_rope(ClexConfig(head_dim=4, train_length=16, max_factor=4))
    t = rope.sample(2, batch=4000, generator=seeded(5), factors=factors, plain_share=plain_share).t
    seen = torch.stack([(t.floor() == n).double().mean() for n in range(1, 5)])
    # standard deviation 0.008 at most; five of them.
    torch.testing.assert_close(seen, torch.tensor(shares, dtype=torch.float64), rtol=0, atol=0.04)
    plain = (t == 1).double().mean().item()
    assert plain == pytest.approx(shares[0] if factors == "integer" else plain_share, abs=0.04)


def test_runs_are_2_to_8_and_contiguous():
    rope = make_rope()
    stack = rope.sample(30, batch=400, generator=seeded(6), positions="runs")
    steps = stack.positions[stack.t > 1].diff(dim=1)
    gaps = (steps > 1).sum(dim=1)
    # two gaps may close up, so fewer runs can show than were drawn, but one gap there must be.
    assert gaps.min() == 1
    assert gaps.max() == 7
    # where the gaps are is random: every step is one somewhere.
    assert (steps > 1).any(dim=0).all()
    assert (stack.positions[stack.t == 1].diff(dim=1) == 1).all()


@pytest.mark.parametrize("positions", ["uniform", "runs"])
def test_a_batch_draws_for_every_sequence(positions):
    rope = make_rope()
    stack = rope.sample(40, batch=12, generator=seeded(7), positions=positions)
    assert isinstance(stack, RotaryTableStack)
    assert stack.freq.shape == (12, 8)
    assert stack.positions.shape == (12, 40)
    assert stack.coarse.shape == (12, 40, 2, 8)
    assert stack.index.tolist() == list(range(12))
    times = stack.t.tolist()
    assert 1 < len(set(times)) < 12
    for b, t in enumerate(times):
        law(40, t, stack.positions[b])
        torch.testing.assert_close(stack.freq[b], solved(rope, t)[0], rtol=1e-12, atol=0)
    same = [b for b, t in enumerate(times) if t == max(times, key=times.count) and t > 1]
    assert all(not torch.equal(stack.positions[same[0]], stack.positions[b]) for b in same[1:])


def test_the_same_seed_draws_the_same():
    rope = make_rope()
    one, two, other = (rope.sample(50, batch=3, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.positions, two.positions)
    assert torch.equal(one.t, two.t)
    assert not torch.equal(one.positions, other.positions)
    torch.manual_seed(9)
    by_default = rope.sample(50)
    torch.manual_seed(9)
    assert torch.equal(rope.sample(50).positions, by_default.positions)
    assert not torch.equal(rope.sample(50).positions[:40], by_default.positions[:40])


@pytest.mark.parametrize("positions", ["uniform", "runs"])
def test_the_default_device_is_not_looked_at(positions):
    rope = make_rope()
    plain = rope.sample(50, batch=3, generator=seeded(1), positions=positions)
    # on a GPU the draws of t would wait for it, and a generator on the CPU would be refused.
    with torch.device("meta"):
        drawn = rope.sample(50, batch=3, generator=seeded(1), positions=positions)
        tables = rope(200), rope.stack(), rope.at(torch.tensor([40, 50], device="cpu"))
    assert torch.equal(drawn.coarse, plain.coarse)
    assert all(table.device.type == "cpu" for table in tables)


def test_options_do_not_disturb_the_generator():
    states = []
    for options in ({}, {"positions": "runs"}, {"factors": "continuous"}, {"plain_share": 0.5}):
        generator = seeded(4)
        make_rope().sample(20, batch=2, generator=generator, **options)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("batch", [None, 5])
def test_gradients_reach_both_weights(batch):
    rope = make_rope().train()
    table = rope.sample(40, batch=batch, generator=seeded(8), factors="continuous")
    table.freq.square().sum().backward()
    for name, weight in rope.named_parameters():
        assert weight.grad.abs().max() > 0, name
    # the same through the reference, an rk4 whose error is 1e-8 here.
    up, down = (weight.detach().double().requires_grad_() for weight in rope.parameters())
    times = table.t if batch else torch.tensor([table.t], dtype=torch.float64)
    reference.frequencies(up, down, times, CONFIG).square().sum().backward()
    for weight, expected in zip(rope.parameters(), (up.grad, down.grad), strict=True):
        torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("way", ["table inside", "freq passed", "freq passed, reentrant"])
def test_checkpointed_layers_share_a_table(way):
    gradients = []
    for checkpointed in (False, True):
        rope, x = make_rope().train(), torch.randn(1, 24, 4, 16, generator=seeded(3)).requires_grad_()
        table = rope.sample(24, generator=seeded(2))

        def layer(x, freq, table=table):
            table = table if way == "table inside" else replace(table, freq=freq)
            return apply_rotary(1.5 * x, None, table)[0].tanh()

        hidden = x
        for _ in range(3):
            arguments = hidden, None if way == "table inside" else table.freq
            reentrant = way.endswith("reentrant")
            hidden = checkpoint(layer, *arguments, use_reentrant=reentrant) if checkpointed else layer(*arguments)
        hidden.square().sum().backward()
        gradients.append([x.grad, *(weight.grad for weight in rope.parameters())])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_at_t_1_gradients_are_zero_and_not_missing():
    rope = make_rope().train()
    table = rope.sample(40, generator=seeded(8), plain_share=1.0)
    assert table.t == 1.0
    table.freq.sum().backward()
    for weight in rope.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_both_weights_learn_after_one_step_from_the_initialisation():
    rope = ClexRotaryEmbedding(CONFIG).train()
    optimizer = torch.optim.SGD(rope.parameters(), lr=1e-3)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        rope.sample(40, batch=8, generator=seeded(8)).freq.log().sum().backward()
        reached.append([bool(weight.grad.any()) for weight in rope.parameters()])
        optimizer.step()
    # up acts through down, which starts at zero.
    assert reached == [[False, True], [True, True]]


def test_in_training_mode_plain_tables_carry_gradients_and_no_other_mode_does():
    rope = make_rope()
    assert not rope(100).freq.requires_grad
    rope.train()
    for table in (rope(100), rope.stack(), rope(100)):
        assert table.freq.requires_grad
        assert not table.coarse.requires_grad
        rope.zero_grad()
        table.freq.sum().backward()
        assert all(weight.grad.any() for weight in rope.parameters())
    with torch.no_grad():
        assert not rope(100).freq.requires_grad
    rope.requires_grad_(False)
    assert not rope(100).freq.requires_grad


@pytest.mark.filterwarnings("ignore:.*past train_length")
def test_numpy_integers_are_lengths():
    rope = make_rope()
    assert rope(np.int64(300)).length == rope.stack(np.int32(300)).length == 512
    assert rope.sample(np.int64(8), batch=np.int64(2)).positions.shape == (2, 8)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda rope: rope.sample(0), ValueError, "length: expected at least 1, got 0"),
        (lambda rope: rope.sample(True), TypeError, "length: expected an integer, got True"),
        (lambda rope: rope.sample(8, batch=0), ValueError, "batch: expected at least 1, got 0"),
        (lambda rope: rope.sample(8, generator=3), TypeError, "generator: expected a torch.Generator or None, got int"),
        (lambda rope: rope.sample(8, positions="random"), ValueError, "positions: expected 'uniform' or 'runs'"),
        (lambda rope: rope.sample(8, factors="real"), ValueError, "factors: expected 'integer' or 'continuous'"),
        (lambda rope: rope.sample(8, plain_share=1.5), ValueError, "plain_share: expected .*, got 1.5"),
        (lambda rope: rope.sample(8, plain_share=None), TypeError, "plain_share: expected a number, got None"),
        (lambda rope: rope.sample(2**62), ValueError, "length: expected at most 9007199254740992, got 4611"),
        (lambda rope: rope(2**80), ValueError, "length: expected at most 9007199254740992, got 1208"),
        (lambda rope: rope.sample(8, plain_share=math.nan), ValueError, "plain_share: expected .*, got nan"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(make_rope())
