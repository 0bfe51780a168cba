"""Calls of what rotates and attends: apply_rotary, qkv_rotary, attention, decode_attention, append_kv, merging."""

from typing import Any

import torch
from torch import Tensor

import clex_kernels
from clex_kernels import RotaryTable, RotaryTableStack

from . import truths
from .gradients import Derivative
from .judge import Case
from .truths import assert_within, is_plain, slack
from .values import FLOATS, Draw

Table = RotaryTable | RotaryTableStack


def sizes(draw: Draw) -> tuple[int, int, int, int]:
    """B, H, G, D; some of them 0."""
    groups = draw.choice((1, 1, 2, 3))
    batch = draw.choice((0, 1, 1, 2, 2, 3))
    return batch, groups * draw.choice((1, 2, 4)), groups, draw.choice((2, 4, 8, 12, 16, 34))


def make_table(
    draw: Draw, dtype: torch.dtype, dims: int, batch: int, length: int, sampled: bool = False, by_length: bool = False
) -> Table:
    """For heads of `dims` and positions 0 to `length` - 1; of each kind there is."""
    pairs = draw.randint(1, dims // 2)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    settings: dict[str, Any] = {"dtype": kind, "amplitude": draw.choice((1.0, 1.0, 0.5, 1.25))}
    if draw.maybe(0.3):
        settings |= {"train_length": draw.choice((2, 16, 100)), "log_scale": draw.choice((False, True, "clamped"))}
    stacked = draw.maybe(0.5) and batch > 0
    factors = draw.choice((1, batch, 4)) if stacked else 1
    freq = draw.normal(factors, pairs).abs() / draw.choice((1, 10, 1000))
    if sampled and length and draw.maybe(0.3):
        settings["positions"] = 50 * draw.normal(*(factors,) * stacked, length).abs()
    else:
        settings["length"] = length + draw.choice((0, 0, 1, 70))
    if not stacked:
        return RotaryTable.from_frequencies(draw.laid_out(freq[0], unit=False), **settings)
    if by_length and draw.maybe(0.5):
        settings |= {"train_length": draw.choice((2, 16, 100))}
    elif factors not in (1, batch) or settings.get("train_length") or draw.maybe(0.5):
        settings["index"] = draw.laid_out(torch.tensor([draw.randrange(factors) for _ in range(batch)]), unit=False)
    t = torch.arange(1, factors + 1).double()
    return RotaryTableStack.from_frequencies(draw.laid_out(freq, unit=False), t, **settings)


def heads(draw: Draw, dtype: torch.dtype, *shape: int, overlaps: bool = True) -> Tensor:
    return draw.laid_out(draw.normal(*shape, dtype=dtype), overlaps=overlaps)


def apply_rotary(draw: Draw) -> Case:
    batch, many, groups, dims = sizes(draw)
    length, dtype = draw.choice((0, 1, 1, 3, 17, 70)), draw.choice(FLOATS)
    mode = draw.choice(("new", "new", "inplace", "out"))
    offset = draw.choice((0, 0, 1, 63, 64))
    q = heads(draw, dtype, batch, length, many, dims, overlaps=mode != "inplace")
    k = heads(draw, dtype, batch, length, groups, dims, overlaps=mode != "inplace") if draw.maybe(0.7) else None
    given: dict[str, Any] = {"q": q, "k": k, "offset": offset}
    given["table"] = make_table(draw, dtype, dims, batch, length + offset, sampled=True)
    if draw.maybe(0.3):
        ids = [
            [draw.randrange(length + offset) - offset for _ in range(length)] for _ in range(draw.choice((1, batch)))
        ]
        ids = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), length)
        given["position_ids"] = draw.laid_out(ids, unit=False)
    written: tuple[str, ...] = ()
    if mode == "inplace":
        given["inplace"], written = True, ("q", "k")
    elif mode == "out":
        outs = [None if x is None else heads(draw, dtype, *x.shape, overlaps=False) for x in (q, k)]
        given["out"], written = tuple(outs), ("out",)

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        for name, x, y in zip("qk", (before["q"], before["k"]), result, strict=True):
            assert (x is None) == (y is None), f"{name}: None in or out only"
            if x is None:
                continue
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), f"{name}: of another kind"
            if is_plain(x, before["table"]):
                where = (before.get("position_ids"), before.get("offset", 0))
                assert_within(name, y, truths.rotary(x, before["table"], *where), slack(x.dtype))

    refusals = ("can't be rotated in place", "modified inplace|in-place operation", "inference tensor")
    derivative = Derivative(
        ("q", "k", "table"),
        truths.both_rotated,
        applies=lambda given: given.get("inplace", False) is False and given.get("out") is None,
    )
    return Case(clex_kernels.apply_rotary, given, check, written, refusals, derivative=derivative)


