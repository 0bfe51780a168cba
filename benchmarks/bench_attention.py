"""Causal attention from raw q, k and v: forward, forward and backward, and which engine is the faster one on a GPU.

The truth is computed for ROWS query rows of every input set, other rows in each, and the gradient put in is zero in the
others: so outputs are checked at these rows, and gradients to q, k, v and the frequencies in full.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Comparison, Goal, Way, compare, errors_over_largest, record
from benchmarks.shapes import GQA_1K, LAYER_LENGTHS, MAX_FACTOR, ROTARY_DTYPES, RotaryShape
from benchmarks.weights import Weights
from clex_kernels import RotaryTable, attention, reference
from clex_kernels.attention_checks import check_operands
from clex_kernels.attention_engines import choose_engine
from clex_kernels.attention_terms import Rule

SETS = 2
ROWS = 64
ROUNDS = 6
TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)
ERROR_UNIT = "largest error over largest exact value of that tensor"
CHECKED = f"checked at {ROWS} query rows per input set, the gradient put in being zero in the others"
RESULTS = ("out", "dq", "dk", "dv", "dfreq")

Attend = Callable[..., Tensor]


@dataclass
class InputSet:
    """q, k and v, the gradient of the output, the rows that are checked, and by kind of angles what is true."""

    operands: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    rows: Tensor
    truths: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def draw_set(shape: RotaryShape, dtype: torch.dtype, generator: torch.Generator) -> InputSet:
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in (shape.q, shape.k, shape.k))
    rows = torch.randperm(shape.L, generator=generator)[:ROWS].sort().values
    dout = torch.zeros(shape.q, dtype=dtype)
    dout[:, rows] = torch.randn((shape.B, ROWS, shape.H, shape.D), generator=generator).to(dtype)
    return InputSet((q, k, v), dout, rows)


def exact_results(drawn: InputSet, freq: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """out at the set's rows, and dq, dk, dv, dfreq."""
    leaves = [x.to(torch.float64, copy=True).requires_grad_() for x in (*drawn.operands, freq)]
    out = exact.attention(*leaves, positions, drawn.rows)
    gradients = torch.autograd.grad(out, leaves, drawn.dout[:, drawn.rows].double())
    return dict(zip(RESULTS, (out.detach(), *gradients), strict=True))


