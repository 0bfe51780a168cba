"""Decoding over a cache split over 2 and 4 processes, against decode_attention over the whole cache in one."""

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from attention_calls import expected
from processes import run_processes
from ropes import CONTINUOUS, make_rope, seeded
from tolerance import assert_within_rule
from torch import Tensor
from torch import distributed as dist

from clex_kernels import append_kv, decode_attention
from clex_kernels.distributed import split_append_kv, split_decode_attention
from clex_kernels.tables import RotaryTable, RotaryTableStack

# slots on all ranks: 64 on each of two, 32 on each of four.
SLOTS, TRAIN_LENGTH = 128, 16
WORLDS = [2, 4]


class Step(NamedTuple):
    """A step: kv_end and the like by sequence, a stack of T tables if `tables` says so, and decode's options."""

    kv_end: tuple[int, ...] | int = (37, 128, 70)
    queries: int = 1
    kv_start: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})
    tables: int | None = None
    h: int = 4
    g: int = 2
    r: int = 8


STEPS = {
    "one token": Step(),
    "one kv_end for all": Step(kv_end=90),
    "borders": Step(kv_end=(64, 65, 32)),
    "past a border by one": Step(kv_end=(33, 97, 63)),
    "five tokens over a border": Step(kv_end=(66, 35, 99), queries=5),
    "sixteen tokens": Step(kv_end=(64, 80, 40), queries=16),
    "more tokens than keys": Step(kv_end=(3, 0, 40), queries=7),
    "nothing cached": Step(kv_end=(0, 0, 0)),
    "no token": Step(queries=0),
    "left padding over whole ranks": Step(kv_start=(5, 65, 69), queries=3),
    "left padding, nothing left": Step(kv_start=(37, 128, 0)),
    "padding within the new tokens": Step(kv_start=(35, 126, 0), queries=4),
    "window": Step(options={"window": 3}, queries=3),
    "window over a border": Step(kv_end=(66, 97, 35), options={"window": 7}, queries=4),
    "window shorter than the new tokens": Step(kv_end=(66, 35, 99), options={"window": 2}, queries=5),
    "window over ranks": Step(options={"window": 50}, kv_start=(0, 100, 0)),
    "softcap, scale": Step(options={"softcap": 1.5, "scale": 0.4}, queries=2),
    "one key head": Step(h=6, g=1),
    "amplitude, partial rotary": Step(settings={"amplitude": 1.3}, r=5, queries=2),
    "t by length": Step(kv_end=(16, 17, 128), tables=8, queries=2),
    "t by length after padding": Step(kv_start=(5, 64, 55), tables=8),
    "t by given lengths": Step(lengths=(100, 16, 33), tables=8, queries=3),
    "log-n": Step(settings={"log_scale": True}, tables=8, kv_start=(3, 60, 0)),
    "log-n clamped, by lengths": Step(settings={"log_scale": "clamped"}, lengths=(5, 900, 70)),
}
LOW_PRECISION = {
    f"{name}, {dtype}": (STEPS[name], dtype)
    for name, dtype in (("amplitude, partial rotary", torch.float32), ("t by length after padding", torch.bfloat16))
}
# sequences that grow over borders of ranks and of t: the new tokens of each step, padding where a step has more.
GROWING = [(30, 15, 60), (1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 3, 4), (1, 1, 1), (5, 5, 5), (1, 1, 0), (16, 16, 16)]