def qkv_rotary(draw: Draw) -> Case:
    batch, many, groups, dims = sizes(draw)
    length, channels, dtype = draw.choice((0, 1, 1, 3, 20, 40)), draw.choice((1, 3, 8, 33)), draw.choice(FLOATS)
    offset, rows = draw.choice((0, 0, 5)), (many * dims, groups * dims, groups * dims)
    given: dict[str, Any] = {
        "x": draw.laid_out(draw.normal(batch, length, channels, dtype=dtype), unit=False),
        "table": make_table(draw, dtype, dims, batch, length + offset, sampled=True),
        **{"num_heads": many, "num_kv_heads": groups, "offset": offset},
        "keys": draw.choice(("rotated", "raw", "both")),
    }
    parts = rows if draw.maybe(0.5) else (sum(rows),)
    for name, shape, share in (("weight", (channels,), 1.0), ("bias", (), 0.5)):
        if draw.maybe(share):
            some = tuple(draw.laid_out(draw.normal(n, *shape, dtype=dtype), unit=False, overlaps=False) for n in parts)
            given[name] = some if len(some) > 1 else some[0]

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        x, weight, bias = before["x"], before["weight"], before.get("bias")
        if not is_plain(x, weight, bias, before["table"]):
            return
        expected = truths.projected(before)
        for name, y, truth in zip(("q", "k", "v", "raw k"), result, expected, strict=False):
            assert y.dtype == x.dtype, f"{name}: {y.dtype}"
            assert_within(name, y, truth, slack(x.dtype))
        assert len(result) == len(expected), f"{len(result)} results"

    derivative = Derivative(("x", "weight", "bias", "table"), truths.projected)
    return Case(clex_kernels.qkv_rotary, given, check, derivative=derivative)


def attention(draw: Draw) -> Case:
    batch, many, groups, dims = sizes(draw)
    dtype = draw.choice(FLOATS)
    queries, slots = draw.choice((0, 1, 2, 7, 33)), draw.choice((0, 1, 5, 33, 40))
    given: dict[str, Any] = {"is_causal": draw.maybe(0.6), "return_lse": draw.maybe(0.4)}
    given |= {name: value for name, value in (("window", draw.choice((1, 3, 64))),) if draw.maybe(0.25)}
    given |= {name: value for name, value in (("softcap", 2.0), ("scale", 0.7)) if draw.maybe(0.2)}
    given["rotated"] = draw.choice(("none", "none", "q", "k", "qk"))
    rows: tuple[int, ...] = (batch,)
    sequences, last = batch, max(slots, queries)
    if draw.maybe(0.25):
        sequences = draw.choice((0, 1, 3))
        # as many keys as queries or more, as in a chunked prefill.
        lengths = [(n, n + draw.choice((0, 0, 4))) for n in (draw.choice((0, 1, 6, 20)) for _ in range(sequences))]
        bounds = [torch.tensor([0] + [pair[i] for pair in lengths]).cumsum(0).tolist() for i in range(2)]
        given |= {f"cu_seqlens_{name}": draw.integers(edges) for name, edges in zip("qk", bounds, strict=True)}
        queries, slots = (edges[-1] + draw.choice((0, 3)) for edges in bounds)
        rows, last = draw.choice(((), (1,))), 30
    else:
        if draw.maybe(0.4):
            ends = [draw.randint(min(slots, queries), slots) for _ in range(batch)]
            given["kv_end"] = draw.integers(ends)
            if draw.maybe(0.5):
                given["kv_start"] = draw.integers([draw.randint(0, end) for end in ends])
        if draw.maybe(0.3) or (queries > slots):
            given["q_offset"] = draw.choice((0, 3, draw.integers([draw.randrange(9) for _ in range(batch)])))
        if draw.maybe(0.2):
            given["k_offset"] = draw.choice((0, 3, draw.integers([draw.randrange(9) for _ in range(batch)])))
        last += 50
    if draw.maybe(0.2):
        given["lengths"] = draw.integers([draw.randrange(90) for _ in range(sequences)])
    given["q"] = heads(draw, dtype, *rows, queries, many, dims)
    given |= {name: heads(draw, dtype, *rows, slots, groups, dims) for name in "kv"}
    given["table"] = make_table(draw, dtype, dims, sequences, last, by_length=True)
    derivative = Derivative(("q", "k", "v", "table"), truths.attention)
    return Case(clex_kernels.attention, given, _check_attention, derivative=derivative)


