"""Attention on the CPU: the rotary operators, then PyTorch's flash attention where it can, else blocks of its own.

The work of a call is cut into spans. A span is the queries and keys of one sequence, or of all sequences if they are
alike, without the queries that see no key and the keys that no query sees. So a dead slot is never read, a position
outside the table is never looked up, and every softmax has something to sum. With the span's first key at 0 and its
first query at `shift`, query l sees key j

    causal:  j <= shift + l          window:  shift + l - window < j

A span is plain if the rule hides nothing in it, or if it is the lower triangle of a square: PyTorch's operator takes
those, with its keys shared by several heads. All others go by blocks of queries and keys with a running softmax, the
H / G heads that share a key head being rows of one matrix [G, H/G rows, D]:

    forward    m' = max(m, max logits)     P = exp(logits - m')      l, out = exp(m - m') (l, out) + P (1, v)
    backward   P = exp(logits - lse)       delta = sum(dout out) - dlse       dlogits = P (dout v^T - delta)
               dv = P^T dout               dq = scale dlogits k               dk = scale dlogits^T q

and with a softcap c, logits = c tanh(u), dlogits times 1 - tanh^2(u).

Shapes: q [B, L, H, D], k and v [B, S, G, D], lse [B, H, L]; a single sequence in blocks has no B.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels.attention_terms import Rule, Tables, Tokens

# queries and keys of a block: of 32..256 by 128..1024 the best or near it for L = 2048, H 16, G 4, D 64, fp32, two
# cores of Zen 4: 95 ms causal and 150 ms full, where 256 x 512 takes 119 and 165.
_ROWS, _COLUMNS = 128, 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Span(NamedTuple):
    """Tokens that attend to each other; positions are rows of the table, `table` is which of T tables it uses."""

    sequences: slice
    queries: slice
    keys: slice
    q_position: int
    k_position: int
    table: slice
    scale: float
    is_causal: bool
    window: int | None
    softcap: float | None

    @property
    def shift(self) -> int:
        return self.q_position - self.k_position

    @property
    def size(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def is_square(self) -> bool:
        return self.shift == 0 and self.size[0] == self.size[1]

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.window is None and (not self.is_causal or self.is_square)

    def of_queries(self, x: Tensor) -> Tensor:
        return x[self.sequences, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.sequences, self.keys]

    def of_lse(self, x: Tensor) -> Tensor:
        return x[self.sequences, :, self.queries]

    def of_tables(self, tables: Tables) -> Tables:
        if self.table == slice(None):
            return tables
        coarse, fine, positions, _ = tables
        if positions is not None and positions.shape[0] > 1:
            positions = positions[self.table]
        return Tables(coarse[self.table], fine[self.table], positions, None)


def _per_sequence(values: Tensor | None, default: int | None, count: int) -> list[int] | list[None]:
    return [default] * count if values is None else values.tolist()


def _bounds(edges: Tensor | None, size: int, count: int) -> list[tuple[int, int]]:
    """First token and number of tokens of each sequence, within [0, size]."""
    if edges is None:
        return [(0, size)] * count
    return [(first, max(end - first, 0)) for first, end in pairwise(edges.clamp(0, size).tolist())]


def _scale(length: int, rule: Rule) -> float:
    factor = 1.0 if rule.log_base is None else math.log(length) / rule.log_base
    return rule.scale * (max(factor, 1.0) if rule.log_clamped else factor)


def _seen(queries: int, start: int, end: int, shift: int, rule: Rule) -> tuple[int, int, int, int]:
    """The queries that see some key and the keys that some query sees; query l stands at key slot shift + l."""
    first, last = max(0, start - shift) if rule.is_causal else 0, queries
    if rule.window is not None:
        last = min(last, end - 1 + rule.window - shift)
        start = max(start, shift + first - rule.window + 1)
    return first, last, start, min(end, shift + last) if rule.is_causal else end


def _sequence_spans(q: Tensor, k: Tensor, tables: Tables, tokens: Tokens, rule: Rule, count: int) -> Iterator[_Span]:
    stacked = range(count) if tables.coarse.shape[0] > 1 else [0] * count
    numbers = zip(
        _bounds(tokens.cu_seqlens_q, q.shape[1], count),
        _bounds(tokens.cu_seqlens_k, k.shape[1], count),
        _per_sequence(tokens.kv_start, 0, count),
        _per_sequence(tokens.kv_end, k.shape[1], count),
        _per_sequence(tokens.lengths, None, count),
        _per_sequence(tokens.q_offsets, tokens.q_offset, count),
        _per_sequence(tokens.k_offsets, tokens.k_offset, count),
        stacked if tables.index is None else tables.index.tolist(),
        strict=False,
    )
    for b, ((q_base, queries), (k_base, slots), start, end, length, q_offset, k_offset, table) in enumerate(numbers):
        start, end = (min(max(slot, 0), slots) for slot in (start, end))
        length = max(end - start, 1) if length is None else max(length, 1)
        shift = end - queries if q_offset is None else q_offset - k_offset
        first, last, start, end = _seen(queries, start, end, shift, rule)
        if first >= last or start >= end:
            continue
        yield _Span(
            sequences=slice(b, b + 1) if tokens.cu_seqlens_q is None else slice(0, 1),
            queries=slice(q_base + first, q_base + last),
            keys=slice(k_base + start, k_base + end),
            q_position=k_offset + shift + first,
            k_position=k_offset + start,
            table=slice(table, table + 1),
            scale=_scale(length, rule),
            is_causal=rule.is_causal and shift + first < end - 1,
            window=rule.window if rule.window is not None and shift + last - 1 - rule.window >= start else None,
            softcap=rule.softcap,
        )


def _spans(q: Tensor, k: Tensor, tables: Tables, tokens: Tokens, rule: Rule, in_blocks: bool = False) -> list[_Span]:
    """The spans of a call, one for the whole batch if its sequences are alike and need no blocks."""
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return []
    rule = rule._replace(is_causal=rule.is_causal or rule.window is not None)
    if rule.log_base is None:
        tokens = tokens._replace(lengths=None)
    if not any(isinstance(values, Tensor) for values in tokens):
        spans = list(_sequence_spans(q, k, tables, tokens, rule, 1))
        if not spans or (spans[0].is_plain and not in_blocks):
            return [span._replace(sequences=slice(0, q.shape[0]), table=slice(None)) for span in spans]
    count = q.shape[0] if tokens.cu_seqlens_q is None else tokens.cu_seqlens_q.shape[0] - 1
    return list(_sequence_spans(q, k, tables, tokens, rule, count))


def _is_everything(spans: list[_Span], q: Tensor, k: Tensor) -> bool:
    return [span[:3] for span in spans] == [(slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, k.shape[1]))]


class _Rotation(NamedTuple):
    """What is rotated here, and dfreq [T, R] if it is to be added to."""

    tables: Tables
    rotates_q: bool
    rotates_k: bool
    dfreq: Tensor | None = None

    def turns(self, span: _Span) -> list[tuple[slice, int]]:
        """Which of q and k go in a call, both if they stand at the same positions, which is faster; and from where."""
        if self.rotates_q and self.rotates_k and span.is_square:
            return [(slice(0, 2), span.q_position)]
        return [(slice(0, 1), span.q_position)] * self.rotates_q + [(slice(1, 2), span.k_position)] * self.rotates_k

    def apply(self, q_and_k: list[Tensor], span: _Span) -> list[Tensor]:
        coarse, fine, _, index = span.of_tables(self.tables)
        rotated = q_and_k.copy()
        for which, position in self.turns(span):
            x, pad = q_and_k[which], [None] * (len(q_and_k[which]) == 1)
            rotated[which] = y = [tensor.new_empty(tensor.shape) for tensor in x]
            torch.ops.clex.rotary_out(*x, *pad, coarse, fine, index, None, position, False, *y, *pad)
        return rotated

    def undo(self, gradients: list[Tensor], rotated: list[Tensor], span: _Span) -> None:
        """Turns the gradients to the rotated q and k, tensors of our own, into those to the raw ones; adds to dfreq."""
        coarse, fine, positions, index = span.of_tables(self.tables)
        for which, position in self.turns(span):
            dy, y, pad = gradients[which], rotated[which], [None] * (len(rotated[which]) == 1)
            if self.dfreq is None:
                torch.ops.clex.rotary_(*dy, *pad, coarse, fine, index, None, position, True)
                continue
            *dx, dfreq = torch.ops.clex.rotary_bwd(*dy, *pad, *y, *pad, coarse, fine, positions, index, None, position)
            gradients[which] = dx[: len(y)]
            self.dfreq[span.table] += dfreq


def _heads_first(x: Tensor) -> Tensor:
    """[B, L, H, D] as the flash operator takes it, whose matrix products need rows that do not overlap."""
    is_dense = x.stride(-1) == 1 and (x.stride(1) >= x.shape[-1] or x.shape[1] == 1)
    return (x if is_dense else x.contiguous()).transpose(1, 2)


def _attend_plain(span: _Span, *q_k_v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _flash(*map(_heads_first, q_k_v), 0.0, span.is_causal, scale=span.scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _attend_plain_bwd(span: _Span, lse: Tensor, *dout_q_k_v_out: Tensor) -> tuple[Tensor, ...]:
    gradients = _flash_bwd(*map(_heads_first, dout_q_k_v_out), lse, 0.0, span.is_causal, scale=span.scale)
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


def _blocks(span: _Span) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with the blocks of keys that it sees something of."""
    queries, keys = span.size
    for first in range(0, queries, _ROWS):
        rows = slice(first, min(first + _ROWS, queries))
        start = 0 if span.window is None else max(0, span.shift + rows.start - span.window + 1)
        end = min(keys, span.shift + rows.stop) if span.is_causal else keys
        yield rows, [slice(column, min(column + _COLUMNS, end)) for column in range(start, end, _COLUMNS)]


