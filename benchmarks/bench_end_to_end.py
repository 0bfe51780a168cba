"""A small Llama of transformers, whole: what CLEX adds to a training step and to a decode step.

Against transformers with plain RoPE, and against the same patched model with frozen frequencies. In training, CLEX is
a t and positions drawn in every step, and gradients to the ODE; in decoding, t by length.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.end_to_end_case import (
    CLEX,
    DTYPES,
    FROZEN,
    LEARNING_RATE,
    SIZES,
    STATIC,
    STOCK,
    DecodeCase,
    DecodeShape,
    TrainingCase,
)
from benchmarks.measure import Comparison, Goal, compare, record

TRAINING_ROUNDS = 15
DECODE_ROUNDS = 31
# the slow ways run in one of so many rounds.
SLOW = 3
# of bf16 logits; those of other frequencies are off by more than 1.
WRONG = 0.1
# tokens of a training step.
LENGTH = 512
LONG = 8 << 10
LENGTHS = (512, 2 << 10, LONG)
SHAPES = [DecodeShape(dtype, 1, length) for dtype in DTYPES for length in LENGTHS]
SHAPES += [DecodeShape(dtype, 4, 2 << 10) for dtype in DTYPES]
# most time over transformers with plain RoPE, and over this package with frozen frequencies.
OVER_STOCK, OVER_STOCK_LONG, OVER_FROZEN = 0.95, 0.7, 1.03
ERROR_UNIT = "largest error over largest exact value"


def goals_of(result: Comparison, over_stock: float) -> list[Goal]:
    return [
        Goal("time over transformers with plain RoPE", result.ratio(CLEX, STOCK), "at most", over_stock),
        Goal("time over this package with frozen frequencies", result.ratio(CLEX, FROZEN), "at most", OVER_FROZEN),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def bench_training_step(benchmark: BenchmarkFixture, dtype: str) -> None:
    case = TrainingCase(dtype, LENGTH)
    stock, *slow = case.rivals()
    others = [stock.way(), *(step.way(SLOW) for step in slow), case.frozen().way()]
    result = compare(benchmark, case.clex().way(), others, TRAINING_ROUNDS, WRONG)
    record(
        benchmark,
        section="whole model",
        row="training step of a small Llama",
        case=f"{dtype}{' autocast' * (dtype == 'bf16')}, batch 1, {case.length:,} tokens",
        memory="torch's default allocator for all",
        weights=case.weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=CLEX,
        rivals=[step.name for step in (stock, *slow)],
        overhead=(CLEX, FROZEN),
        goals=goals_of(result, OVER_STOCK),
        notes=[str(SIZES), f"forward, backward and AdamW (lr {LEARNING_RATE:g})"],
        curves={"stock": STOCK},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_decode_step(benchmark: BenchmarkFixture, shape: DecodeShape) -> None:
    case = DecodeCase(shape)
    rivals = [step.way() for step in case.rivals()]
    others = [*rivals, case.frozen().way(), case.clex(is_static=True).way()]
    result = compare(benchmark, case.clex().way(), others, DECODE_ROUNDS, WRONG)
    record(
        benchmark,
        section="whole model",
        row="decode step of a small Llama",
        case=str(shape),
        memory="dynamic caches unless a way says otherwise: torch.cat makes transformers' anew in every step, raw keys'"
        " grow in place",
        weights=case.weights.kind,
        error_unit=ERROR_UNIT,
        comparison=result,
        ours=CLEX,
        rivals=[way.name for way in rivals],
        overhead=(CLEX, FROZEN),
        goals=goals_of(result, OVER_STOCK_LONG if shape.S >= LONG else OVER_STOCK),
        notes=[str(SIZES), f"t = {case.t:g}", "two caches of random keys and values alternate"],
        curves={"stock": STOCK, "static": [CLEX + STATIC, STOCK + STATIC]},
    )