class Case:
    """Input sets with their truths, and the tensors that every timed call reads.

    Angles are of three kinds: "clex", frequencies solved at t = 16, at sampled positions if it trains; "plain", plain
    RoPE's at 0, 1, 2, ...; and "none", for the floor.
    """

    def __init__(self, weights: Weights, shape: RotaryShape, dtype: str, trains: bool, device: str = "cpu"):
        generator = torch.Generator().manual_seed(7)
        self.shape, self.trains, self.device = shape, trains, device
        self.dtype = ROTARY_DTYPES[dtype]
        self.name = f"{shape.name}, {dtype}"
        in_order = torch.arange(shape.L, dtype=torch.float64)
        sampled = reference.sample_positions(shape.L, float(MAX_FACTOR), shape.L, generator)
        plain = reference.plain_log_frequencies(weights.config, torch.float64).exp()
        self.angles = {
            "clex": (
                exact.solve_exactly(*weights.sets[0], TIME, weights.config)[0],
                sampled if trains else in_order,
            ),
            "plain": (plain, in_order),
            "none": (torch.zeros_like(plain), in_order),
        }
        self.sets = [draw_set(shape, self.dtype, generator) for _ in range(SETS)]
        self.operands = [torch.empty_like(x, device=device).requires_grad_(trains) for x in self.sets[0].operands]
        self.dout = torch.empty_like(self.sets[0].dout, device=device)

    def load(self, turn: int) -> None:
        drawn = self.sets[turn % SETS]
        with torch.no_grad():
            for into, x in zip((*self.operands, self.dout), (*drawn.operands, drawn.dout), strict=True):
                into.copy_(x)

    def errors(self, kind: str, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        drawn = self.sets[turn % SETS]
        if kind not in drawn.truths:
            drawn.truths[kind] = exact_results(drawn, *self.angles[kind])
        found = dict(zip(RESULTS, results, strict=False))
        found["out"] = found["out"][:, drawn.rows.to(self.device)]
        return errors_over_largest(found, drawn.truths[kind])

    def way(self, name: str, kind: str, attend: Attend, *leaves: Tensor, every: int = 1) -> Way:
        """`attend(q, k, v, *leaves)`, and where it trains the gradients to all of these."""

        def run() -> tuple[Tensor, ...]:
            inputs = (*self.operands, *leaves)
            out = attend(*inputs)
            results = (out, *torch.autograd.grad(out, inputs, self.dout)) if self.trains else (out,)
            if self.device == "cuda":
                torch.cuda.synchronize()
            return results

        return Way(name, run, self.load, partial(self.errors, kind), every)

    def torch_way(self, name: str, formulation: Attend, compiled: bool, every: int) -> Way:
        freq, positions = (x.float() for x in self.angles["clex"])
        name = f"{'torch.compile' if compiled else 'eager'} {name}"
        if self.trains:
            apply = formulations.attend_with_frequencies(formulation, compiled)
            leaf = freq.requires_grad_()
            return self.way(name, "clex", lambda q, k, v, freq: apply(q, k, v, freq, positions), leaf, every=every)
        apply = formulations.attend(formulation, compiled)
        tables = [table.to(self.dtype) for table in reference.tables(*self.angles["clex"])]
        return self.way(name, "clex", lambda q, k, v: apply(q, k, v, *tables), every=every)

    def our_way(self, name: str, kind: str, **options: str) -> Way:
        """This package: frequencies are learned where it trains with CLEX, else the table is made beforehand."""
        freq, positions = (x.to(self.device) for x in self.angles[kind])
        if self.trains and kind == "clex":

            def learned(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
                table = RotaryTable.from_frequencies(freq, positions=positions)
                return attention(q, k, v, table, is_causal=True, **options)

            return self.way(name, kind, learned, freq.clone().requires_grad_())
        table = RotaryTable.from_frequencies(freq, length=self.shape.L)
        return self.way(name, kind, lambda q, k, v: attention(q, k, v, table, is_causal=True, **options))


def rivals_of(case: Case) -> list[Way]:
    softmax, shared, repeated = formulations.softmax_attention, formulations.sdpa_shared, formulations.sdpa_repeated
    ways = [
        case.torch_way("softmax(q k^T) v (the reference)", softmax, compiled=False, every=4),
        case.torch_way("rotate-half + SDPA, enable_gqa (transformers)", shared, compiled=False, every=1),
        case.torch_way("rotate-half + SDPA, repeated keys (transformers)", repeated, compiled=False, every=2),
        case.torch_way("rotate-half + SDPA, enable_gqa", shared, compiled=True, every=1),
    ]
    # its backward compiles for 10 s and is never the fastest.
    return ways if case.trains else [*ways, case.torch_way("softmax(q k^T) v", softmax, compiled=True, every=2)]


@pytest.mark.parametrize("dtype", ROTARY_DTYPES)
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
def bench_attention(benchmark: BenchmarkFixture, best_weights: Weights, dtype: str, trains: bool) -> None:
    case = Case(best_weights, GQA_1K, dtype, trains)
    ours, plain = case.our_way("attention", "clex"), case.our_way("attention, plain RoPE", "plain")
    floor = case.way("floor: SDPA of q and k rotated beforehand", "none", formulations.bare_sdpa)
    rivals = rivals_of(case)
    result = compare(benchmark, ours, [*rivals, plain, floor], rounds=ROUNDS)
    record(
        benchmark,
        section="attention",
        row="attention, forward, backward and dfreq" if trains else "attention, forward",
        case=case.name,
        memory="fresh outputs from torch's default allocator for all",
        weights=best_weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=ours.name,
        rivals=[way.name for way in rivals],
        floor=floor.name,
        overhead=(ours.name, plain.name),
        notes=[str(case.shape), CHECKED, *([f"positions sampled up to {MAX_FACTOR * case.shape.L}"] * trains)],
    )


def record_engines(benchmark: BenchmarkFixture, case: Case, chosen: str, other: str, result: Comparison) -> None:
    record(
        benchmark,
        section="attention",
        row="engines on the GPU, forward, backward and dfreq" if case.trains else "engines on the GPU, forward",
        case=case.name,
        memory="fresh outputs from torch's caching allocator for both",
        weights="synthetic or learned, as above",
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=chosen,
        rivals=[other],
        goals=[Goal("auto's engine over the other one", result.ratio(chosen, other), "at most", 1.0)],
        notes=[str(case.shape), CHECKED, torch.cuda.get_device_name(), "the first way named is auto's choice"],
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", LAYER_LENGTHS)
@pytest.mark.parametrize("dtype", ROTARY_DTYPES)
@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
def bench_engines(benchmark: BenchmarkFixture, best_weights: Weights, length: int, dtype: str, trains: bool) -> None:
    """What backend="auto" takes against the other engine, so that its rule can be judged."""
    shape = RotaryShape(f"{length} tokens", B=1, L=length, H=GQA_1K.H, G=GQA_1K.G, D=GQA_1K.D)
    case = Case(best_weights, shape, dtype, trains, device="cuda")
    chosen = choose_engine(check_operands(*case.operands[:3], None, None), Rule(1.0, is_causal=True), refusal=None)
    other = "sdpa" if chosen == "triton" else "triton"
    ways = [case.our_way(name, "clex", backend=name) for name in (chosen, other)]
    result = compare(benchmark, ways[0], ways[1:], rounds=ROUNDS)
    record_engines(benchmark, case, chosen, other, result)
