"""Rotary of q and k: in place, out of place, forward and backward, and its overhead over plain RoPE."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Goal, Way, compare, max_difference, record
from benchmarks.shapes import MAX_FACTOR, ROTARY_DTYPES, ROTARY_SHAPES, RotaryShape
from benchmarks.weights import Weights
from clex_kernels import RotaryTable, apply_rotary, reference

SETS = 2
TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)
SHAPE = ROTARY_SHAPES["llama-8b-4k"]
ERROR_UNIT = "largest error over largest exact value"
BEFORE_EACH_CALL = "other inputs are copied in, untimed, before every timed call"

pytestmark = pytest.mark.parametrize("dtype", ROTARY_DTYPES)

Pair = tuple[Tensor, Tensor]
Errors = Callable[[int, Pair], dict[str, float]]


@dataclass(frozen=True)
class Case:
    """Input sets, their fp64 truths, and the tensors that every timed call reads."""

    shape: RotaryShape
    freq: Tensor
    positions: Tensor
    inputs: list[Pair]
    truths: list[Pair]
    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor

    def load(self, turn: int) -> None:
        q, k = self.inputs[turn % SETS]
        self.q.copy_(q)
        self.k.copy_(k)

    def errors(self, turn: int, pair: Pair) -> dict[str, float]:
        return self.against(self.truths)(turn, pair)

    def against(self, truths: list[Pair]) -> Errors:
        return lambda turn, pair: {"q, k": pair_error(pair, truths[turn % SETS])}

    def table(self) -> RotaryTable:
        return RotaryTable.from_frequencies(self.freq, length=self.shape.L)

    def rounding_error(self) -> float:
        """What rounding the exact result to the dtype costs: no kernel can do better."""
        return max(pair_error(tuple(y.to(self.q.dtype) for y in truth), truth) for truth in self.truths)


def pair_error(found: Pair, true: Pair) -> float:
    return max(max_difference(y, x) for y, x in zip(found, true, strict=True)) / max(x.abs().max().item() for x in true)


def draw_pairs(shape: RotaryShape, dtype: torch.dtype, seed: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(size, generator=generator).to(dtype) for size in (shape.q, shape.k)) for _ in range(SETS)]


def make_case(weights: Weights, dtype: torch.dtype, positions: Tensor | None = None) -> Case:
    freq = exact.solve_exactly(weights.up, weights.down, TIME, weights.config)[0]
    positions = torch.arange(SHAPE.L) if positions is None else positions
    cos, sin = exact.cos_sin(positions, freq)
    inputs = draw_pairs(SHAPE, dtype, seed=4)
    truths = exact_outputs(inputs, positions, freq)
    q, k = (torch.empty_like(x) for x in inputs[0])
    return Case(SHAPE, freq, positions, inputs, truths, q, k, cos.float(), sin.float())


def copy_floor(case: Case) -> Way:
    q, k = torch.zeros_like(case.q), torch.zeros_like(case.k)

    def run() -> Pair:
        return q.copy_(case.q), k.copy_(case.k)

    def errors(turn: int, pair: Pair) -> dict[str, float]:
        return {"bytes": pair_error(pair, (case.q, case.k))}

    return Way("floor: copy of q and k", run, case.load, errors)


def plain_rope(case: Case, weights: Weights) -> tuple[RotaryTable, list[Pair]]:
    """The table of plain RoPE's fixed frequencies, and the truths it gives."""
    freq = reference.plain_log_frequencies(weights.config, torch.float64).exp()
    return RotaryTable.from_frequencies(freq, length=SHAPE.L), exact_outputs(case.inputs, case.positions, freq)


def exact_outputs(inputs: list[Pair], positions: Tensor, freq: Tensor) -> list[Pair]:
    cos, sin = exact.cos_sin(positions, freq)
    return [tuple(exact.rotate(x, cos, sin) for x in pair) for pair in inputs]


def plain_ways(case: Case, compiled: bool, forms: dict[str, formulations.Formulation], every: int) -> list[Way]:
    """Formulations in plain torch: fresh outputs, into preallocated memory (`_into`), or in place."""
    out = (torch.zeros_like(case.q), torch.zeros_like(case.k))

    def way(name: str, form: formulations.Formulation) -> Way:
        apply = formulations.for_q_and_k(form, compiled)
        into = out if form.__name__.endswith("_into") else ()
        kept = (case.q, case.k) if form.__name__.endswith("_in_place") else into

        def run() -> Pair:
            fresh = apply(case.q, case.k, case.cos, case.sin, *into)
            return kept or fresh

        return Way(f"{'torch.compile' if compiled else 'eager'} {name}", run, case.load, case.errors, every)

    return [way(name, form) for name, form in forms.items()]


