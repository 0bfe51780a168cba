"""Attention with the sequence split over ranks: context parallel, forward and backward, with the table's dfreq.

**Shards.** Of n ranks, rank r holds two of 2n equal chunks of the sequence, r and 2n - 1 - r ("zigzag"). Chunk a of
queries sees chunk b of keys if b <= a, so chunks r and 2n - 1 - r see r + 1 and 2n - r of them: 2n + 1 on every rank,
two of them halves on the diagonal. Causal work is shared equally.

**Rings.** Each rank rotates its own q and k once; k' and v then go round, one rank a step, into a second buffer while
the first attends. Parts merge by their LSE (merging.py). Backward goes round once more with k' and v, and the sums of
dk' and dv behind them, which end where their keys live: with the out and lse of the whole rows, each pair of chunks
gives its share of dq', dk' and dv by attention.py's formulas, since these are sums over pairs of tokens.

**dfreq.** From dq' and dk' of its own tokens, each rank has

    dfreq_r = sum of p dangle over the tokens of rank r, and of q and k

by rotary.py's backward, and the whole dfreq is the sum over ranks, one all-reduce of [T, R] numbers. That needs dq' and
dk' to be whole, which they are once the ring is closed, and p to be counted from one origin on all ranks: the sum of
dangle vanishes over the whole sequence, not over a shard, so a shard with an origin of its own would leave out (its
origin) x (its sum of dangle). The common origin is the sequence's first token, not the table's first row: the sums of
dangle that cancel between ranks are then multiplied by numbers up to L only, and their rounding too, however far out
the sequence stands. For the same reason tables of plain positions are read from row 0 on, whatever the offset.

Memory per rank is O(L / n): q', k', v, out, lse and the table are saved; on the way there are two buffers of k' and v,
and in the backward pass three of dk' and dv and one of dq', those in fp32 (fp64 for fp64), beside which q' and k' stand
in fp32, too, once the ring's buffers are gone.

torch.compile breaks the graph at ring_attention, since it takes no point-to-point transfers.

A rank's loss is its share of the total: every gradient here is that of the sum of all ranks' losses. All ranks must run
forward and backward alike; whether they do can't be seen from one of them.

Shapes: q [B, L/n, H, D], k and v [B, L/n, G, D], L tokens in the whole sequence.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from clex_kernels.attention import attention
from clex_kernels.attention_checks import MAX_TOKENS, check_operands, check_per_sequence, check_rule
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.autocast import autocast
from clex_kernels.distributed.groups import Group, Ranks, check_local, ranks_of
from clex_kernels.distributed.zigzag import zigzag_positions, zigzag_shard, zigzag_unshard
from clex_kernels.merging import merge_lses, rows_of_lse
from clex_kernels.rotary_checks import check_kind, check_no_tangent, stacked
from clex_kernels.tables import MAX_LENGTH, RotaryTable, RotaryTableStack

__all__ = ["ring_attention", "visible_pairs", "zigzag_positions", "zigzag_shard", "zigzag_unshard"]


class _Pair(NamedTuple):
    """A chunk of queries and a chunk of keys that see some of each other: rows of the shards, and positions."""

    queries: slice
    keys: slice
    q_offset: int
    k_offset: int
    is_causal: bool
    window: int | None


class _Terms(NamedTuple):
    """What all calls of one ring_attention share, beside tensors; chunk: tokens of one, L / 2n."""

    ranks: Ranks
    rule: Rule
    chunk: int

    def pairs(self, step: int) -> list[_Pair]:
        """The work of a step, when keys have come from the rank so many places before."""
        source = (self.ranks.rank - step) % self.ranks.size
        return visible_pairs(self.ranks.rank, source, self.ranks.size, self.chunk, self.rule)


class _Masks(NamedTuple):
    """The tables and what else the operators take as tensors."""

    tables: Tables
    kv_start: Tensor | None
    lengths: Tensor | None

    def arguments(self, pair: _Pair, terms: _Terms) -> tuple[Any, ...]:
        """The arguments of clex::attention and its backward that follow the operands, but for the last."""
        kv_start = self.kv_start
        if kv_start is not None:
            kv_start = (kv_start - pair.k_offset).clamp(0, terms.chunk)
        tokens = Tokens(kv_start=kv_start, lengths=self.lengths, q_offset=pair.q_offset, k_offset=pair.k_offset)
        rule = terms.rule._replace(is_causal=pair.is_causal, window=pair.window)
        return *self.tables, *tokens, *rule, False, False


class _Travel:
    """A tensor that goes round the ring, into a second buffer while the first may be read."""

    def __init__(self, ranks: Ranks, here: Tensor) -> None:
        self.here = here
        self._ranks, self._there = ranks, torch.empty_like(here)
        self._works: list[dist.Work] = []

    def start(self) -> None:
        group, rank, size = self._ranks
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.here, group=group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, self._there, group=group, group_peer=(rank - 1) % size),
            ]
        )

    def finish(self) -> Tensor:
        for work in self._works:
            work.wait()
        self.here, self._there = self._there, self.here
        return self.here


def visible_pairs(rank: int, source: int, size: int, chunk: int, rule: Rule) -> list[_Pair]:
    """The pairs of chunks of which something is seen, between queries of `rank` and keys of `source`."""
    pairs = []
    for i, a in enumerate((rank, 2 * size - 1 - rank)):
        for j, b in enumerate((source, 2 * size - 1 - source)):
            nearest, farthest = ((a - b) * chunk + reach for reach in (1 - chunk, chunk - 1))
            is_causal = rule.is_causal or rule.window is not None
            if (is_causal and farthest < 0) or (rule.window is not None and nearest >= rule.window):
                continue
            # plain calls where the rule hides nothing, which need no mask.
            window = None if rule.window is None or farthest < rule.window else rule.window
            is_causal = is_causal and nearest < 0
            rows = (slice(n * chunk, (n + 1) * chunk) for n in (i, j))
            pairs.append(_Pair(*rows, a * chunk, b * chunk, is_causal, window))
    return pairs


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    merged, (kept, added) = merge_lses(torch.stack((lse, part_lse)))
    out.mul_(rows_of_lse(kept)).add_(rows_of_lse(added) * part)
    lse.copy_(merged)


def _attend(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, masks: _Masks, terms: _Terms) -> tuple[Tensor, Tensor]:
    """out, in q's dtype, and lse [B, H, L/n] over the keys of all ranks; q and k are rotated."""
    out = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    travel = _Travel(terms.ranks, torch.stack((k, v)))
    for step in range(terms.ranks.size):
        is_last = step == terms.ranks.size - 1
        if not is_last:
            travel.start()
        keys, values = travel.here.unbind(0)
        for pair in terms.pairs(step):
            part, part_lse, *_ = torch.ops.clex.attention(
                *(q[:, pair.queries], keys[:, pair.keys], values[:, pair.keys], freq),
                *masks.arguments(pair, terms),
                False,
            )
            _merge_into(out[:, pair.queries], lse[:, :, pair.queries], part, part_lse)
        if not is_last:
            travel.finish()
    return out.to(q.dtype), lse


