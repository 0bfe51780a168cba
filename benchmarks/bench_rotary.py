"""Rotary of q and k: in place, out of place, forward and backward, and its overhead over plain RoPE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Goal, Way, compare, max_difference, record
from benchmarks.shapes import LLAMA_4K, MAX_FACTOR, ROTARY_DTYPES, RotaryShape
from benchmarks.weights import Weights
from clex_kernels import RotaryTable, apply_rotary, reference

SETS = 2
ROUNDS = 15
TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)
SHAPE = LLAMA_4K
ERROR_UNIT = "largest error over largest exact value"
BEFORE_EACH_CALL = "other inputs are copied in, untimed, before every timed call"

Pair = tuple[Tensor, Tensor]
Errors = Callable[[int, Pair], dict[str, float]]


class Truth:
    """An exact pair of results and how far a found pair is from it, relative to the largest exact value."""

    def __init__(self, q: Tensor, k: Tensor):
        self.pair = (q, k)
        self.scale = max(x.abs().max().item() for x in self.pair)

    def error(self, found: Pair) -> float:
        return max(max_difference(y, x) for y, x in zip(found, self.pair, strict=True)) / self.scale

    def rounding_error(self, dtype: torch.dtype) -> float:
        """What rounding the exact result to the dtype costs: no kernel can do better."""
        return self.error((self.pair[0].to(dtype), self.pair[1].to(dtype)))


def errors_against(truths: list[Truth]) -> Errors:
    return lambda turn, pair: {"q, k": truths[turn % SETS].error(pair)}


def exact_outputs(inputs: list[Pair], positions: Tensor, freq: Tensor) -> list[Truth]:
    cos, sin = exact.cos_sin(positions, freq)
    return [Truth(exact.rotate(q, cos, sin), exact.rotate(k, cos, sin)) for q, k in inputs]


def draw_pairs(shape: RotaryShape, dtype: torch.dtype, seed: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    return [(draw(shape.q), draw(shape.k)) for _ in range(SETS)]


class Case:
    """Input sets, their fp64 truths, and the tensors q and k that every timed call reads."""

    def __init__(self, weights: Weights, dtype: str, positions: Tensor):
        self.dtype = ROTARY_DTYPES[dtype]
        self.name = f"{SHAPE.name}, {dtype}"
        self.weights = weights.kind
        self.positions = positions
        self.freq = exact.solve_exactly(*weights.sets[0], TIME, weights.config)[0]
        self.plain_freq = reference.plain_log_frequencies(weights.config, torch.float64).exp()
        self.cos, self.sin = (table.float() for table in exact.cos_sin(positions, self.freq))
        self.inputs = draw_pairs(SHAPE, self.dtype, seed=4)
        self.truths = exact_outputs(self.inputs, positions, self.freq)
        self.q, self.k = (torch.empty_like(x) for x in self.inputs[0])
        # memory for the ways that write into preallocated outputs; pages are touched here.
        self.out = (torch.zeros_like(self.q), torch.zeros_like(self.k))

    def load(self, turn: int) -> None:
        q, k = self.inputs[turn % SETS]
        self.q.copy_(q)
        self.k.copy_(k)

    def floor(self) -> Way:
        def run() -> Pair:
            return self.out[0].copy_(self.q), self.out[1].copy_(self.k)

        def errors(turn: int, pair: Pair) -> dict[str, float]:
            same = all(torch.equal(y, x) for y, x in zip(pair, self.inputs[turn % SETS], strict=True))
            return {"bytes": 0.0 if same else float("nan")}

        return Way("floor: copy of q and k", run, self.load, errors)

    def clex_and_plain(self, name: str, **policy: Any) -> tuple[Way, Way]:
        """apply_rotary with frequencies solved at t = 16, and the same call with plain RoPE's."""
        truths = exact_outputs(self.inputs, self.positions, self.plain_freq)

        def way(name: str, freq: Tensor, truths: list[Truth]) -> Way:
            table = RotaryTable.from_frequencies(freq, length=SHAPE.L)
            run = partial(apply_rotary, self.q, self.k, table, **policy)
            return Way(name, run, self.load, errors_against(truths))

        return way(name, self.freq, self.truths), way(f"{name}, plain RoPE", self.plain_freq, truths)