def _check_attention(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
    with_lse = bool(before.get("return_lse", False))
    out, lse = result if with_lse else (result, None)
    _check_attended(before, out, lse, truths.attention)


def _check_attended(before: dict[str, Any], out: Tensor, lse: Tensor | None, truth: Any) -> None:
    q = before["q"]
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device), "out: of another kind than q"
    caches = [before.get(name) for name in ("k", "v", "k_cache", "v_cache")]
    if not is_plain(q, *caches, before["table"]):
        return
    true_out, true_lse = truth(before)
    assert_within("out", out, true_out, slack(q.dtype))
    if lse is not None:
        assert lse.dtype == torch.promote_types(q.dtype, torch.float32), f"lse: {lse.dtype}"
        assert_within("lse", lse, true_lse, slack(q.dtype))


def _paged(draw: Draw, batch: int, per_sequence: int) -> tuple[int, Tensor]:
    """How many pages there are, and which each sequence has; none is shared."""
    pages = batch * per_sequence + draw.choice((0, 2))
    order = list(range(pages))
    draw.shuffle(order)
    table = torch.tensor(order[: batch * per_sequence], dtype=draw.choice((torch.int32, torch.int64)))
    return pages, draw.laid_out(table.reshape(batch, per_sequence), unit=False, overlaps=False)


def _cache(draw: Draw, dtype: torch.dtype, batch: int, groups: int, dims: int, written: bool) -> dict[str, Any]:
    """k_cache, v_cache and block_table; slots past `capacity` are not there."""
    if draw.maybe(0.4):
        pages, block_table = _paged(draw, batch, draw.choice((1, 2, 3)))
        shape, given = (pages, 16, groups, dims), {"block_table": block_table}
    else:
        shape, given = (batch, draw.choice((0, 1, 5, 33, 130)), groups, dims), {}
    return given | {name: heads(draw, dtype, *shape, overlaps=not written) for name in ("k_cache", "v_cache")}


def _capacity(given: dict[str, Any]) -> int:
    slots = given["k_cache"].shape[1]
    return given["block_table"].shape[1] * slots if "block_table" in given else slots


def decode_attention(draw: Draw) -> Case:
    batch, many, groups, dims = sizes(draw)
    dtype, length = draw.choice(FLOATS), draw.choice((0, 1, 1, 2, 16))
    given = _cache(draw, dtype, batch, groups, dims, written=False)
    capacity = _capacity(given)
    ends = [draw.randint(0, capacity) for _ in range(batch)]
    given["kv_end"] = draw.integers(ends)
    if draw.maybe(0.2):
        ends = [capacity] * batch
        given["kv_end"] = capacity
    if draw.maybe(0.3):
        given["kv_start"] = draw.integers([draw.randint(0, end) for end in ends])
    if draw.maybe(0.2):
        given["lengths"] = draw.integers([draw.randrange(90) for _ in range(batch)])
    given["q"] = heads(draw, dtype, batch, length, many, dims)
    given["table"] = make_table(draw, dtype, dims, batch, capacity, by_length=True)
    given |= {name: value for name, value in (("window", draw.choice((1, 3, 64))),) if draw.maybe(0.25)}
    given |= {name: value for name, value in (("softcap", 2.0), ("scale", 0.7)) if draw.maybe(0.2)}
    given |= {"rotated": draw.choice(("none", "none", "q", "k", "qk")), "return_lse": draw.maybe(0.4)}

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        with_lse = bool(before.get("return_lse", False))
        _check_attended(before, *(result if with_lse else (result, None)), truths.decode)

    return Case(clex_kernels.decode_attention, given, check)