def describe(case: Case, dtype: str) -> str:
    return f"{case.shape}, {dtype}"


def bench_in_place(benchmark: BenchmarkFixture, best_weights: Weights, dtype: str) -> None:
    case = make_case(best_weights, ROTARY_DTYPES[dtype])
    plain_table, plain_truths = plain_rope(case, best_weights)

    def in_place(name: str, table: RotaryTable, errors: Errors) -> Way:
        return Way(name, lambda: apply_rotary(case.q, case.k, table, inplace=True), case.load, errors)

    ours = in_place("apply_rotary in place", case.table(), case.errors)
    fixed = in_place("apply_rotary in place, plain RoPE", plain_table, case.against(plain_truths))
    compiled = plain_ways(
        case,
        True,
        {
            "rotate-half, preallocated": formulations.rotate_half_into,
            "split halves, preallocated": formulations.split_halves_into,
            "split halves, in place": formulations.split_halves_in_place,
        },
        every=1,
    )
    eager = plain_ways(
        case,
        False,
        {
            "rotate-half, fresh (the authors' form)": formulations.rotate_half,
            "split halves, preallocated": formulations.split_halves_into,
            "complex product, fresh": formulations.complex_product,
        },
        every=4,
    )
    floor = copy_floor(case)
    result = compare(benchmark, ours, [*compiled, *eager, fixed, floor], rounds=16)
    rival = result.fastest([way.name for way in compiled])
    record(
        benchmark,
        section="rotary",
        row="rotary in place",
        case=describe(case, dtype),
        memory=f"in place or as named; {BEFORE_EACH_CALL}",
        weights=best_weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in (*compiled, *eager)],
        floor=floor.name,
        overhead=(ours.name, fixed.name),
        goals=[
            Goal("time over a copy of the same bytes", result.ratio(ours.name, floor.name), "at most", 0.8),
            Goal(
                f"faster than the fastest torch.compile form ({rival})", result.ratio(rival, ours.name), "at least", 6
            ),
        ],
        notes=[f"rounding the exact result to {dtype} alone costs {case.rounding_error():.1e}"],
    )


def bench_out_of_place(benchmark: BenchmarkFixture, best_weights: Weights, dtype: str) -> None:
    case = make_case(best_weights, ROTARY_DTYPES[dtype])
    out = (torch.zeros_like(case.q), torch.zeros_like(case.k))
    plain_table, plain_truths = plain_rope(case, best_weights)

    def into_given(name: str, table: RotaryTable, errors: Errors) -> Way:
        return Way(name, lambda: apply_rotary(case.q, case.k, table, out=out), case.load, errors)

    ours = into_given("apply_rotary, preallocated", case.table(), case.errors)
    fixed = into_given("apply_rotary, preallocated, plain RoPE", plain_table, case.against(plain_truths))
    rivals = plain_ways(case, True, {"split halves, preallocated": formulations.split_halves_into}, every=1)
    rivals += plain_ways(
        case,
        False,
        {
            "rotate-half, preallocated": formulations.rotate_half_into,
            "split halves, preallocated": formulations.split_halves_into,
        },
        every=4,
    )
    floor = copy_floor(case)
    result = compare(benchmark, ours, [*rivals, fixed, floor], rounds=16)
    record(
        benchmark,
        section="rotary",
        row="rotary out of place, preallocated",
        case=describe(case, dtype),
        memory=f"preallocated outputs for all; {BEFORE_EACH_CALL}",
        weights=best_weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in rivals],
        floor=floor.name,
        overhead=(ours.name, fixed.name),
        goals=[Goal("time over a copy of the same bytes", result.ratio(ours.name, floor.name), "at most", 1.15)],
    )


