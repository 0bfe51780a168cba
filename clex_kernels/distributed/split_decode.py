"""Decoding over a cache of raw keys split over ranks: rank r holds slots r S to (r + 1) S of every sequence.

Each rank attends over its own slots, and the parts merge by their LSE (merging.py). Only differences of positions
matter, so a rank counts them from its first slot: its keys stand at 0, 1, 2, .. as in any cache, and a query at global
slot p at p - r S, often far past the last of them. decode_attention has its queries among the slots; so they are
rotated here, by that many positions, and go in as rotated ones, whose bounds of visible slots are those of this rank.
An amplitude counts twice there, on q' and on the keys, as in decode.py: once by the rotation here, once inside. A rank
none of whose slots are seen gives out = 0 and lse = -inf.

The t of a sequence comes from its length over all ranks, never from what a rank holds of it.

Traffic: out and lse of the other ranks could all be gathered, (n - 1)(D + 1) numbers per query row and rank; or the lse
alone, n - 1 numbers, after which each rank weighs its own out, and the sum of those is 2 (n - 1) / n D numbers by an
all-reduce: 231 numbers against 903 for 8 ranks and D = 128. This module does the latter, in fp32 (fp64 for fp64); all
ranks compute lse from the same numbers.

Several new tokens share one pass over the slots that all of them see, as heads of one token. Which these are depends
on values that lie on the device, but the slots that only some see are fewer than there are tokens, at the end and, with
a window, at the start; each token takes its own of them in a call of its own.

Shapes: q [B, L, H, D] and kv_end [B], equal on all ranks; caches [B, S, G, D], S slots of each rank; lse [B, H, L].
"""

from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.graph import increment_version

from clex_kernels.append import check_append
from clex_kernels.attention_checks import MAX_TOKENS, can_look, check_per_sequence
from clex_kernels.config import check_flag
from clex_kernels.decode import decode_attention
from clex_kernels.decode_checks import Cache, check_cache, check_choices
from clex_kernels.distributed.groups import Group, Ranks, check_local, ranks_of
from clex_kernels.merging import merge_attention, merge_lses, rows_of_lse
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack


class _Range(NamedTuple):
    """The slots of this rank, and where a sequence ends in all of them."""

    ranks: Ranks
    first: int
    slots: int
    kv_end: Tensor

    def clip(self, slot: Tensor) -> Tensor:
        """Global slots as slots of this rank, those outside at its ends."""
        return (slot - self.first).clamp(0, self.slots)


def _range_of(cache: Cache, kv_end: int | Tensor, group: Group) -> _Range:
    ranks = ranks_of(group)
    count, slots, device = cache.q.shape[0], cache.k_cache.shape[1], cache.q.device
    capacity = ranks.size * slots
    if capacity > MAX_TOKENS:
        raise ValueError(f"k_cache: expected at most {MAX_TOKENS} slots on all ranks, got {capacity}")
    if isinstance(kv_end, (Integral, torch.SymInt)) and not isinstance(kv_end, bool):
        if not 0 <= kv_end <= capacity:
            raise ValueError(f"kv_end: expected within [0, n S] = [0, {capacity}], got {kv_end}")
        kv_end = torch.full((count,), int(kv_end), dtype=torch.int64, device=device)
    elif not isinstance(kv_end, Tensor):
        raise TypeError(f"kv_end: expected an int or a tensor, got {type(kv_end).__name__}")
    check_per_sequence("kv_end", kv_end, count, capacity, device, False)
    return _Range(ranks, ranks.rank * slots, slots, kv_end.long())