def merge_attention(draw: Draw) -> Case:
    batch, many, _, dims = sizes(draw)
    dtype, length, blocks = draw.choice(FLOATS), draw.choice((0, 1, 9)), draw.choice((1, 1, 2, 5))
    wide = torch.promote_types(dtype, torch.float32)
    rows = draw.choice(((batch,), ()))
    outs = tuple(heads(draw, dtype, *rows, length, many, dims) for _ in range(blocks))
    lses = []
    for _ in range(blocks):
        lse = 10 * draw.normal(*rows, many, length, dtype=wide)
        # a query sees nothing in some blocks, or in all of them.
        unseen = draw.normal(*rows, many, length) > draw.choice((-9, 0, 9))
        lses.append(draw.laid_out(lse.masked_fill(unseen, -torch.inf), unit=False))

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        outs, lses = before["outs"], before["lses"]
        out, lse = result
        assert (out.shape, out.dtype) == (outs[0].shape, outs[0].dtype), f"out: {out.dtype}{list(out.shape)}"
        if not is_plain(*outs) or any(x.is_meta or x.isnan().any() or (x == torch.inf).any() for x in lses):
            return
        merged, truth = truths.merged(outs, lses)
        assert_within("lse", lse, truth, slack(wide))
        assert_within("out", out, merged, slack(dtype))

    given = {"outs": outs, "lses": tuple(lses)}
    derivative = Derivative(
        ("outs", "lses"),
        lambda given: truths.merged(given["outs"], given["lses"]),
        applies=lambda given: all(not x.isnan().any() and not (x == torch.inf).any() for x in given["lses"]),
    )
    return Case(clex_kernels.merge_attention, given, check, derivative=derivative)


def append_kv(draw: Draw) -> Case:
    batch, _, groups, dims = sizes(draw)
    dtype, length = draw.choice(FLOATS), draw.choice((0, 1, 1, 2, 20))
    given = _cache(draw, dtype, batch, groups, dims, written=True)
    ends = [draw.randint(0, _capacity(given)) for _ in range(batch)]
    given["kv_end"] = draw.integers(ends) if draw.maybe(0.8) else _capacity(given)
    given |= {name: heads(draw, dtype, batch, length, groups, dims) for name in "kv"}

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result is None, f"returned {result!r}"
        if after["k_cache"].is_meta or before["k"].is_complex():
            return
        for name in "kv":
            expected = _appended(before, name)
            same = torch.equal(after[f"{name}_cache"].nan_to_num(7.0), expected.nan_to_num(7.0))
            assert same, f"{name}_cache: other numbers than were appended"

    return Case(clex_kernels.append_kv, given, check, ("k_cache", "v_cache"), ("has no gradients", "inference tensor"))


def _appended(before: dict[str, Any], name: str) -> Tensor:
    new, cache, block_table = before[name], before[f"{name}_cache"].clone(), before.get("block_table")
    for b in range(len(new)):
        end = int(before["kv_end"][b] if isinstance(before["kv_end"], Tensor) else before["kv_end"])
        for token in range(new.shape[1]):
            slot = end - new.shape[1] + token
            if slot >= 0:
                place = (b, slot)
                if block_table is not None:
                    place = (int(block_table[b, slot // cache.shape[1]]), slot % cache.shape[1])
                cache[place] = new[b, token]
    return cache