@dataclass(frozen=True)
class TrainingCase:
    """A forward and backward pass: what goes in, what comes back, and the truths of all three gradients."""

    case: Case
    douts: list[Pair]
    truths: list[tuple[Pair, Tensor]]

    def errors(self, turn: int, gradients: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
        dq, dk, dfreq = gradients
        pair, true = self.truths[turn % SETS]
        return {
            "dq, dk": pair_error((dq, dk), pair),
            "dfreq": max_difference(dfreq, true) / true.abs().max().item(),
        }


def make_training_case(weights: Weights, dtype: torch.dtype) -> TrainingCase:
    generator = torch.Generator().manual_seed(5)
    positions = reference.sample_positions(SHAPE.L, float(MAX_FACTOR), SHAPE.L, generator)
    case = make_case(weights, dtype, positions)
    douts = draw_pairs(SHAPE, dtype, seed=6)
    cos, sin = exact.cos_sin(positions, case.freq)
    truths = []
    for y, dy in zip(case.truths, douts, strict=True):
        dfreq = sum(exact.frequency_gradient(a, b, positions) for a, b in zip(y, dy, strict=True))
        truths.append((tuple(exact.rotate(b, cos, -sin) for b in dy), dfreq))
    return TrainingCase(case, douts, truths)


def bench_forward_backward(benchmark: BenchmarkFixture, best_weights: Weights, dtype: str) -> None:
    """Outputs, dq, dk and dfreq from q, k, frequencies and sampled positions; every way builds its own table."""
    training = make_training_case(best_weights, ROTARY_DTYPES[dtype])
    case = training.case
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    current: list[Pair] = [training.douts[0]]

    def load(turn: int) -> None:
        with torch.no_grad():
            case.load(turn)
        current[0] = training.douts[turn % SETS]

    def way(name: str, rotate: Callable[[Tensor], Pair], freq: Tensor, every: int = 1) -> Way:
        freq = freq.clone().requires_grad_()

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(rotate(freq), (q, k, freq), current[0])

        return Way(name, run, load, training.errors, every)

    def with_table(freq: Tensor) -> Pair:
        return apply_rotary(q, k, RotaryTable.from_frequencies(freq, positions=case.positions))

    frozen_table = RotaryTable.from_frequencies(case.freq, positions=case.positions)

    def run_frozen() -> tuple[Tensor, ...]:
        return torch.autograd.grad(apply_rotary(q, k, frozen_table), (q, k), current[0])

    def frozen_errors(turn: int, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        return {"dq, dk": pair_error(gradients, training.truths[turn % SETS][0])}

    ours = way("apply_rotary", with_table, case.freq)
    frozen = Way("apply_rotary, frozen frequencies (plain RoPE)", run_frozen, load, frozen_errors)
    fp32_freq, fp32_positions = case.freq.float(), case.positions.float()

    def plain(name: str, form: formulations.Formulation, compiled: bool, every: int) -> Way:
        apply = formulations.with_frequencies(form, compiled)
        kind = "torch.compile" if compiled else "eager"
        return way(f"{kind} {name}", lambda freq: apply(q, k, freq, fp32_positions), fp32_freq, every)

    compiled = [
        plain("rotate-half", formulations.rotate_half, True, every=2),
        plain("split halves", formulations.split_halves, True, every=2),
        plain("flipped pairs", formulations.flipped_pairs, True, every=2),
    ]
    eager = [
        plain("rotate-half (the authors' form)", formulations.rotate_half, False, every=4),
        plain("split halves", formulations.split_halves, False, every=4),
        plain("complex product", formulations.complex_product, False, every=4),
    ]
    floor = copy_floor(case)
    result = compare(benchmark, ours, [*compiled, *eager, frozen, floor], rounds=12)
    fastest_compiled, fastest_eager = (result.fastest([way.name for way in ways]) for ways in (compiled, eager))
    record(
        benchmark,
        section="rotary",
        row="rotary forward, backward and dfreq",
        case=f"{describe(case, dtype)}, sampled positions, t = {MAX_FACTOR}",
        memory="fresh outputs and gradients from torch's default allocator for all",
        weights=best_weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in (*compiled, *eager)],
        floor=floor.name,
        overhead=(ours.name, frozen.name),
        goals=[
            Goal(
                f"faster than the fastest torch.compile form ({fastest_compiled})",
                result.ratio(fastest_compiled, ours.name),
                "at least",
                6,
            ),
            Goal(
                f"faster than the fastest eager form ({fastest_eager})",
                result.ratio(fastest_eager, ours.name),
                "at least",
                15,
            ),
        ],
    )