def split_append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_end: int | Tensor, group: Group = None
) -> None:
    """append_kv into a cache split over ranks: each token is written on the rank that owns its slot, and nowhere else.

    Every rank of the group gets all new tokens and calls it; nothing is communicated, and nothing waits for a device.

    Args:
        k: [B, L, G, D], keys of the new tokens, not rotated, as append_kv takes them; any L, also over several ranks.
        v: like k.
        k_cache: [B, S, G, D], this rank's slots, of k's dtype; S is the same on all ranks.
        v_cache: like k_cache.
        kv_end: [B] int32 or int64, end of a sequence's valid slots on all ranks, new tokens included; or one int.
        group: a process group, a device mesh of one dimension, or None for all ranks.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, a cache can't be written to, or there is no such group.
        RuntimeError: k, v or a cache requires grad where gradients are enabled, or comes with a tangent.
    """
    check_local(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    cache = check_cache("k", k, k_cache, v_cache, None)
    check_append(cache, v)
    here = _range_of(cache, kv_end, group)
    # slots before and after this rank's are none of its cache, and the operator writes to none that does not exist.
    torch.ops.clex.append(k, v, k_cache, v_cache, here.kv_end - here.first, None)
    if not torch.compiler.is_compiling():
        # lets autograd notice if a backward pass needs what was there; the operator does not tell it.
        increment_version((k_cache, v_cache))


def split_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: RotaryTable | RotaryTableStack,
    kv_end: int | Tensor,
    group: Group = None,
    *,
    kv_start: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """decode_attention over a cache split over ranks; without gradients. Every rank gets the whole result.

    Every rank of the group calls it with the same q, table, kv_end and options. The new tokens' own keys and values are
    in the cache already (split_append_kv). Nothing waits for a device.

    Args:
        q: [B, L, H, D], raw, L from 0 to 16, as decode_attention takes it.
        k_cache: [B, S, G, D] of q's dtype, this rank's slots, raw; S is the same on all ranks.
        v_cache: like k_cache.
        table: of positions 0, 1, 2, .. up to the longest sequence; or a stack with a table per sequence, by its index
            or else by `lengths`.
        kv_end: [B] int32 or int64, end of a sequence's valid slots on all ranks, new tokens included; or one int.
        group: a process group, a device mesh of one dimension, or None for all ranks.
        kv_start: [B], first valid slot, counted over all ranks; None: 0.
        lengths: [B], token counts, which choose from the stack and enter the log_scale; None: kv_end - kv_start.
        scale: of the logits, 2^-30 to 2^30; None: D^(-1/2).
        window: tokens that a query sees, itself included; None: all.
        softcap: c in c tanh(logits / c), 2^-30 to 2^30; None: no cap.
        return_lse: also return lse [B, H, L], natural logarithm, fp32 (fp64 for fp64), -inf where nothing is seen.

    Returns:
        out [B, L, H, D], or (out, lse), equal on all ranks.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, a table of sampled positions came, or there is no such
            group.
        RuntimeError: from backward(), or a tensor comes with a tangent.
    """
    check_local(q=q, k_cache=k_cache, v_cache=v_cache, table=getattr(table, "freq", None))
    cache = check_cache("q", q, k_cache, v_cache, None)
    check_choices(cache, table, "q")
    check_flag("return_lse", return_lse)
    here = _range_of(cache, kv_end, group)
    tokens = q.shape[1]
    _check_bounds(here, kv_start, lengths, table, window)
    if lengths is None:
        lengths = here.kv_end if kv_start is None else here.kv_end - kv_start
    if isinstance(table, RotaryTableStack) and table.index is None and table.train_length is not None:
        table = table.select(lengths)
    rules = {"scale": scale, "softcap": softcap, "lengths": lengths, "rotated": "q", "return_lse": True}
    # of each new token: its slot, then from where to where it sees.
    at = here.kv_end[:, None] - tokens + torch.arange(tokens, device=q.device)
    start = torch.zeros_like(at) if kv_start is None else kv_start.long()[:, None].expand_as(at)
    start = start if window is None else torch.maximum(start, at - (window - 1))
    q = apply_rotary(q, None, table, position_ids=(at - here.first).clamp(min=0))[0]

    def attend(q: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        end = here.clip(end)
        return decode_attention(q, k_cache, v_cache, table, end, kv_start=torch.minimum(here.clip(start), end), **rules)

    if tokens > 0:
        out, lse = _attend_tokens(attend, q, k_cache.shape[2], start, at + 1, window is not None)
        out, lse = _merge_over(here.ranks, out, lse)
    else:
        out, lse = attend(q, torch.zeros_like(here.kv_end), torch.zeros_like(here.kv_end))
    return (out, lse) if return_lse else out


def _attend_tokens(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    groups: int,
    start: Tensor,
    end: Tensor,
    has_window: bool,
) -> tuple[Tensor, Tensor]:
    """out and lse of L tokens over this rank's slots, of which token l sees those from start[:, l] to end[:, l].

    attend(q, first, last) does so for one token and one range of slots a sequence.
    """
    tokens = q.shape[1]
    if tokens == 1:
        return attend(q, start[:, 0], end[:, 0])
    # all see what lies from the last one's start to the first one's end.
    first, last = start[:, -1], end[:, 0]
    as_heads = q.unflatten(2, (groups, -1)).transpose(1, 2).flatten(1, 3).unsqueeze(1)
    out, lse = attend(as_heads, first, last)
    out = out.squeeze(1).unflatten(1, (groups, tokens, -1)).transpose(1, 2).flatten(2, 3)
    lse = lse.squeeze(2).unflatten(1, (groups, tokens, -1)).transpose(2, 3).flatten(1, 2)
    parts = [(out, lse)]
    edges = [(torch.maximum(start, last[:, None]), end)]
    if has_window:
        edges.append((start, torch.minimum(first, last)[:, None].expand_as(start)))
    for begin, stop in edges:
        rows = [attend(q[:, n : n + 1], begin[:, n], stop[:, n]) for n in range(tokens)]
        outs, lses = zip(*rows, strict=True)
        parts.append((torch.cat(outs, 1), torch.cat(lses, 2)))
    return merge_attention(*zip(*parts, strict=True))


def _merge_over(ranks: Ranks, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse over all ranks' slots, on every rank."""
    lses = [torch.empty_like(lse) for _ in range(ranks.size)]
    dist.all_gather(lses, lse.detach(), group=ranks.group)
    # collectives have no backward pass of their own: it must get to the operator, which refuses it by name.
    lses[ranks.rank] = lse
    merged, weights = merge_lses(torch.stack(lses))
    # out first: the strides of a product are its first factor's.
    total = out * rows_of_lse(weights[ranks.rank])
    dist.all_reduce(total.detach(), group=ranks.group)
    return total.to(out.dtype), merged


def _check_bounds(
    here: _Range,
    kv_start: Tensor | None,
    lengths: Tensor | None,
    table: RotaryTable | RotaryTableStack,
    window: int | None,
) -> None:
    """What decode_attention can't see of this rank's part alone."""
    count, device = here.kv_end.shape[0], here.kv_end.device
    for name, value, limit in (("kv_start", kv_start, here.ranks.size * here.slots), ("lengths", lengths, None)):
        if value is not None:
            check_per_sequence(name, value, count, limit, device, False)
    if kv_start is not None and can_look(kv_start, False) and (kv_start > here.kv_end).any():
        raise ValueError(f"kv_start: expected at most kv_end = {here.kv_end.tolist()}, got {kv_start.tolist()}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, Integral)):
        raise TypeError(f"window: expected an int, got {type(window).__name__}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 token, the query itself, got {window}")
    if table.positions is not None:
        raise ValueError("table: expected positions 0, 1, 2, ..., where cached keys stand, got sampled positions")
    last = int(here.kv_end.max()) if count and can_look(here.kv_end, False) else 0
    if last > table.length:
        raise ValueError(
            f"table: expected positions for all keys up to kv_end = {last}, got one of {table.length} positions"
        )