def _hide(logits: Tensor, span: _Span, rows: slice, columns: slice) -> None:
    """Sets what the rule hides of a block [G, H/G rows, columns] to -inf."""
    first, last = span.shift + rows.start, span.shift + rows.stop - 1
    is_early = span.window is not None and columns.start <= last - span.window
    if is_early or (span.is_causal and columns.stop - 1 > first):
        ahead = torch.arange(columns.start, columns.stop) - torch.arange(first, last + 1)[:, None]
        hidden = (ahead > 0) | (ahead <= -span.window) if is_early else ahead > 0
        logits.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, -math.inf)


def _stack_heads(x: Tensor, groups: int) -> Tensor:
    """[rows, H, D] as [G, H/G rows, D], in fp32 at least and in memory of its own unless H is G."""
    return (
        x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    )


def _unstack_heads(x: Tensor, rows: int) -> Tensor:
    """The way back to [rows, H, D]."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


# inside the operators autocast would still turn matrix products to bf16.
@torch.autocast("cpu", enabled=False)
def _attend_in_blocks(span: _Span, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out [L, H, D] and lse [H, L] of one sequence."""
    groups = k.shape[1]
    k, v = _stack_heads(k, groups), _stack_heads(v, groups)
    out, lse = q.new_empty(q.shape), k.new_empty((q.shape[1], q.shape[0]))
    for rows, blocks in _blocks(span):
        q_block = _stack_heads(q[rows], groups) * (span.scale / (span.softcap or 1.0))
        weighted, total = torch.zeros_like(q_block), torch.zeros_like(q_block[..., :1])
        # finite, so that a row hidden in its first block subtracts no infinities.
        largest = torch.full_like(total, torch.finfo(total.dtype).min)
        for columns in blocks:
            logits = torch.bmm(q_block, k[:, columns].transpose(1, 2))
            if span.softcap is not None:
                logits.tanh_().mul_(span.softcap)
            _hide(logits, span, rows, columns)
            previous, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
            weights, decay = logits.sub_(largest).exp_(), previous.sub_(largest).exp_()
            total.mul_(decay).add_(weights.sum(-1, keepdim=True))
            weighted.mul_(decay).baddbmm_(weights, v[:, columns])
        out[rows] = _unstack_heads(weighted.div_(total), rows.stop - rows.start)
        lse[:, rows] = (largest + total.log_()).view(q.shape[1], -1)
    return out, lse


