"""One decode step over a cache of raw keys, against attention over a cache whose keys were rotated beforehand.

The rivals' rotated keys and queries cost them nothing here. What re-rotating a cache at each new t takes, and what it
does to the results, is the last case.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact
from benchmarks.decode_case import OURS, SETS, TIMES, UNROTATED, Case, on_threads
from benchmarks.measure import Comparison, Goal, Way, compare, errors_over_largest, record
from benchmarks.rotated_cache import RAW, TURNED, RotatedCache, measure_drift
from benchmarks.shapes import (
    CONFIG,
    DECODE_32K,
    DECODE_BATCHES,
    DECODE_FP32,
    DECODE_LENGTHS,
    DECODE_MIXED,
    ROTARY_DTYPES,
    DecodeShape,
)
from benchmarks.summary import duration, number
from benchmarks.weights import synthetic_weights

SHAPES = (*DECODE_LENGTHS, DECODE_FP32, *DECODE_BATCHES)
# fewer rounds of what takes longer: the largest cases read 1 GB in every call.
ROUNDS = {4 << 10: 25, 32 << 10: 15, 128 << 10: 7, 256 << 10: 5}
# times faster than the rival.
RIVAL_GOALS = {DECODE_32K: 2.5, DECODE_FP32: 1.5}
THREADS = (1, 2)
ERROR_UNIT = "largest error over largest exact value"
MEMORY = "fresh outputs from torch's default allocator for all"
COLD = "other memory is read before every call, so that the cache is cold"

Pool = Callable[[torch.dtype], Tensor]


@pytest.fixture(scope="module")
def pool() -> Pool:
    """By dtype, the numbers [SETS, n] that all caches are made of: drawing them for every case would take longest."""

    @functools.cache
    def draw(dtype: torch.dtype) -> Tensor:
        shapes = [shape for shape in (*SHAPES, DECODE_MIXED) if ROTARY_DTYPES[shape.dtype] == dtype]
        count = max(torch.Size(shape.cache).numel() for shape in shapes)
        return torch.empty(SETS, count, dtype=dtype).normal_(generator=torch.Generator().manual_seed(10))

    return draw


def make_case(shape: DecodeShape, pool: Pool) -> Case:
    return Case(shape, pool(ROTARY_DTYPES[shape.dtype]), synthetic_weights(CONFIG))


def rounds_of(case: Case) -> int:
    return next(rounds for tokens, rounds in ROUNDS.items() if case.tokens <= tokens)


def traffic(case: Case, seconds: float) -> str:
    per_key, speed = case.bytes_moved / case.tokens, case.bytes_moved / seconds / 1e9
    return f"{per_key:,.0f} bytes per key, tables included (counted): {speed:.1f} GB/s"


def bytes_goal(case: Case) -> Goal:
    found = math.nan if case.allocated is None else case.allocated
    return Goal("most bytes held beside the output", found, "at most", 0, " B", "counted")


def record_step(
    benchmark: BenchmarkFixture,
    case: Case,
    row: str,
    result: Comparison,
    rivals: Sequence[Way] = (),
    floors: Sequence[Way] = (),
    goals: Sequence[Goal] = (),
) -> None:
    record(
        benchmark,
        section="decode",
        row=row,
        case=case.shape.name,
        memory=MEMORY,
        weights=case.weights,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=OURS,
        rivals=[way.name for way in rivals],
        floor=result.fastest([way.name for way in floors]) if floors else None,
        overhead=(OURS, UNROTATED) if rivals else None,
        goals=goals,
        notes=[str(case.shape), case.factors, traffic(case, result.seconds[OURS]), COLD],
        curves={"tokens": case.tokens, "bytes": case.bytes_moved},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def bench_step(benchmark: BenchmarkFixture, pool: Pool, shape: DecodeShape) -> None:
    case = make_case(shape, pool)
    rivals, floors = case.rivals(), case.floors()
    slow = case.rotating_ways() if shape == DECODE_32K else []
    others = [*rivals, *slow, case.unrotated(), *floors]
    result = compare(benchmark, case.ours(), others, rounds_of(case), first=case.follow)
    goals = []
    if shape in RIVAL_GOALS:
        rival = result.fastest([way.name for way in rivals])
        goals = [Goal("faster than the rival", result.ratio(rival, OURS), "at least", RIVAL_GOALS[shape])]
    if shape == DECODE_32K:
        floor = result.fastest([way.name for way in floors])
        goals += [
            Goal("time over reading K and V once", result.ratio(OURS, floor), "at most", 1.5),
            Goal("time over the same kernel without rotation", result.ratio(OURS, UNROTATED), "at most", 1.25),
            bytes_goal(case),
        ]
    record_step(benchmark, case, "decode step", result, rivals, floors, goals)


def bench_mixed_lengths(benchmark: BenchmarkFixture, pool: Pool) -> None:
    """A t per sequence, chosen by its length from a stack of tables."""
    case = make_case(DECODE_MIXED, pool)
    rivals = case.mixed_rivals()
    result = compare(benchmark, case.ours(), [*rivals, case.unrotated()], rounds_of(case), first=case.follow)
    record_step(benchmark, case, "decode step, mixed lengths", result, rivals, goals=[bytes_goal(case)])


def bench_token_major(benchmark: BenchmarkFixture, pool: Pool) -> None:
    case = make_case(DECODE_32K, pool)
    other = case.token_major()
    result = compare(benchmark, case.ours(), [other], rounds_of(case))
    goals = [Goal("token-major cache over head-major", result.ratio(other.name, OURS), "at most", 1.4)]
    record_step(benchmark, case, "decode step, token-major", result, goals=goals)


def bench_threads(benchmark: BenchmarkFixture, pool: Pool) -> None:
    """One thread and two, beside what reading the same bytes gains."""
    before = torch.get_num_threads()
    if before < max(THREADS):
        pytest.skip("needs two threads")
    case = make_case(DECODE_32K, pool)
    one, two = THREADS
    alone = on_threads(case.ours(), one, f"{OURS}, 1 thread")
    floors = {
        n: [on_threads(way, n, f"{way.name}, {n} thread{'s' * (n > 1)}") for way in case.floors()] for n in THREADS
    }
    try:
        ours = on_threads(case.ours(), two, OURS)
        result = compare(benchmark, ours, [alone, *floors[one], *floors[two]], rounds_of(case))
    finally:
        torch.set_num_threads(before)
    floor = {n: result.fastest([way.name for way in ways]) for n, ways in floors.items()}
    goals = [Goal("two threads over one", result.ratio(alone.name, OURS), "at least", 1.6)]
    record_step(benchmark, case, "decode step, two threads", result, floors=floors[two], goals=goals)
    notes = [f"reading K and V once gains {number(result.ratio(floor[one], floor[two]), 'x')} from the second thread"]
    benchmark.extra_info["notes"] += notes


def bench_re_rotation(benchmark: BenchmarkFixture, pool: Pool) -> None:
    """What keeping a rotated cache up to date takes, and what it and raw keys do to the results."""
    case = make_case(DECODE_32K, pool)
    turn = turn_cache(case)
    result = compare(benchmark, case.ours(), [case.unrotated(), turn], rounds_of(case))
    record_step(benchmark, case, "decode step beside re-rotation", result)
    whole, more = result.seconds[turn.name], result.seconds[OURS] - result.seconds[UNROTATED]
    drift = measure_drift()
    benchmark.extra_info["curves"]["drift"] = asdict(drift)
    benchmark.extra_info["notes"] += [
        f"t changes once in {CONFIG.train_length:,} tokens: re-rotating costs {duration(whole / CONFIG.train_length)} "
        f"a token, and one token waits {duration(whole)}; rotating on load costs {duration(max(more, 0.0))} a token",
        f"after {len(drift.changes)} changes of t, outputs over a re-rotated bf16 cache err by "
        f"{drift.errors[TURNED][-1]:.1e}, over raw keys by {drift.errors[RAW][-1]:.1e}",
    ]


def turn_cache(case: Case) -> Way:
    """All keys from t = 16 to t = 9, in place; checked at some of them."""
    drawn, (before, after) = case.sets[0], (case.freqs[t - 1] for t in TIMES)
    cache = RotatedCache(tuple(drawn.k.shape), drawn.k.dtype, before)
    slots = torch.arange(0, case.shape.S, 997)
    true = exact.rotate(drawn.k[:, slots], *exact.cos_sin(slots, after))

    def prepare(turn: int) -> None:
        cache.keys.copy_(drawn.rotated_k)
        cache.freq, cache.length = before, case.shape.S
        case.load(0)

    def run() -> Tensor:
        cache.change(after)
        return cache.keys

    def errors(turn: int, keys: Tensor) -> dict[str, float]:
        return errors_over_largest({"keys": keys[:, slots]}, {"keys": true})

    return Way("re-rotating all keys to another t, bf16, in place", run, prepare, errors)