def _attend_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masks: _Masks, terms: _Terms
) -> tuple[Tensor, Tensor, Tensor]:
    """dq', dk' and dv of this rank's tokens, in fp32 at least."""
    dq = torch.zeros(q.shape, dtype=_wide(q), device=q.device)
    travel = _Travel(terms.ranks, torch.stack((k, v)))
    sums = _Travel(terms.ranks, torch.zeros(travel.here.shape, dtype=_wide(k), device=k.device))
    for step in range(terms.ranks.size):
        is_last = step == terms.ranks.size - 1
        if not is_last:
            travel.start()
        keys, values = travel.here.unbind(0)
        share = sums.here if step == 0 else torch.zeros_like(sums.here)
        for pair in terms.pairs(step):
            of_q, of_k = (slice(None), pair.queries), (slice(None), pair.keys)
            dq_part, dk_part, dv_part, _ = torch.ops.clex.attention_bwd(
                *(dout[of_q], None, q[of_q], keys[of_k], values[of_k], out[of_q], lse[:, :, pair.queries]),
                *masks.arguments(pair, terms),
                False,
            )
            dq[of_q] += dq_part
            share[0][of_k] += dk_part
            share[1][of_k] += dv_part
        if step > 0:
            # the sums were at the previous rank while these keys were there, and go after them.
            sums.finish().add_(share)
        sums.start()
        if not is_last:
            travel.finish()
    return dq, *sums.finish().unbind(0)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freq: Tensor,
        coarse: Tensor,
        fine: Tensor,
        positions: Tensor | None,
        index: Tensor | None,
        rows: Tensor,
        kv_start: Tensor | None,
        lengths: Tensor | None,
        slots: Tensor,
        terms: _Terms,
    ) -> Tensor:
        tables = Tables(coarse, fine, positions, index)
        q, k = torch.ops.clex.rotary(q, k, freq, *tables, rows, 0)
        if kv_start is not None:
            # what padding holds, be it NaN, must not reach dfreq as 0 * NaN.
            is_padding = (slots < kv_start[:, None])[:, :, None, None]
            k.masked_fill_(is_padding, 0.0)
            if terms.rule.is_causal or terms.rule.window is not None:
                q.masked_fill_(is_padding, 0.0)
        out, lse = _attend(q, k, v, freq, _Masks(tables, kv_start, lengths), terms)
        ctx.terms = terms
        ctx.save_for_backward(q, k, v, out, lse, *tables, rows, kv_start, lengths)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # once: a checkpoint computes them anew at every look.
        q, k, v, out, lse, coarse, fine, positions, index, rows, kv_start, lengths = ctx.saved_tensors
        tables = Tables(coarse, fine, positions, index)
        # the gradient of a sum is an expanded scalar, and the kernels need unit stride in D.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dq, dk, dv = _attend_bwd(dout, q, k, v, out, lse, _Masks(tables, kv_start, lengths), ctx.terms)
        wants_dfreq = ctx.needs_input_grad[3]
        rotated = (q.to(dq.dtype), k.to(dk.dtype)) if wants_dfreq else (None, None)
        dfreq = torch.ops.clex.rotary_bwd_(dq, dk, *rotated, *tables, rows, 0)
        if wants_dfreq:
            dist.all_reduce(dfreq, group=ctx.terms.ranks.group)
        gradients = (x.to(q.dtype) for x in (dq, dk, dv))
        return *gradients, dfreq if wants_dfreq else None, *(None,) * 9


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: RotaryTable | RotaryTableStack,
    group: Group = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kv_start: Tensor | None = None,
    lengths: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """attention() over a sequence of which each rank holds its zigzag shard; differentiable in q, k, v and table.freq.

    Every rank of the group calls it, forward and backward, with the same sizes, options and table. Each gets the
    gradient of the sum of all ranks' losses: dq, dk and dv of its own tokens, and the whole dfreq, already summed. With
    one rank it is attention().

    Args:
        q: [B, L/n, H, D], this rank's shard (`zigzag_shard`), not rotated, with unit stride in D; fp32, fp16, bf16, or
            fp64 on the CPU (with an fp64 table).
        k: [B, L/n, G, D] of q's dtype; query head h reads key head h // (H / G).
        v: like k.
        table: of the whole sequence, positions 0..L-1 or L sampled ones; or a stack with one table per sequence, by its
            index or else by `lengths`.
        group: a process group, a device mesh of one dimension, or None for all ranks.
        is_causal: a query sees keys up to its own position only.
        scale: of the logits, 2^-30 to 2^30; None: D^(-1/2).
        window: tokens a query sees, itself included; implies is_causal.
        softcap: c in c tanh(logits / c), 2^-30 to 2^30.
        kv_start: [B] int32 or int64, first valid slot of the whole sequence (left padding).
        lengths: [B] token counts of the whole sequences, which select the stack's tables (t) and the log-n factor;
            None: L - kv_start.
        offset: where the sequence's first token stands: its row in a table of sampled positions. Of plain positions
            only differences count, and the table must merely be long enough.

    Returns:
        out like q: this rank's shard.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, the shard isn't two equal chunks, the table is too
            short, or there is no such group.
        RuntimeError: a forward-mode or a second derivative is asked for.
    """
    check_local(q=q, k=k, v=v, table=getattr(table, "freq", None))
    q, k, v, batch, _ = check_operands(*autocast(q, k, v), None, None)
    ranks = ranks_of(group)
    tokens = q.shape[1]
    length = tokens * ranks.size
    _check_shards(q, k, table, ranks, offset)
    for name, value, limit in (("kv_start", kv_start, length), ("lengths", lengths, None)):
        if value is not None:
            check_per_sequence(name, value, batch, limit, q.device, False)
    if ranks.size == 1:
        options = {"scale": scale, "window": window, "softcap": softcap, "kv_start": kv_start, "lengths": lengths}
        return attention(q, k, v, table, is_causal, **options, q_offset=offset, k_offset=offset)
    rule = check_rule(q, scale, is_causal, window, softcap, table)
    if lengths is None:
        lengths = torch.full((batch,), length, dtype=torch.int64, device=q.device)
        lengths = lengths if kv_start is None else lengths - kv_start
    if isinstance(table, RotaryTableStack) and table.index is None and table.train_length is not None:
        table = table.select(lengths)
    freq, coarse, fine, positions, index = stacked(q, q.shape[3], table, batch, False)
    check_no_tangent("ring_attention", q, k, v, freq)
    slots = rows = zigzag_positions(length, ranks.group, q.device)[None]
    if positions is not None:
        positions, rows = positions - positions[:, offset : offset + 1], slots + offset
    lengths = None if rule.log_base is None else lengths
    terms = _Terms(ranks, rule, tokens // 2)
    return _RingAttention.apply(*(q, k, v, freq, coarse, fine, positions, index, rows, kv_start, lengths, slots, terms))


def _check_shards(q: Tensor, k: Tensor, table: RotaryTable | RotaryTableStack, ranks: Ranks, offset: int) -> None:
    check_kind(table)
    tokens, length = q.shape[1], q.shape[1] * ranks.size
    if k.shape[1] != tokens:
        raise ValueError(f"k: expected q's L/n={tokens} tokens, got {k.shape[1]}")
    if ranks.size > 1 and (tokens == 0 or tokens % 2):
        raise ValueError(f"q: expected two chunks of equal size, L/n even and at least 2, got {tokens} tokens")
    if length > MAX_TOKENS:
        raise ValueError(f"q: expected at most {MAX_TOKENS} tokens on all ranks, got {length}")
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset: expected an int, got {type(offset).__name__}")
    if not 0 <= offset <= MAX_LENGTH:
        raise ValueError(f"offset: expected a position from 0 to {MAX_LENGTH}, got {offset}")
    if offset + length > table.length:
        raise ValueError(
            f"table: expected positions for the whole sequence, offset + L = {offset + length}, "
            f"got one of {table.length} positions"
        )
