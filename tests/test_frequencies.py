import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from clex_kernels import _C, ClexConfig
from clex_kernels.frequencies import MAX_STEPS, evaluate, evaluations, solve_frequencies, trajectory

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FREQUENCIES = ["frequencies_tanh_d128", "frequencies_silu_d64", "frequencies_mixtral_base"]
GOLDEN_TRAINING = ["training_tanh_d64", "training_silu_d128"]


def settings(pairs, hidden, activation="tanh", rope_base=1e4, ntk_base=1e4, max_factor=16):
    assert hidden % (2 * pairs) == 0
    return ClexConfig(
        head_dim=2 * pairs,
        train_length=64,
        hidden_factor=hidden // (2 * pairs),
        activation=activation,
        rope_base=rope_base,
        ntk_base=ntk_base,
        max_factor=max_factor,
    )


def golden(name, down_times=1.0):
    data = np.load(GOLDEN / f"{name}.npz")
    spec = json.loads(str(data["spec"]))
    up, down = torch.from_numpy(data["ode_up_proj"]), torch.from_numpy(data["ode_down_proj"] * np.float32(down_times))
    config = settings(*up.shape, spec["act"], spec["rope_base"], spec["ntk_base"], spec["max_factor"])
    return data, spec, up, down, config


def random_weights(pairs, hidden, seed=0, dtype=torch.float32):
    # the spread of the golden weights.
    generator = torch.Generator().manual_seed(seed)
    up = (2 * torch.rand(pairs, hidden, generator=generator, dtype=dtype) - 1) / math.sqrt(hidden)
    down = 0.046 / math.sqrt(hidden) * torch.randn(hidden, pairs, generator=generator, dtype=dtype)
    return up, down


def factors(last):
    """Integers, and a fine grid with its ends between them."""
    return torch.tensor(np.unique(np.r_[np.arange(1.0, last + 1), np.linspace(1, last, 97), 1 + 1e-9]))


def reference(up, down, times, config):
    """SciPy's solution at 1e-13 of the equation in z and t, as the authors wrote it."""
    up, down = up.double().numpy(), down.double().numpy()
    i, pairs = np.arange(config.pairs), config.pairs
    base = -(i / pairs) * math.log(config.ntk_base)

    def slope(t, z):
        x = (z + base - i / (pairs - 1) * math.log(2 * t - 1)) @ up
        hidden = np.tanh(x) if config.activation == "tanh" else x / (1 + np.exp(-x))
        return hidden @ down - 2 * i / (pairs - 1) / (2 * t - 1)

    start = -(i / pairs) * math.log(config.rope_base)
    last = times[-1].item() + 1e-6
    solution = solve_ivp(slope, (1, last), start, "DOP853", times.numpy(), rtol=1e-13, atol=1e-13, max_step=0.25)
    return torch.from_numpy(np.exp(solution.y.T))


def relative_error(freq, truth):
    return (freq / truth - 1).abs().max().item()


@pytest.mark.parametrize("name", GOLDEN_FREQUENCIES + GOLDEN_TRAINING)
def test_golden_weights_are_solved_to_1e_10(name):
    _, _, up, down, config = golden(name)
    times = factors(config.max_factor)
    assert relative_error(solve_frequencies(up, down, times, config), reference(up, down, times, config)) < 1e-10


@pytest.mark.parametrize("name", GOLDEN_FREQUENCIES + GOLDEN_TRAINING)
def test_golden_weights_five_times_as_large_are_solved_to_1e_8(name):
    _, _, up, down, config = golden(name, down_times=5)
    times = factors(config.max_factor)
    assert relative_error(solve_frequencies(up, down, times, config), reference(up, down, times, config)) < 1e-8