@pytest.fixture(scope="module", params=ROTARY_DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def case(best_weights: Weights, dtype: str) -> Case:
    return Case(best_weights, dtype, torch.arange(SHAPE.L))


def torch_ways(case: Case, compiled: bool, forms: dict[str, formulations.Formulation], every: int) -> list[Way]:
    """Formulations in plain torch: fresh outputs, into preallocated memory (`_into`), or in place."""

    def way(name: str, form: formulations.Formulation) -> Way:
        apply = formulations.for_q_and_k(form, compiled)
        into = case.out if form.__name__.endswith("_into") else ()
        kept = (case.q, case.k) if form.__name__.endswith("_in_place") else into

        def run() -> Pair:
            fresh = apply(case.q, case.k, case.cos, case.sin, *into)
            return kept or fresh

        return Way(name, run, case.load, errors_against(case.truths), every)

    return [way(f"{'torch.compile' if compiled else 'eager'} {name}", form) for name, form in forms.items()]


def bench_in_place(benchmark: BenchmarkFixture, case: Case) -> None:
    ours, fixed = case.clex_and_plain("apply_rotary in place", inplace=True)
    compiled = torch_ways(
        case,
        True,
        {
            "rotate-half, preallocated": formulations.rotate_half_into,
            "split halves, preallocated": formulations.split_halves_into,
            "split halves, in place": formulations.split_halves_in_place,
        },
        every=2,
    )
    eager = torch_ways(
        case,
        False,
        {
            "rotate-half, fresh (the authors' form)": formulations.rotate_half,
            "split halves, preallocated": formulations.split_halves_into,
            "complex product, fresh": formulations.complex_product,
        },
        every=5,
    )
    floor = case.floor()
    result = compare(benchmark, ours, [*compiled, *eager, fixed, floor], rounds=ROUNDS)
    rival = result.fastest([way.name for way in compiled])
    rounding = max(truth.rounding_error(case.dtype) for truth in case.truths)
    record(
        benchmark,
        section="rotary",
        row="rotary in place",
        case=case.name,
        memory=f"in place or as named; {BEFORE_EACH_CALL}",
        weights=case.weights,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in (*compiled, *eager)],
        floor=floor.name,
        overhead=(ours.name, fixed.name),
        goals=[
            Goal("time over a copy of the same bytes", result.ratio(ours.name, floor.name), "at most", 0.8),
            Goal(f"faster than the fastest torch.compile ({rival})", result.ratio(rival, ours.name), "at least", 6),
        ],
        notes=[str(SHAPE), f"rounding the exact result to the dtype alone costs {rounding:.1e}"],
    )


def bench_out_of_place(benchmark: BenchmarkFixture, case: Case) -> None:
    # outputs of its own: the floor and the rivals write into the same place every time as well.
    out = (torch.zeros_like(case.q), torch.zeros_like(case.k))
    ours, fixed = case.clex_and_plain("apply_rotary, preallocated", out=out)
    rivals = torch_ways(case, True, {"split halves, preallocated": formulations.split_halves_into}, every=2)
    rivals += torch_ways(
        case,
        False,
        {
            "rotate-half, preallocated": formulations.rotate_half_into,
            "split halves, preallocated": formulations.split_halves_into,
        },
        every=5,
    )
    floor = case.floor()
    result = compare(benchmark, ours, [*rivals, fixed, floor], rounds=ROUNDS)
    record(
        benchmark,
        section="rotary",
        row="rotary out of place, preallocated",
        case=case.name,
        memory=f"preallocated outputs for all; {BEFORE_EACH_CALL}",
        weights=case.weights,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in rivals],
        floor=floor.name,
        overhead=(ours.name, fixed.name),
        goals=[Goal("time over a copy of the same bytes", result.ratio(ours.name, floor.name), "at most", 1.15)],
        notes=[str(SHAPE)],
    )