class Given(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    table: RotaryTable | RotaryTableStack
    kv_end: int | Tensor
    options: dict[str, Any]


def make(step: Step, dtype: torch.dtype = torch.float64, table_dtype: torch.dtype | None = None) -> Given:
    """q and whole caches, NaN in dead slots."""
    generator = seeded(0)
    b, d = 3, 16
    sizes = ((step.queries, step.h), (SLOTS, step.g), (SLOTS, step.g))
    q, k, v = (torch.randn(b, *size, d, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    ends = torch.tensor([step.kv_end] * b if isinstance(step.kv_end, int) else step.kv_end)
    starts = torch.zeros(b) if step.kv_start is None else torch.tensor(step.kv_start)
    slot = torch.arange(SLOTS)
    dead = (slot < starts[:, None]) | (slot >= ends[:, None])
    for x in (k, v):
        x.masked_fill_(dead[..., None, None], math.nan)
    settings = {"length": SLOTS, "train_length": TRAIN_LENGTH, **step.settings}
    settings["dtype"] = torch.promote_types(dtype, torch.float32) if table_dtype is None else table_dtype
    freq = 10 ** torch.linspace(0, -3, step.r, dtype=torch.float64)
    if step.tables is None:
        table = RotaryTable.from_frequencies(freq, **settings)
    else:
        times = torch.arange(1.0, step.tables + 1).double()
        table = RotaryTableStack.from_frequencies(freq / times[:, None] ** 0.3, times, **settings)
    options = {name: torch.tensor(x) for name in ("kv_start", "lengths") if (x := getattr(step, name)) is not None}
    kv_end = step.kv_end if isinstance(step.kv_end, int) else torch.tensor(step.kv_end, dtype=torch.int32)
    return Given(q, k, v, table, kv_end, {**options, **step.options})


def part(x: Tensor, rank: int, world: int) -> Tensor:
    """This rank's slots, in memory of their own."""
    return x.chunk(world, dim=1)[rank].clone()


def split(step: Step, rank: int, world: int, dtype: torch.dtype = torch.float64, group: Any = None) -> list[Tensor]:
    q, k, v, table, kv_end, options = make(step, dtype)
    k, v = (part(x, rank, world) for x in (k, v))
    return list(split_decode_attention(q, k, v, table, kv_end, group, return_lse=True, **options))


def grow(append: Any, decode: Any, k_cache: Tensor, v_cache: Tensor) -> list[Tensor]:
    """outs of steps one after another, at the t of each, then the caches."""
    generator = seeded(1)
    rope = make_rope().double()
    stack, outs = rope.stack(SLOTS), []
    ends = torch.zeros(3, dtype=torch.int64)
    for new in GROWING:
        tokens = max(new)
        ends += torch.tensor(new)
        k, v = (torch.randn(3, tokens, 2, 16, generator=generator, dtype=torch.float64) for _ in range(2))
        q = torch.randn(3, min(tokens, 16), 4, 16, generator=generator, dtype=torch.float64)
        append(k, v, k_cache, v_cache, ends)
        outs.append(decode(q, k_cache, v_cache, stack, ends))
    return [*outs, k_cache, v_cache]


def empty_caches(slots: int) -> list[Tensor]:
    return [torch.full((3, slots, 2, 16), math.nan, dtype=torch.float64) for _ in range(2)]


def continuous(decode: Any, k: Tensor, v: Tensor) -> Tensor:
    """A t of its own for each sequence, from its whole length."""
    ends = torch.tensor([40, 101, 128])
    q = torch.randn(3, 2, 4, 16, generator=seeded(2), dtype=torch.float64)
    return decode(q, k, v, make_rope(CONTINUOUS).double().at(ends), ends)


def errors(rank: int, world: int) -> dict[str, str]:
    q, k, v, table, kv_end, _ = make(STEPS["one token"])
    sampled = RotaryTable.from_frequencies(table.freq, positions=torch.arange(128), dtype=torch.float64)
    short = RotaryTable.from_frequencies(table.freq, 64, dtype=torch.float64)
    k, v = (part(x, rank, world) for x in (k, v))
    new = torch.zeros(3, 2, 2, 16, dtype=torch.float64)
    wrong = {
        "kv_end": lambda: split_decode_attention(q, k, v, table, 129),
        "kv_ends": lambda: split_decode_attention(q, k, v, table, torch.tensor([1, 129, 1])),
        "kv_start": lambda: split_decode_attention(q, k, v, table, kv_end, kv_start=torch.tensor([38, 0, 0])),
        "lengths": lambda: split_decode_attention(q, k, v, table, kv_end, lengths=torch.tensor([1, 2])),
        "tokens": lambda: split_decode_attention(q.expand(-1, 17, -1, -1), k, v, table, kv_end),
        "window": lambda: split_decode_attention(q, k, v, table, kv_end, window=0),
        "softcap": lambda: split_decode_attention(q, k, v, table, kv_end, softcap=-1.0),
        "heads": lambda: split_decode_attention(q[:, :, :3], k, v, table, kv_end),
        "sampled": lambda: split_decode_attention(q, k, v, sampled, kv_end),
        "short": lambda: split_decode_attention(q, k, v, short, kv_end),
        "kind": lambda: split_decode_attention(q, k, v, table.freq, kv_end),
        "group": lambda: split_decode_attention(q, k, v, table, kv_end, 0),
        "append": lambda: split_append_kv(new, new, k, v, 129),
        "append v": lambda: split_append_kv(new, new[:, :1], k, v, 4),
        "append heads": lambda: split_append_kv(new[:, :, :1], new[:, :, :1], k, v, 4),
        "append's group": lambda: split_append_kv(new, new, k, v, 4, 0),
    }
    found = {}
    for name, function in wrong.items():
        try:
            function()
            found[name] = "nothing was raised"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def with_gradients(rank: int, world: int) -> dict[str, Any]:
    """Whether out is dense, what backward() says to out and lse, and what is warned of."""
    q, k, v, table, kv_end, _ = make(STEPS["five tokens over a border"])
    k, v = (part(x, rank, world) for x in (k, v))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = split_decode_attention(q.requires_grad_(), k, v, table, kv_end, return_lse=True)
        said = []
        for x in results:
            try:
                x[x.isfinite()].sum().backward(retain_graph=True)
                said.append("nothing was raised")
            except RuntimeError as error:
                said.append(str(error))
    return {"dense": results[0].is_contiguous(), "said": said, "warned": [str(warning.message) for warning in warned]}


def worker(rank: int, world: int) -> dict[str, Any]:
    _, k, v, *_ = make(Step(kv_end=(40, 101, 128)))
    # groups are made by all ranks alike.
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    return {
        "steps": {name: split(step, rank, world) for name, step in STEPS.items()},
        "low": {name: split(step, rank, world, dtype) for name, (step, dtype) in LOW_PRECISION.items()},
        "of a group": split(STEPS["t by length"], rank % 2, 2, group=pairs[rank // 2]),
        "growing": grow(split_append_kv, split_decode_attention, *empty_caches(SLOTS // world)),
        "continuous": continuous(split_decode_attention, part(k, rank, world), part(v, rank, world)),
        "errors": errors(rank, world),
        "gradients": with_gradients(rank, world),
    }


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(worker, request.param, tmp_path_factory.mktemp("split"))


def assert_same(actual: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-10)


def whole(step: Step) -> tuple[Tensor, Tensor]:
    q, k, v, table, kv_end, options = make(step)
    return decode_attention(q, k, v, table, kv_end, return_lse=True, **options)


@pytest.mark.parametrize("name", STEPS)
def test_a_split_cache_gives_what_a_whole_one_gives(results: list[dict[str, Any]], name: str) -> None:
    for actual, truth in zip(results[0]["steps"][name], whole(STEPS[name]), strict=True):
        assert_same(actual, truth)
    for result in results[1:]:
        assert all(map(torch.equal, result["steps"][name], results[0]["steps"][name]))


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_split_cache_keeps_the_tolerance_rule(results: list[dict[str, Any]], name: str) -> None:
    step, dtype = LOW_PRECISION[name]
    judged = []
    for wide in (torch.float64, dtype):
        q, k, v, _, kv_end, options = make(step, dtype)
        table = make(step, dtype, torch.promote_types(wide, torch.float32)).table
        q, k, v = (x.nan_to_num().to(wide) for x in (q, k, v))
        judged.append(expected(q, k, v, table, is_causal=True, kv_end=kv_end.long(), return_lse=True, **options))
    for actual, truth, in_dtype in zip(results[0]["low"][name], *judged, strict=True):
        assert_within_rule(actual, in_dtype.to(actual.dtype), truth)


def test_a_cache_split_over_a_part_of_the_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        for actual, truth in zip(result["of a group"], whole(STEPS["t by length"]), strict=True):
            assert_same(actual, truth)


def test_sequences_grow_over_borders_of_ranks_and_of_t(results: list[dict[str, Any]]) -> None:
    *outs, k_cache, v_cache = grow(append_kv, decode_attention, *empty_caches(SLOTS))
    for result in results:
        for actual, truth in zip(result["growing"][:-2], outs, strict=True):
            assert_same(actual, truth)
    # tokens are written where they belong and nowhere else: all other slots hold the NaN they held before.
    for place, cache in ((-2, k_cache), (-1, v_cache)):
        joined = torch.cat([result["growing"][place] for result in results], dim=1)
        assert joined.isnan().any()
        torch.testing.assert_close(joined, cache, rtol=0, atol=0, equal_nan=True)


def test_the_borders_that_sequences_grow_over() -> None:
    ends = torch.tensor(GROWING).cumsum(0)
    for b, border in ((0, 32), (2, 64)):
        assert ((ends[:-1, b] <= border) & (ends[1:, b] > border)).any()
    # a train length of 32 tokens, so t changes at 32 and 64, and for the second sequence too.
    assert all(len({math.ceil(end / 32) for end in column}) > 1 for column in ends.T.tolist())


def test_continuous_t_from_the_whole_length(results: list[dict[str, Any]]) -> None:
    _, k, v, *_ = make(Step(kv_end=(40, 101, 128)))
    for result in results:
        assert_same(result["continuous"], continuous(decode_attention, k, v))


def test_gradients_are_refused_by_name(results: list[dict[str, Any]]) -> None:
    for result in results:
        found = result["gradients"]
        assert found["dense"]
        assert found["said"] == ["decode_attention: has no gradients, which attention() has"] * 2
        assert found["warned"] == []


MESSAGES = {
    "kv_end": "ValueError: kv_end: expected within [0, n S] = [0, 128], got 129",
    "kv_ends": "ValueError: kv_end: expected numbers within [0, S] = [0, 128], got 1 to 129",
    "kv_start": "ValueError: kv_start: expected at most kv_end = [37, 128, 70], got [38, 0, 0]",
    "lengths": "ValueError: lengths: expected shape [B=3] on cpu, got [2]",
    "tokens": "ValueError: q: expected L of at most 16 new tokens, got 17",
    "window": "ValueError: window: expected at least 1 token",
    "softcap": "ValueError: softcap: expected a finite number > 0",
    "heads": "ValueError: q: expected H to be a multiple of G=2, got H=3",
    "sampled": "ValueError: table: expected positions 0, 1, 2, ..., where cached keys stand, got sampled",
    "short": "ValueError: table: expected positions for all keys up to kv_end = 128, got one of 64 positions",
    "kind": "TypeError: table: expected a RotaryTable or RotaryTableStack, got Tensor",
    "group": "TypeError: group: expected a ProcessGroup, a DeviceMesh or None, got int",
    "append": "ValueError: kv_end: expected within [0, n S] = [0, 128], got 129",
    "append v": "ValueError: v: expected k's [3, 2, 2, 16]",
    "append heads": "ValueError: k: expected G=2 heads as k_cache's, got 1",
    "append's group": "TypeError: group: expected a ProcessGroup, a DeviceMesh or None, got int",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_wrong_arguments_are_named(results: list[dict[str, Any]], name: str) -> None:
    assert results[1]["errors"][name].startswith(MESSAGES[name])
