"""From hidden states to rotated q and k, and v: forward, forward and backward, and which backend is faster on a GPU.

The floor is the product alone. At few tokens it reads the weights, and what a rotary after it adds are calls; at many
it multiplies, and what a rotary adds are passes over q and k.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import Comparison, Goal, compare, record
from benchmarks.qkv_case import FLOOR, FROZEN, LENGTH, OURS, PLAIN, ROWS, THREE, Case, Projection
from benchmarks.shapes import LLAMA_3_8B, MAX_FACTOR, PROJECTIONS, ProjectionShape
from benchmarks.summary import size
from clex_kernels.qkv_rotary import choose_backend

# in an order in which every weight is drawn once.
CASES = [
    (shape, dtype, tokens)
    for dtype, shapes in (("bf16", PROJECTIONS), ("fp32", (LLAMA_3_8B,)))
    for shape in shapes
    for tokens in ((1, 16, 256, 2048, 8192) if (dtype, shape) == ("bf16", LLAMA_3_8B) else (1, 2048))
]
ROUNDS = {1: 25, 16: 25, 256: 9, 2048: 5, 8192: 2}
# from here on a call takes so long that all but ours and the floor run in every second round.
MANY_TOKENS = 2048
# by tokens: what the goal is over, and the most time.
GOALS = {
    1: ("time over three bare linears", THREE, 1.0),
    2048: ("time over the bare linear", FLOOR, 1.03),
}
TRAINING_TOKENS, TRAINING_ROUNDS = 512, 5
# of a bf16 gradient to the frequencies: what rounding q, k and their gradients costs, times positions up to 16 M.
WRONG = 0.2
GPU_TOKENS, GPU_ROUNDS = (1, 4, 16, 64, 256, 1024, 2048, 8192), 15
ERROR_UNIT = "largest error over largest exact value of that tensor"
MEMORY = "fresh outputs from torch's default allocator for all"
COLD = "the weights do not change, but other memory is read before every call, so that they are cold"
CHECKED = f"checked at up to {ROWS} tokens per input set, other ones in each"

Projections = Callable[[ProjectionShape, str], Projection]


@pytest.fixture(scope="module")
def projections() -> Projections:
    """The last weights drawn are kept: several cases in a row have the same."""
    return functools.lru_cache(maxsize=1)(Projection)


def speed(case: Case, result: Comparison) -> str:
    seconds = result.seconds[OURS]
    return (
        f"{case.operations:.3g} floating point operations, {size(case.weight_bytes)} of weights (counted): "
        f"{case.operations / seconds / 1e9:.3g} GFLOP/s, {case.weight_bytes / seconds / 1e9:.3g} GB/s"
    )


def case_name(value: object) -> str:
    return value.name if isinstance(value, ProjectionShape) else str(value)


@pytest.mark.parametrize(("shape", "dtype", "tokens"), CASES, ids=case_name)
def bench_qkv_rotary(
    benchmark: BenchmarkFixture, projections: Projections, shape: ProjectionShape, dtype: str, tokens: int
) -> None:
    case = Case(projections(shape, dtype), tokens)
    every = 2 if tokens >= MANY_TOKENS else 1
    # compiling takes longer than the rounds at few tokens, and a call at most tokens takes a second.
    thorough = (shape, dtype) == (LLAMA_3_8B, "bf16") and tokens in GOALS
    rivals = case.rivals(every, count=4 if thorough else 3 if tokens <= MANY_TOKENS else 2)
    # one round says nothing about an overhead.
    plain = [case.ours(PLAIN, "plain", every=every)] if tokens <= MANY_TOKENS else []
    others = [*rivals, *plain, case.three_linears(every), case.linear()]
    result = compare(benchmark, case.ours(OURS), others, ROUNDS[tokens])
    goals = []
    if tokens in GOALS:
        what, bare, bound = GOALS[tokens]
        goals = [Goal(what, result.ratio(OURS, bare), "at most", bound)]
    record(
        benchmark,
        section="qkv",
        row="projection and rotary, forward",
        case=case.name,
        memory=MEMORY,
        weights=case.projection.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=OURS,
        rivals=[way.name for way in rivals],
        floor=FLOOR,
        overhead=(OURS, PLAIN) if plain else None,
        goals=goals,
        notes=[str(shape), speed(case, result), f"the last of {LENGTH:,} positions", COLD, CHECKED],
        curves={"tokens": tokens, "operations": case.operations, "bytes": case.weight_bytes, "three": THREE},
    )


def bench_qkv_rotary_training(benchmark: BenchmarkFixture, projections: Projections) -> None:
    """Every way builds its own cos and sin, from frequencies and sampled positions."""
    case = Case(projections(LLAMA_3_8B, "bf16"), TRAINING_TOKENS, trains=True)
    rivals = case.training_rivals(every=2)
    others = [*rivals, case.ours(FROZEN), case.linear()]
    result = compare(benchmark, case.ours(OURS, learns=True), others, TRAINING_ROUNDS, wrong=WRONG)
    record(
        benchmark,
        section="qkv",
        row="projection and rotary, forward, backward and dfreq",
        case=case.name,
        memory="fresh outputs and gradients from torch's default allocator for all",
        weights=case.projection.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=OURS,
        rivals=[way.name for way in rivals],
        floor=FLOOR,
        overhead=(OURS, FROZEN),
        notes=[
            str(case.shape),
            f"positions sampled up to {MAX_FACTOR * case.tokens:,}",
            f"{CHECKED}; the gradient put in is zero in all others, those to x, the weight and the frequencies are "
            "checked in full",
        ],
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", GPU_TOKENS)
@pytest.mark.parametrize("shape", PROJECTIONS, ids=case_name)
def bench_backends(benchmark: BenchmarkFixture, projections: Projections, shape: ProjectionShape, tokens: int) -> None:
    """What backend="auto" takes against the other one, so that its rule can be judged."""
    case = Case(projections(shape, "bf16"), tokens, device="cuda")
    chosen = choose_backend(case.x)
    other = "linear" if chosen == "triton" else "triton"
    ways = [case.ours(name, backend=name) for name in (chosen, other)]
    result = compare(benchmark, ways[0], [*ways[1:], case.linear()], GPU_ROUNDS)
    record(
        benchmark,
        section="qkv",
        row="backends on the GPU, forward",
        case=case.name,
        memory="fresh outputs from torch's caching allocator for all",
        weights=case.projection.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=chosen,
        rivals=[other],
        floor=FLOOR,
        goals=[Goal("auto's backend over the other one", result.ratio(chosen, other), "at most", 1.0)],
        notes=[str(shape), COLD, CHECKED, torch.cuda.get_device_name(), "ours is auto's choice"],
    )