class Training:
    """A forward and a backward pass at sampled positions: gradients to put in, truths of those that come out."""

    def __init__(self, weights: Weights, dtype: str):
        generator = torch.Generator().manual_seed(5)
        positions = reference.sample_positions(SHAPE.L, float(MAX_FACTOR), SHAPE.L, generator)
        self.case = case = Case(weights, dtype, positions)
        self.q, self.k = (x.detach().requires_grad_() for x in (case.q, case.k))
        self.douts = draw_pairs(SHAPE, case.dtype, seed=6)
        self.dout = self.douts[0]
        cos, sin = exact.cos_sin(positions, case.freq)
        self.dinputs = [Truth(*(exact.rotate(dy, cos, -sin) for dy in pair)) for pair in self.douts]
        self.dfreqs = [
            sum(exact.frequency_gradient(y, dy, positions) for y, dy in zip(truth.pair, pair, strict=True))
            for truth, pair in zip(case.truths, self.douts, strict=True)
        ]

    def load(self, turn: int) -> None:
        self.case.load(turn)
        self.dout = self.douts[turn % SETS]

    def errors(self, turn: int, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        dq, dk, *dfreq = gradients
        errors = {"dq, dk": self.dinputs[turn % SETS].error((dq, dk))}
        for found in dfreq:
            true = self.dfreqs[turn % SETS]
            errors["dfreq"] = max_difference(found, true) / true.abs().max().item()
        return errors

    def way(self, name: str, rotate: Callable[..., Pair], freq: Tensor | None, every: int = 1) -> Way:
        """`rotate(q, k, freq)` and its gradients; frequencies are frozen where `freq` is None."""
        leaves = () if freq is None else (freq.clone().requires_grad_(),)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(rotate(self.q, self.k, *leaves), (self.q, self.k, *leaves), self.dout)

        return Way(name, run, self.load, self.errors, every)

    def torch_ways(self, compiled: bool, forms: dict[str, formulations.Formulation], every: int) -> list[Way]:
        freq, positions = self.case.freq.float(), self.case.positions.float()

        def way(name: str, form: formulations.Formulation) -> Way:
            apply = formulations.with_frequencies(form, compiled)
            return self.way(name, lambda q, k, freq: apply(q, k, freq, positions), freq, every)

        return [way(f"{'torch.compile' if compiled else 'eager'} {name}", form) for name, form in forms.items()]


def bench_forward_backward(benchmark: BenchmarkFixture, best_weights: Weights, dtype: str) -> None:
    """From q, k, frequencies and sampled positions to dq, dk and dfreq; every way builds its own cos and sin."""
    training = Training(best_weights, dtype)
    case = training.case
    frozen_table = RotaryTable.from_frequencies(case.freq, positions=case.positions)

    def learned(q: Tensor, k: Tensor, freq: Tensor) -> Pair:
        return apply_rotary(q, k, RotaryTable.from_frequencies(freq, positions=case.positions))

    ours = training.way("apply_rotary", learned, case.freq)
    frozen = training.way("apply_rotary, frozen frequencies", lambda q, k: apply_rotary(q, k, frozen_table), None)
    compiled = training.torch_ways(
        True, {"rotate-half": formulations.rotate_half, "split halves": formulations.split_halves}, every=2
    )
    eager = training.torch_ways(
        False,
        {
            "rotate-half (the authors' form)": formulations.rotate_half,
            "split halves": formulations.split_halves,
            "complex product": formulations.complex_product,
        },
        every=5,
    )
    floor = case.floor()
    result = compare(benchmark, ours, [*compiled, *eager, frozen, floor], rounds=ROUNDS)
    fastest_compiled, fastest_eager = (result.fastest([way.name for way in ways]) for ways in (compiled, eager))
    record(
        benchmark,
        section="rotary",
        row="rotary forward, backward and dfreq",
        case=case.name,
        memory="fresh outputs and gradients from torch's default allocator for all",
        weights=case.weights,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in (*compiled, *eager)],
        floor=floor.name,
        overhead=(ours.name, frozen.name),
        goals=[
            Goal(f"faster than {fastest_compiled}", result.ratio(fastest_compiled, ours.name), "at least", 6),
            Goal(f"faster than {fastest_eager}", result.ratio(fastest_eager, ours.name), "at least", 15),
        ],
        notes=[str(SHAPE), f"positions sampled up to {MAX_FACTOR * SHAPE.L}"],
    )