@torch.autocast("cpu", enabled=False)
def _attend_in_blocks_bwd(
    span: _Span, dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [L, H, D], dk and dv [S, G, D] of one sequence, to the rotated q and k."""
    groups, cap, dtype = k.shape[1], span.softcap or 1.0, q.dtype
    dq = q.new_empty(q.shape)
    k, v = _stack_heads(k, groups), _stack_heads(v, groups)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, blocks in _blocks(span):
        q_block, dout_block, out_block = (_stack_heads(x[rows], groups) for x in (q, dout, out))
        q_block = q_block * (span.scale / cap)
        dq_block = torch.zeros_like(q_block)
        lse_block, dlse_block = (x[:, rows].reshape(groups, -1, 1) for x in (lse, dlse))
        delta = (dout_block * out_block).sum(-1, keepdim=True) - dlse_block
        for columns in blocks:
            logits = torch.bmm(q_block, k[:, columns].transpose(1, 2))
            if span.softcap is not None:
                slope = 1 - logits.tanh_().square()
                logits.mul_(cap)
            _hide(logits, span, rows, columns)
            weights = logits.sub_(lse_block).exp_()
            dv[:, columns].baddbmm_(weights.transpose(1, 2), dout_block)
            dlogits = torch.bmm(dout_block, v[:, columns].transpose(1, 2)).sub_(delta).mul_(weights)
            if span.softcap is not None:
                dlogits.mul_(slope)
            dq_block.baddbmm_(dlogits, k[:, columns])
            dk[:, columns].baddbmm_(dlogits.transpose(1, 2), q_block, alpha=cap)
        dq[rows] = _unstack_heads(dq_block.mul_(span.scale), rows.stop - rows.start)
    return dq, *(x.transpose(0, 1).to(dtype).contiguous() for x in (dk, dv))


def _attend(q: Tensor, k: Tensor, v: Tensor, span: _Span, rotation: _Rotation) -> tuple[Tensor, ...]:
    """out and lse of a span, and its q and k as they attend."""
    q, k = rotation.apply([span.of_queries(q), span.of_keys(k)], span)
    v = span.of_keys(v)
    if span.is_plain:
        return *_attend_plain(span, q, k, v), q, k
    out, lse = _attend_in_blocks(span, q[0], k[0], v[0])
    return out[None], lse[None], q, k


def _attend_bwd(tensors: Any, span: _Span, rotation: _Rotation) -> tuple[Tensor, ...]:
    """dq, dk and dv of a span, from dout, dlse, q, k, v, out and lse."""
    dout, dlse, q, k, v, out, lse = tensors
    dout, q, out = (span.of_queries(x) for x in (dout, q, out))
    k, v, lse = span.of_keys(k), span.of_keys(v), span.of_lse(lse)
    if span.is_plain and dlse is None:
        *dq_and_dk, dv = _attend_plain_bwd(span, lse, dout, q, k, v, out)
    else:
        dlse = torch.zeros_like(lse) if dlse is None else span.of_lse(dlse)
        parts = _attend_in_blocks_bwd(span, *(x[0] for x in (dout, dlse, q, k, v, out, lse)))
        *dq_and_dk, dv = (part[None] for part in parts)
    rotation.undo(dq_and_dk, [q, k], span)
    return *dq_and_dk, dv


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    tokens: Tokens,
    rule: Rule,
    rotate_q: bool,
    rotate_k: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and, if asked to save them, the q and k that were rotated here (else empty); all contiguous."""
    spans, rotation = _spans(q, k, tables, tokens, rule), _Rotation(tables, rotate_q, rotate_k)
    saves_q, saves_k = save and rotate_q, save and rotate_k
    if _is_everything(spans, q, k):
        out, lse, q_rotated, k_rotated = _attend(q, k, v, spans[0], rotation)
        return out, lse, q_rotated if saves_q else q.new_empty(0), k_rotated if saves_k else k.new_empty(0)
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    q_rotated, k_rotated = q.new_zeros(q.shape if saves_q else 0), k.new_zeros(k.shape if saves_k else 0)
    for span in spans:
        out_part, lse_part, q_part, k_part = _attend(q, k, v, span, rotation)
        span.of_queries(out).copy_(out_part)
        span.of_lse(lse).copy_(lse_part)
        if saves_q:
            span.of_queries(q_rotated).copy_(q_part)
        if saves_k:
            span.of_keys(k_rotated).copy_(k_part)
    return out, lse, q_rotated, k_rotated


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Tables,
    tokens: Tokens,
    rule: Rule,
    rotate_q: bool,
    rotate_k: bool,
    wants_dfreq: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk and dv, to the raw q and k where these were rotated here, contiguous, and dfreq [T, R] (else empty).

    q and k are the rotated ones. Where both were rotated here, dfreq counts sampled positions from the first, since
    the sum of dangle over a sequence vanishes; from 0 it would drown in that sum's rounding.
    """
    spans = _spans(q, k, tables, tokens, rule, in_blocks=dlse is not None)
    if rotate_q and rotate_k and tables.positions is not None:
        tables = tables._replace(positions=tables.positions - tables.positions[:, :1])
    sizes = (tables.coarse.shape[0], tables.coarse.shape[3])
    dfreq = q.new_zeros(sizes if wants_dfreq else 0, dtype=torch.float64)
    rotation = _Rotation(tables, rotate_q, rotate_k, dfreq if wants_dfreq else None)
    tensors = (dout, dlse, q, k, v, out, lse)
    if _is_everything(spans, q, k):
        return *_attend_bwd(tensors, spans[0], rotation), dfreq
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for span in spans:
        parts = _attend_bwd(tensors, span, rotation)
        for whole, part in zip((span.of_queries(dq), span.of_keys(dk), span.of_keys(dv)), parts, strict=True):
            whole.copy_(part)
    return dq, dk, dv, dfreq
