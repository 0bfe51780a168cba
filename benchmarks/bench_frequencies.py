"""Solving for frequencies: t = 1..16 without gradients, and t = 16 forward and backward."""

import itertools
import math
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torchdiffeq import odeint

from benchmarks import exact
from benchmarks.measure import Goal, Way, compare, max_difference, record, relative_error
from benchmarks.shapes import MAX_FACTOR
from benchmarks.weights import Weights
from clex_kernels import ClexConfig, reference, solve_frequencies

OURS = "solve_frequencies"
AUTHORS = "authors: torchdiffeq rk4, step 0.01, (z, t), fp32"
INTEGERS = torch.arange(1, MAX_FACTOR + 1, dtype=torch.float64)
LAST = INTEGERS[-1:]

Solve = Callable[[Tensor, Tensor, Tensor, ClexConfig], Tensor]


def dopri5_in_t(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    grid = with_start(times).to(up)
    z = odeint(
        lambda t, z: reference.log_frequency_slope(t, z, up, down, config),
        reference.plain_log_frequencies(config, up.dtype),
        grid,
        method="dopri5",
        rtol=1e-6,
        atol=1e-6,
        options={"step_t": grid},
    )
    return z[-len(times) :].exp()


def slope_in_s(up: Tensor, down: Tensor, config: ClexConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """du/ds of design.md: s = ln(2t - 1), u = z + (i / (R - 1)) s, so that only the MLP is integrated."""
    pair = torch.arange(config.pairs, dtype=up.dtype)
    ntk_base_term = pair / config.pairs * math.log(config.ntk_base)
    ntk_share = 2 * pair / (config.pairs - 1)
    activation = torch.tanh if config.activation == "tanh" else torch.nn.functional.silu
    return lambda s, u: s.exp() / 2 * (activation((u - ntk_base_term - ntk_share * s) @ up) @ down)


def from_s(u: Tensor, s: Tensor, config: ClexConfig) -> Tensor:
    pair = torch.arange(config.pairs, dtype=u.dtype)
    return (u - pair / (config.pairs - 1) * s[:, None]).exp()


def dopri8_in_s(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    up, down = up.double(), down.double()
    s = (2 * with_start(times) - 1).log()
    start = reference.plain_log_frequencies(config, torch.float64)
    slope = slope_in_s(up, down, config)
    u = odeint(slope, start, s, method="dopri8", rtol=1e-10, atol=1e-10, options={"step_t": s})
    return from_s(u, s, config)[-len(times) :]


def rk4_in_s(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """Plain torch, fp32: the classical rule, steps of at most 0.25 in s."""
    s = (2 * with_start(times) - 1).log().to(up)
    slope = slope_in_s(up, down, config)
    u = reference.plain_log_frequencies(config, up.dtype)
    solved = [u]
    for start, end in itertools.pairwise(s):
        steps = math.ceil((end - start).item() / 0.25)
        step = (end - start) / steps
        for number in range(steps):
            now = start + number * step
            k1 = slope(now, u)
            k2 = slope(now + step / 2, u + step / 2 * k1)
            k3 = slope(now + step / 2, u + step / 2 * k2)
            k4 = slope(now + step, u + step * k3)
            u = u + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        solved.append(u)
    return from_s(torch.stack(solved), s, config)[-len(times) :]


def with_start(times: Tensor) -> Tensor:
    return times if times[0] == 1 else torch.cat((times.new_ones(1), times))


RIVALS: dict[str, Solve] = {
    AUTHORS: reference.frequencies,
    "torchdiffeq dopri5, rtol 1e-6, (z, t), fp32": dopri5_in_t,
    "torchdiffeq dopri8, rtol 1e-10, (u, s), fp64": dopri8_in_s,
    "plain torch rk4, steps <= 0.25, (u, s), fp32": rk4_in_s,
}
MEMORY = "fresh outputs for all; the next weights are written into the same tensors before every timed solve"


def forward_way(name: str, solve: Solve, weights: Weights, truths: list[Tensor], every: int = 1) -> Way:
    def run() -> Tensor:
        with torch.no_grad():
            return solve(weights.up, weights.down, INTEGERS, weights.config)

    def errors(turn: int, freq: Tensor) -> dict[str, float]:
        return {"freq": relative_error(freq, truths[weights.index(turn)])}

    return Way(name, run, weights.load, errors, every)


def bench_all_integers(benchmark: BenchmarkFixture, weights: Weights) -> None:
    """t = 1..16 at once, no gradient."""
    truths = [exact.solve_exactly(up, down, INTEGERS, weights.config) for up, down in weights.sets]
    ours = forward_way(OURS, solve_frequencies, weights, truths)
    others = [forward_way(name, solve, weights, truths, every=4) for name, solve in RIVALS.items()]
    result = compare(benchmark, ours, others, rounds=24)
    count = max(count_evaluations(up, down, weights.config) for up, down in weights.sets)
    error = result.errors[OURS]["freq"]
    record(
        benchmark,
        section="frequencies",
        row="frequencies for t = 1..16, no gradient",
        case=f"D {weights.config.rotary_dim}, {weights.config.activation}",
        memory=MEMORY,
        weights=weights.kind,
        error_unit="largest |freq / exact - 1|",
        comparison=result,
        ours=OURS,
        rivals=list(RIVALS),
        goals=[
            Goal("faster than the authors' way", result.ratio(AUTHORS, OURS), "at least", 800),
            Goal("relative error", error, "at most", 1e-10, unit=""),
            Goal("right-hand-side evaluations", count, "at most", 200, unit="", label="counted"),
        ],
    )


def backward_way(
    name: str, solve: Solve, weights: Weights, dfreq: Tensor, truths: list[tuple[Tensor, Tensor]], every: int = 1
) -> Way:
    up, down = weights.up.detach().requires_grad_(), weights.down.detach().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        freq = solve(up, down, LAST, weights.config)
        return torch.autograd.grad(freq, (up, down), dfreq.to(freq))

    def errors(turn: int, gradients: tuple[Tensor, Tensor]) -> dict[str, float]:
        exact_pair = truths[weights.index(turn)]
        return {
            name: max_difference(found, true) / true.abs().max().item()
            for name, found, true in zip(("dup", "ddown"), gradients, exact_pair, strict=True)
        }

    return Way(name, run, weights.load, errors, every)


def bench_forward_backward(benchmark: BenchmarkFixture, weights: Weights) -> None:
    """t = 16 alone, forward and backward to both weights."""
    generator = torch.Generator().manual_seed(2)
    # divided by the frequency, so that every pair's ln freq gets a gradient of the same size.
    plain = reference.plain_log_frequencies(weights.config, torch.float64).exp()
    dfreq = (torch.randn(weights.config.pairs, generator=generator, dtype=torch.float64) / plain)[None]
    truths = [exact.weight_gradients(up, down, LAST, dfreq, weights.config) for up, down in weights.sets]
    ours = backward_way(OURS, solve_frequencies, weights, dfreq, truths)
    others = [backward_way(name, solve, weights, dfreq, truths, every=5) for name, solve in RIVALS.items()]
    result = compare(benchmark, ours, others, rounds=15)
    record(
        benchmark,
        section="frequencies",
        row="frequencies forward and backward, t = 16",
        case=f"D {weights.config.rotary_dim}, {weights.config.activation}",
        memory=MEMORY,
        weights=weights.kind,
        error_unit="largest error over largest gradient",
        comparison=result,
        ours=OURS,
        rivals=list(RIVALS),
        goals=[Goal("faster than the authors' way with autograd", result.ratio(AUTHORS, OURS), "at least", 1500)],
    )


def count_evaluations(up: Tensor, down: Tensor, config: ClexConfig) -> int:
    """Right-hand-side evaluations of the solve for t = 1..16, rejected steps included, as the operator counts them."""
    bases = math.log(config.rope_base), math.log(config.ntk_base)
    return torch.ops.clex.solve_frequencies(up, down, INTEGERS, *bases, config.activation)[3].item()