@pytest.mark.parametrize(
    ("pairs", "hidden", "activation", "rope_base", "last"),
    [
        pytest.param(64, 128, "tanh", 1e4, 64, id="R64-M128-tanh-t64"),
        pytest.param(48, 288, "silu", 5e5, 64, id="R48-M288-silu-t64"),
        pytest.param(16, 128, "tanh", 1e6, 64, id="R16-M128-tanh-t64"),
        pytest.param(5, 20, "silu", 1e4, 37.5, id="R5-M20-silu-t37.5"),
        pytest.param(2, 4, "tanh", 1e4, 64, id="R2-M4-tanh-t64"),
    ],
)
def test_any_size_activation_and_base_is_solved_to_1e_10(pairs, hidden, activation, rope_base, last):
    config = settings(pairs, hidden, activation, rope_base)
    up, down = random_weights(pairs, hidden)
    times = factors(last)
    assert relative_error(solve_frequencies(up, down, times, config), reference(up, down, times, config)) < 1e-10


@pytest.mark.parametrize("name", GOLDEN_FREQUENCIES)
def test_frequencies_match_the_authors_to_their_rounding(name):
    data, _, up, down, config = golden(name)
    times = torch.arange(1, config.max_factor + 1, dtype=torch.float64)
    authors = torch.from_numpy(data["frequencies"]).double()
    assert relative_error(solve_frequencies(up, down, times, config), authors) < 1e-4


def test_sixteen_factors_take_at_most_200_evaluations():
    _, _, up, down, config = golden("frequencies_tanh_d128")
    counted = evaluations(up, down, torch.arange(1, 17, dtype=torch.float64), config)
    # at least the stages of one step with dense output.
    assert 16 <= counted <= 200


def test_t_1_is_plain_rope():
    _, _, up, down, config = golden("frequencies_tanh_d128")
    freq = solve_frequencies(up, down, torch.ones(1, dtype=torch.float64), config)
    plain = 1e4 ** (-torch.arange(64, dtype=torch.float64) / 64)
    # ln freq is rounded at a magnitude of up to 9.
    torch.testing.assert_close(freq[0], plain, rtol=4e-15, atol=0)


def test_zero_down_is_ntk_aware_scaling():
    config = settings(64, 128)
    up, down = random_weights(64, 128)
    times = factors(64)
    freq = solve_frequencies(up, torch.zeros_like(down), times, config)
    i = torch.arange(64, dtype=torch.float64)
    base = 1e4 * (2 * times - 1)[:, None] ** (64 / 63)
    torch.testing.assert_close(freq, base ** (-i / 64), rtol=1e-13, atol=0)


def test_a_time_does_not_depend_on_the_other_times():
    _, _, up, down, config = golden("frequencies_tanh_d128")
    times = factors(64)
    together = solve_frequencies(up, down, times, config)
    alone = torch.cat([solve_frequencies(up, down, time[None], config) for time in times])
    assert torch.equal(together, alone)


def test_repeated_and_no_times_are_served():
    up, down = random_weights(4, 8)
    config = settings(4, 8)
    times = torch.tensor([1, 1, 2.5, 2.5], dtype=torch.float64)
    freq = solve_frequencies(up, down, times, config)
    assert torch.equal(freq[::2], freq[1::2])
    assert solve_frequencies(up, down, times[:0], config).shape == (0, 4)


def test_strided_weights_give_what_contiguous_ones_give():
    up, down = random_weights(6, 12)
    config = settings(6, 12)
    times = torch.tensor([3.0], dtype=torch.float64)
    strided = solve_frequencies(up.T.contiguous().T, down.T.contiguous().T, times, config)
    assert torch.equal(strided, solve_frequencies(up, down, times, config))


