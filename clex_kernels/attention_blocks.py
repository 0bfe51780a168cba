"""Attention of one span in blocks of queries and keys, in plain torch: nothing of size L x S is ever there.

The H / G heads that share a key head are rows of one matrix [G, H/G rows, D], and the softmax runs along:

    forward    m' = max(m, max logits)     P = exp(logits - m')      l, out = exp(m - m') (l, out) + P (1, v)
    backward   P = exp(logits - lse)       delta = sum(dout out) - dlse       dlogits = P (dout v^T - delta)
               dv = P^T dout               dq = scale dlogits k               dk = scale dlogits^T q

and with a softcap c, logits = c tanh(u), dlogits times 1 - tanh^2(u).

Shapes, of a single sequence: q [L, H, D], k and v [S, G, D], lse [H, L].
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from clex_kernels.attention_spans import Span

# queries and keys of a block: of 32..256 by 128..1024 the best or near it for L = 2048, H 16, G 4, D 64, fp32, two
# cores of Zen 4: 95 ms causal and 150 ms full, where 256 x 512 takes 119 and 165.
_ROWS, _COLUMNS = 128, 256


def _blocks(span: Span) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with the blocks of keys that it sees something of."""
    queries, keys = span.size
    for first in range(0, queries, _ROWS):
        rows = slice(first, min(first + _ROWS, queries))
        start = 0 if span.window is None else max(0, span.shift + rows.start - span.window + 1)
        end = min(keys, span.shift + rows.stop) if span.is_causal else keys
        yield rows, [slice(column, min(column + _COLUMNS, end)) for column in range(start, end, _COLUMNS)]


def _hide(logits: Tensor, span: Span, rows: slice, columns: slice) -> None:
    """Sets what the rule hides of a block [G, H/G rows, columns] to -inf."""
    first, last = span.shift + rows.start, span.shift + rows.stop - 1
    is_early = span.window is not None and columns.start <= last - span.window
    if is_early or (span.is_causal and columns.stop - 1 > first):
        ahead = torch.arange(columns.start, columns.stop) - torch.arange(first, last + 1)[:, None]
        hidden = (ahead > 0) | (ahead <= -span.window) if is_early else ahead > 0
        logits.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, -math.inf)


def _stack_heads(x: Tensor, groups: int) -> Tensor:
    """[rows, H, D] as [G, H/G rows, D], in fp32 at least and in memory of its own unless H is G."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _unstack_heads(x: Tensor, rows: int) -> Tensor:
    """The way back to [rows, H, D]."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


# inside the operators autocast would still turn matrix products to bf16.
@torch.autocast("cpu", enabled=False)
def attend_in_blocks(span: Span, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
def attend_in_blocks_bwd(
    span: Span, dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
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
