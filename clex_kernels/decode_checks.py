"""Checks of what decode_attention and append_kv are given; values are looked at on the host, or under `debug`."""

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels.attention_checks import MAX_HEAD_DIM, MAX_TOKENS, ROTATED, can_look, check_per_sequence
from clex_kernels.config import one_of
from clex_kernels.rotary_checks import check_kind, check_operand, check_strided, stacked
from clex_kernels.tables import TILE, RotaryTable, RotaryTableStack

# more new tokens are a prefill, whose rows fill whole tiles of their own.
MAX_NEW_TOKENS = 16
# a page holds whole blocks of keys as the kernels read them.
PAGE_MULTIPLE = 16


class Cache(NamedTuple):
    """q [B, L, H, D] beside k_cache and v_cache, contiguous or in pages, and the slots a sequence may have."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor | None

    @property
    def capacity(self) -> int:
        """S: slots of a sequence."""
        slots = self.k_cache.shape[1]
        return slots if self.block_table is None else self.block_table.shape[1] * slots


class Slots(NamedTuple):
    """The valid slots of each sequence, and the largest kv_end and length where they can be seen."""

    kv_end: Tensor
    kv_start: Tensor | None
    lengths: Tensor | None
    last_end: int | None
    longest: int | None


def check_cache(name: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> Cache:
    """Types, dtypes and shapes of `name` [B, L, H, D] and of the caches."""
    for other, x in ((name, q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{other}: expected a tensor, got {type(x).__name__}")
    check_operand(name, q, q)
    batch, _, _, dims = q.shape
    for other, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype != q.dtype:
            raise ValueError(f"{other}: expected {name}'s dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{other}: expected on {name}'s device {q.device}, got {x.device}")
        check_strided(other, x)
        fits = x.dim() == 4 and x.shape[3] == dims and (block_table is not None or x.shape[0] == batch)
        if not fits or x.shape != k_cache.shape:
            # in compiled code a size that enters a text is a constant: only here.
            rows = f"[B={batch}, S" if block_table is None else "[pages, P"
            expected = f"{rows}, G, D={dims}]" if other == "k_cache" else f"k_cache's {list(k_cache.shape)}"
            raise ValueError(f"{other}: expected shape {expected}, got {list(x.shape)}")
        if x.stride(3) != 1 and dims > 1 and x.numel() > 0:
            raise ValueError(f"{other}: expected unit stride in D, got strides {list(x.stride())}")
    if dims == 0:
        raise ValueError(f"{name}: expected D of at least 1, got 0")
    if block_table is not None:
        _check_block_table(block_table, k_cache, batch)
    cache = Cache(q, k_cache, v_cache, block_table)
    if cache.capacity > MAX_TOKENS:
        raise ValueError(f"k_cache: expected at most {MAX_TOKENS} slots of a sequence, got {cache.capacity}")
    return cache


def check_choices(cache: Cache, table: Any, rotated: str) -> None:
    """What attention asks for beyond that: heads that group, few new tokens, a table, and the choice by name."""
    _, length, heads, dims = cache.q.shape
    groups = cache.k_cache.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(f"q: expected H to be a multiple of G={groups}, got H={heads}")
    if length > MAX_NEW_TOKENS:
        raise ValueError(f"q: expected L of at most {MAX_NEW_TOKENS} new tokens, got {length}; attention() serves more")
    if cache.q.device.type != "cpu" and dims > MAX_HEAD_DIM:
        raise ValueError(f"q: expected D of at most {MAX_HEAD_DIM}, got {dims}")
    check_kind(table)
    one_of("rotated", rotated, tuple(ROTATED))


def check_slots(
    cache: Cache,
    kv_end: Any,
    kv_start: Tensor | None = None,
    lengths: Tensor | None = None,
    debug: bool = False,
    written: int | None = None,
) -> Slots:
    """Bounds and lengths: types, shapes, and values where those can be seen; so too the pages they reach into.

    written: of the slots only the last so many are used.
    """
    count, capacity, device = cache.q.shape[0], cache.capacity, cache.q.device
    if isinstance(kv_end, (Integral, torch.SymInt)) and not isinstance(kv_end, bool):
        if not 0 <= kv_end <= capacity:
            raise ValueError(f"kv_end: expected within [0, S] = [0, {capacity}], got {kv_end}")
        kv_end = torch.full(
            (count,), kv_end if isinstance(kv_end, torch.SymInt) else int(kv_end), dtype=torch.int64, device=device
        )
    elif not isinstance(kv_end, Tensor):
        raise TypeError(f"kv_end: expected an int or a tensor, got {type(kv_end).__name__}")
    check_per_sequence("kv_end", kv_end, count, capacity, device, debug)
    for name, value, limit in (("kv_start", kv_start, capacity), ("lengths", lengths, None)):
        if value is not None:
            check_per_sequence(name, value, count, limit, device, debug)
    if count == 0 or not can_look(kv_end, debug):
        return Slots(kv_end, kv_start, lengths, None, None)
    last_end = longest = int(kv_end.max())
    if kv_start is not None and can_look(kv_start, debug):
        counts = kv_end - kv_start
        if counts.min() < 0:
            raise ValueError(f"kv_start: expected at most kv_end = {kv_end.tolist()}, got {kv_start.tolist()}")
        longest = int(counts.max())
    if lengths is not None:
        longest = int(lengths.max()) if can_look(lengths, debug) else None
    if cache.block_table is not None and can_look(cache.block_table, debug):
        _check_pages(cache, kv_end, kv_start if written is None else kv_end - written)
    return Slots(kv_end, kv_start, lengths, last_end, longest)


def check_table(
    cache: Cache, table: RotaryTable | RotaryTableStack, slots: Slots, rotates: bool, debug: bool
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    """coarse and fine [T, C or F, 2, R], and what picks one per sequence: an index, or train_length by its length."""
    if table.positions is not None:
        raise ValueError("table: expected positions 0, 1, 2, ..., where cached keys stand, got sampled positions")
    if table.tile != TILE:
        raise ValueError(f"table: expected F = {TILE} rows in fine, as from_frequencies makes, got {table.tile}")
    picks = isinstance(table, RotaryTableStack) and table.index is None and table.train_length is not None
    _, coarse, fine, _, index = stacked(
        cache.q, cache.q.shape[3], table, cache.q.shape[0], debug, picks_by_length=picks
    )
    length = coarse.shape[1] * TILE
    if rotates and slots.last_end is not None and slots.last_end > length:
        raise ValueError(f"table: expected positions for all keys up to kv_end = {slots.last_end}, got one of {length}")
    if picks and slots.longest is not None:
        table.warn_past_limit(slots.longest, stacklevel=5)
    return coarse, fine, index, table.train_length if picks else None


def _check_block_table(block_table: Tensor, k_cache: Tensor, batch: int) -> None:
    if not isinstance(block_table, Tensor) or block_table.dtype not in (torch.int32, torch.int64):
        got = block_table.dtype if isinstance(block_table, Tensor) else type(block_table).__name__
        raise TypeError(f"block_table: expected a torch.int32 or torch.int64 tensor, got {got}")
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.device != k_cache.device:
        expected = f"shape [B={batch}, pages of a sequence] on {k_cache.device}"
        raise ValueError(f"block_table: expected {expected}, got {list(block_table.shape)} on {block_table.device}")
    pages, page = k_cache.shape[:2]
    if pages == 0 and block_table.numel() > 0:
        raise ValueError(f"k_cache: expected pages for block_table {list(block_table.shape)}, got none")
    if page == 0 or page % PAGE_MULTIPLE:
        raise ValueError(f"k_cache: expected pages of P slots, P a multiple of {PAGE_MULTIPLE}, got P={page}")


def _check_pages(cache: Cache, kv_end: Tensor, kv_start: Tensor | None) -> None:
    """That the pages in use are in the pool."""
    table, pages, page = cache.block_table, cache.k_cache.shape[0], cache.k_cache.shape[1]
    if table.numel() == 0:
        return
    low, high = (int(bound) for bound in table.aminmax())
    if low >= 0 and high < pages:
        return
    first_slots = torch.arange(table.shape[1], device=table.device) * page
    in_use = first_slots < kv_end[:, None]
    if kv_start is not None:
        in_use &= first_slots + page > kv_start[:, None]
    wrong = in_use & ((table < 0) | (table >= pages))
    if wrong.any():
        b, i = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"block_table: expected pages in [0, {pages}) up to kv_end, got {int(table[b, i])} at [{b}, {i}]"
        )
