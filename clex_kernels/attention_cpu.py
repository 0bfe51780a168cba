"""Attention on the CPU: the rotary operators, then PyTorch's flash attention where it can, else blocks of its own.

The work is cut into spans (attention_spans.py). PyTorch's operator takes the plain ones, with its keys shared by
several heads; all others go by blocks (attention_blocks.py).

Shapes: q [B, L, H, D], k and v [B, S, G, D], lse [B, H, L].
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels.attention_blocks import attend_in_blocks, attend_in_blocks_bwd
from clex_kernels.attention_spans import Span, cut_into_spans, is_everything
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.deterministic import fixed_products

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Rotation(NamedTuple):
    """What is rotated here, and dfreq [T, R] if it is to be added to."""

    tables: Tables
    rotates_q: bool
    rotates_k: bool
    dfreq: Tensor | None = None

    def turns(self, span: Span) -> list[tuple[slice, int]]:
        """Which of q and k go in a call, both if they stand at the same positions, which is faster; and from where."""
        if self.rotates_q and self.rotates_k and span.is_square:
            return [(slice(0, 2), span.q_position)]
        return [(slice(0, 1), span.q_position)] * self.rotates_q + [(slice(1, 2), span.k_position)] * self.rotates_k

    def positions_of(self, span: Span, tables: Tables) -> Tensor | None:
        """What the rows count in dfreq: from the span's first key, if both q and k are rotated here.

        The sum of dangle over the span then vanishes; from 0, far out, dfreq would drown in its rounding.
        """
        coarse, fine, positions, _ = tables
        if not (self.rotates_q and self.rotates_k) or (positions is None and span.k_position == 0):
            return positions
        if positions is None:
            positions = torch.arange(coarse.shape[1] * fine.shape[1], dtype=torch.float64)[None]
        return positions - positions[:, span.k_position : span.k_position + 1]

    def apply(self, q_and_k: list[Tensor], span: Span) -> list[Tensor]:
        coarse, fine, _, index = span.of_tables(self.tables)
        rotated = q_and_k.copy()
        for which, position in self.turns(span):
            x, pad = q_and_k[which], [None] * (len(q_and_k[which]) == 1)
            rotated[which] = y = [tensor.new_empty(tensor.shape) for tensor in x]
            torch.ops.clex.rotary_out(*x, *pad, coarse, fine, index, None, position, False, *y, *pad)
        return rotated

    def undo(self, gradients: list[Tensor], rotated: list[Tensor], span: Span) -> None:
        """Turns the gradients to the rotated q and k, tensors of our own, into those to the raw ones; adds to dfreq."""
        tables = span.of_tables(self.tables)
        coarse, fine, _, index = tables
        positions = self.positions_of(span, tables)
        for which, position in self.turns(span):
            dy, pad = gradients[which], [None] * (len(gradients[which]) == 1)
            y = [None] * len(dy) if self.dfreq is None else rotated[which]
            dfreq = torch.ops.clex.rotary_bwd_(*dy, *pad, *y, *pad, coarse, fine, positions, index, None, position)
            if self.dfreq is not None:
                self.dfreq[span.table] += dfreq


def _heads_first(x: Tensor) -> Tensor:
    """[B, L, H, D] as the flash operator takes it, whose matrix products need rows that do not overlap."""
    is_dense = x.stride(-1) == 1 and (x.stride(1) >= x.shape[-1] or x.shape[1] == 1)
    return (x if is_dense else x.contiguous()).transpose(1, 2)


def _attend_plain(span: Span, *q_k_v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _flash(*map(_heads_first, q_k_v), 0.0, span.is_causal, scale=span.scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _attend_plain_bwd(span: Span, lse: Tensor, *dout_q_k_v_out: Tensor) -> tuple[Tensor, ...]:
    dout, q, k, v, out = map(_heads_first, dout_q_k_v_out)
    batch, groups = k.shape[:2]
    # one thread takes a key head: with few of them (1 of 8 heads, two threads) it was 3 to 30 times slower.
    shares = q.shape[1] // groups if batch * groups < torch.get_num_threads() else 1
    k, v = (x.repeat_interleave(shares, dim=1) for x in (k, v)) if shares > 1 else (k, v)
    dq, *dk_and_dv = _flash_bwd(dout, q, k, v, out, lse, 0.0, span.is_causal, scale=span.scale)
    dk, dv = (x.unflatten(1, (groups, shares)).sum(2) if shares > 1 else x for x in dk_and_dv)
    return tuple(gradient.transpose(1, 2) for gradient in (dq, dk, dv))


def _attend(q: Tensor, k: Tensor, v: Tensor, span: Span, rotation: _Rotation) -> tuple[Tensor, ...]:
    """out and lse of a span, and its q and k as they attend."""
    q, k = rotation.apply([span.of_queries(q), span.of_keys(k)], span)
    v = span.of_keys(v)
    if span.is_plain:
        return *_attend_plain(span, q, k, v), q, k
    out, lse = attend_in_blocks(span, q[0], k[0], v[0])
    return out[None], lse[None], q, k


def _attend_bwd(tensors: Any, span: Span, rotation: _Rotation) -> tuple[Tensor, ...]:
    """dq, dk and dv of a span, from dout, dlse, q, k, v, out and lse."""
    dout, dlse, q, k, v, out, lse = tensors
    dout, q, out = (span.of_queries(x) for x in (dout, q, out))
    k, v, lse = span.of_keys(k), span.of_keys(v), span.of_lse(lse)
    if span.is_plain and dlse is None:
        *dq_and_dk, dv = _attend_plain_bwd(span, lse, dout, q, k, v, out)
    else:
        dlse = torch.zeros_like(lse) if dlse is None else span.of_lse(dlse)
        parts = attend_in_blocks_bwd(span, *(x[0] for x in (dout, dlse, q, k, v, out, lse)))
        *dq_and_dk, dv = (part[None] for part in parts)
    rotation.undo(dq_and_dk, [q, k], span)
    return *dq_and_dk, dv


@fixed_products()
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
    spans, rotation = cut_into_spans(q, k, tables, tokens, rule), _Rotation(tables, rotate_q, rotate_k)
    saves_q, saves_k = save and rotate_q, save and rotate_k
    if is_everything(spans, q, k):
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


@fixed_products()
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

    q and k are the rotated ones.
    """
    spans = cut_into_spans(q, k, tables, tokens, rule, in_blocks=dlse is not None)
    sizes = (tables.coarse.shape[0], tables.coarse.shape[3])
    dfreq = q.new_zeros(sizes if wants_dfreq else 0, dtype=torch.float64)
    rotation = _Rotation(tables, rotate_q, rotate_k, dfreq if wants_dfreq else None)
    tensors = (dout, dlse, q, k, v, out, lse)
    if is_everything(spans, q, k):
        return *_attend_bwd(tensors, spans[0], rotation), dfreq
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for span in spans:
        parts = _attend_bwd(tensors, span, rotation)
        for whole, part in zip((span.of_queries(dq), span.of_keys(dk), span.of_keys(dv)), parts, strict=True):
            whole.copy_(part)
    return dq, dk, dv, dfreq