@pytest.mark.parametrize("level", [0, 1], ids=["baseline", "avx2"])
def test_narrower_instruction_sets_agree(level):
    names = ["baseline", "avx2", "avx512", "avx512_bf16"]
    widest = names.index(_C.isa())
    if level > widest:
        pytest.skip(f"this processor has {_C.isa()}")
    _, _, up, down, config = golden("frequencies_silu_d64")
    up.requires_grad_()
    down.requires_grad_()
    times = factors(8)

    def solve():
        freq = solve_frequencies(up, down, times, config)
        return freq.detach(), *torch.autograd.grad(freq.sum(), (up, down))

    wide = solve()
    _C.set_isa(level)
    try:
        narrow = solve()
    finally:
        _C.set_isa(widest)
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-13, atol=0)
    # fp32 gradients: one rounding apart.
    torch.testing.assert_close(narrow[1:], wide[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradcheck_with_the_steps_frozen(activation):
    up, down = random_weights(3, 6, dtype=torch.float64)
    up, down = up.requires_grad_(), (4 * down).requires_grad_()
    # t = 1, two times inside one step, and steps with none.
    times = torch.tensor([1, 1.2, 1.3, 9.5], dtype=torch.float64)
    fixed = math.log(1e3), math.log(1e4), activation
    _, nodes, _, _ = torch.ops.clex.solve_frequencies(up, down, times, *fixed)
    assert nodes.isfinite().sum() > 3

    def solve(up, down):
        return torch.ops.clex.solve_frequencies(up, down, times, *fixed, nodes)[0]

    torch.testing.assert_close(solve(up, down), torch.ops.clex.solve_frequencies(up, down, times, *fixed)[0])
    assert torch.autograd.gradcheck(solve, (up, down), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", GOLDEN_TRAINING)
def test_training_gradients_match_the_authors(name):
    data, spec, up, down, config = golden(name)
    up.requires_grad_()
    down.requires_grad_()
    freq = solve_frequencies(up, down, torch.tensor([spec["t"]], dtype=torch.float64), config)[0]
    angles = torch.from_numpy(data["positions"]).double()[:, None] * torch.cat((freq, freq))
    loss = (angles.cos() * torch.from_numpy(data["loss_weight_cos"])).sum()
    loss = loss + (angles.sin() * torch.from_numpy(data["loss_weight_sin"])).sum()
    loss.backward()
    assert abs(loss.item() - data["loss"].item()) < 2e-3 * abs(data["loss"].item())
    for weight, wanted in ((up, "grad_ode_up_proj"), (down, "grad_ode_down_proj")):
        wanted = torch.from_numpy(data[wanted])
        assert (weight.grad - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_gradients_at_t_1_are_zero_and_present():
    up, down = (weight.requires_grad_() for weight in random_weights(4, 8))
    solve_frequencies(up, down, torch.ones(2, dtype=torch.float64), settings(4, 8)).sum().backward()
    assert torch.equal(up.grad, torch.zeros_like(up))
    assert torch.equal(down.grad, torch.zeros_like(down))


def test_second_derivative_is_refused():
    up, down = (weight.requires_grad_() for weight in random_weights(4, 8))
    freq = solve_frequencies(up, down, torch.full((1,), 2.0, dtype=torch.float64), settings(4, 8))
    (gradient,) = torch.autograd.grad(freq.sum(), up, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_opcheck(dtype):
    up, down = (weight.requires_grad_() for weight in random_weights(4, 10, dtype=dtype))
    times = torch.tensor([1, 2.5], dtype=torch.float64)
    arguments = up, down, times, math.log(1e4), math.log(1e4), "tanh"
    torch.library.opcheck(torch.ops.clex.solve_frequencies.default, arguments)
    freq, nodes, states, _ = (output.detach() for output in torch.ops.clex.solve_frequencies(*arguments))
    torch.library.opcheck(torch.ops.clex.solve_frequencies.default, (*arguments, nodes))
    backward = torch.ones_like(freq), freq, up.detach(), down.detach(), times, nodes, states, math.log(1e4), "tanh"
    torch.library.opcheck(torch.ops.clex.solve_frequencies_bwd.default, backward)
    following = up.detach(), down.detach(), 4.0, math.log(1e4), math.log(1e4), "silu"
    torch.library.opcheck(torch.ops.clex.trajectory.default, following)


def test_compiles_without_graph_breaks():
    up, down = (weight.requires_grad_() for weight in random_weights(4, 8))
    config = settings(4, 8)

    def loss(times):
        return (solve_frequencies(up, down, times, config) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    times = torch.tensor([1.5, 4], dtype=torch.float64)
    wanted = torch.autograd.grad(loss(times), (up, down))
    torch.testing.assert_close(torch.autograd.grad(compiled(times), (up, down)), wanted)


def test_a_trajectory_is_read_at_any_times_in_any_order():
    _, _, up, down, config = golden("frequencies_tanh_d128")
    times = factors(16)
    shuffled = torch.randperm(len(times), generator=torch.Generator().manual_seed(0))
    nodes, polynomials = trajectory(up, down, config)
    assert nodes.shape == (MAX_STEPS + 1,)
    assert polynomials.shape == (MAX_STEPS, 8, 64)
    freq = evaluate(nodes, polynomials, times[shuffled])
    torch.testing.assert_close(freq, solve_frequencies(up, down, times, config)[shuffled], rtol=1e-14, atol=0)
    together = evaluate(nodes, polynomials, times)
    assert torch.equal(together[17], evaluate(nodes, polynomials, times[17:18])[0])


def test_a_trajectory_serves_its_range_and_is_nan_outside():
    up, down = random_weights(4, 8)
    alone = evaluate(*trajectory(up, down, settings(4, 8, max_factor=1)), torch.ones(1, dtype=torch.float64))
    assert alone.isfinite().all()
    nodes, polynomials = trajectory(up, down, settings(4, 8, max_factor=2))
    freq = evaluate(nodes, polynomials, torch.tensor([0.9, 1, 2, 1e6, math.nan], dtype=torch.float64))
    assert freq.isnan().all(1).tolist() == [True, False, False, True, True]
    with pytest.raises(TypeError, match=r"times: expected torch.float64, got torch.int64"):
        evaluate(nodes, polynomials, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"times: expected shape \[T\], got \[\]"):
        evaluate(nodes, polynomials, torch.tensor(1.5, dtype=torch.float64))


def with_nan(weight):
    weight = weight.clone()
    weight[1, 1] = math.nan
    return weight


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": lambda up: up[:, :-1]}, ValueError, r"up: expected shape \[R, M\] = \[4, 8\], got \[4, 7\]"),
        ({"down": lambda down: down.T}, ValueError, r"down: expected shape \[M, R\] = \[8, 4\], got \[4, 8\]"),
        ({"up": lambda up: up.half()}, TypeError, "up: expected torch.float32 or torch.float64, got torch.float16"),
        ({"down": lambda down: down.double()}, TypeError, "down: expected the dtype of up"),
        ({"down": lambda down: down.to("meta")}, ValueError, "down: expected the device of up, cpu, got meta"),
        ({"up": lambda up: up.numpy()}, TypeError, "up: expected a Tensor, got ndarray"),
        ({"up": with_nan}, ValueError, "up: expected finite values, got nan"),
        ({"down": lambda down: down / 0}, ValueError, "down: expected finite values"),
        ({"times": lambda times: times[None]}, ValueError, r"times: expected shape \[T\], got \[1, 2\]"),
        ({"times": lambda times: times.float()}, TypeError, "times: expected torch.float64, got torch.float32"),
        ({"times": lambda times: times.to("meta")}, ValueError, "times: expected the device of up, cpu, got meta"),
        ({"times": lambda times: times - 1}, ValueError, "times: expected finite values >= 1, got 0"),
        ({"times": lambda times: times * math.inf}, ValueError, "times: expected finite values >= 1, got inf"),
        ({"times": lambda times: times.flip(0)}, ValueError, "times: expected non-decreasing values"),
        ({"up": lambda up: up * 1e3, "down": lambda down: down * 1e3}, RuntimeError, "did not converge"),
    ],
)
def test_bad_input_is_rejected_by_name(change, error, message):
    up, down = random_weights(4, 8)
    arguments = {"up": up, "down": down, "times": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    for name, edit in change.items():
        arguments[name] = edit(arguments[name])
    with pytest.raises(error, match=message):
        solve_frequencies(*arguments.values(), settings(4, 8))
