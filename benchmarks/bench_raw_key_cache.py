"""Small transformers models whose own RoPE is scaled, past the length of training: a decode step over raw keys.

Against transformers as it is, whose cache is given keys that fit this step's frequencies, which a live one does not
have. And what it takes to compute a cache anew where LongRoPE's frequencies change.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.end_to_end_case import DTYPES, SIZES, DecodeShape
from benchmarks.measure import Goal, compare, record
from benchmarks.raw_key_cache_case import (
    AFTER,
    KINDS,
    LONGROPE,
    ONE_PASS,
    OURS,
    RECOMPUTE,
    STOCK,
    RawKeyCase,
    SwitchCase,
)

DECODE_ROUNDS, SWITCH_ROUNDS = 15, 3
# the slow ways run in one of so many rounds.
SLOW = 3
# of bf16 logits; those of other frequencies are off by more than 1.
WRONG = 0.2
LONG = 8 << 10
SHAPES = [DecodeShape(dtype, 1, length) for dtype in DTYPES for length in (2 << 10, LONG)]
# most time over transformers with sdpa, over a long cache.
OVER_STOCK = 0.8
ERROR_UNIT = "largest error over largest exact value"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def bench_decode_step(benchmark: BenchmarkFixture, kind: str, shape: DecodeShape) -> None:
    case = RawKeyCase(kind, shape)
    stock, *others = case.rivals()
    rivals = [stock.way(), *(step.way(SLOW) for step in others)]
    result = compare(benchmark, case.ours().way(), rivals, DECODE_ROUNDS, WRONG)
    goal = Goal("time over transformers (sdpa)", result.ratio(OURS, STOCK), "at most", OVER_STOCK)
    record(
        benchmark,
        section="raw key cache",
        row="decode step of a small model on its own RoPE",
        case=f"{kind}, {shape}",
        memory="dynamic caches unless a way says otherwise: torch.cat makes transformers' anew in every step, raw keys'"
        " grow in place",
        weights="random",
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=OURS,
        rivals=[way.name for way in rivals],
        goals=[goal] if shape.S >= LONG else [],
        notes=[str(SIZES), f"trained length {SIZES.train_length:,}", "two caches of random keys and values alternate"],
        curves={"stock": STOCK},
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_switch(benchmark: BenchmarkFixture, dtype: str) -> None:
    case = SwitchCase(dtype)
    others = [case.one_pass().way(), case.after().way()]
    result = compare(benchmark, case.recompute().way(), others, SWITCH_ROUNDS, WRONG)
    record(
        benchmark,
        section="raw key cache",
        row="step at the switch of a small model on its own RoPE",
        case=f"{LONGROPE}, {dtype}, batch 1, {case.cached:,} cached tokens",
        memory="torch's default allocator for all",
        weights="random",
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=RECOMPUTE,
        rivals=[ONE_PASS],
        notes=[str(SIZES), "two texts of random tokens alternate"],
        curves={"after": AFTER},
    )
