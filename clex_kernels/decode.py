"""Decoding over a cache of raw keys, which are rotated on load by the frequencies of this very step.

    q', k' = rotary(q), rotary(k)     logits = rule(q' k'^T)     out = softmax(logits) v

Key slot j stands at position j, and the L queries of a sequence at the last L of its valid slots. Only differences of
positions matter, so with F rows in the fine table, and a tile of keys beginning at slot m = F c,

    q'_p . k'_(m + j)  =  (rotation by p freq - m freq of q) . (rotation by j freq of k_(m + j))
                       =  (conj(coarse[c]) * q'_p) . (fine[j] * k_(m + j)):

keys of every tile are rotated by the same F rows, and q once per tile by one row of the coarse table. No trigonometry
and no table traffic per key. An amplitude in coarse counts twice, on q' and in conj(coarse[c]), as it must.

A sequence is split into ranges of keys by its own length alone, so that it gives the same bits alone and in any batch.

Shapes: q [B, L, H, D]; caches [B, S, G, D], or a pool [pages, P, G, D] in which slot j of sequence b is slot j % P of
page block_table[b, j // P]; lse [B, H, L].
"""

from typing import Any, Literal

import torch
from torch import Tensor

from clex_kernels.attention_checks import ROTATED, check_rule
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.config import check_flag
from clex_kernels.decode_checks import check_cache, check_choices, check_slots, check_table
from clex_kernels.extension import library
from clex_kernels.rotary_checks import check_no_tangent
from clex_kernels.sharded_calls import sharded_decode
from clex_kernels.sharding import is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack

# train_length: the table of a sequence is that of t = ceil(length / train_length) among t = 1, 2, .., T.
library.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor coarse, Tensor fine, Tensor? index, "
    "Tensor kv_end, Tensor? kv_start, Tensor? lengths, Tensor? block_table, SymInt? train_length, "
    "float scale, SymInt? window, float? softcap, float? log_base, bool log_clamped, "
    "bool rotate_q, bool rotate_k, bool with_lse) -> (Tensor out, Tensor lse)"
)


def _results(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Memory for out, and for lse if it is asked for."""
    batch, length, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((batch, heads, length) if with_lse else 0, dtype=dtype)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _decode_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _results(q, arguments[-1])


def _decode_cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    coarse: Tensor,
    fine: Tensor,
    index: Tensor | None,
    kv_end: Tensor,
    kv_start: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    train_length: int | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    log_base: float | None,
    log_clamped: bool,
    rotate_q: bool,
    rotate_k: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    # imported at the first call: Triton does not exist on every platform.
    from clex_kernels.kernels.decode import launch_decode

    out, lse = _results(q, with_lse)
    if q.numel() == 0:
        return out, lse
    if k_cache.numel() == 0 or (block_table is not None and block_table.numel() == 0):
        return out.zero_(), lse.fill_(-torch.inf)
    # kernels read bounds as if they were dense.
    kv_start, kv_end, lengths = (None if x is None else x.contiguous() for x in (kv_start, kv_end, lengths))
    launch_decode(
        q,
        k_cache,
        v_cache,
        Tables(coarse, fine, None, index),
        Tokens(kv_start=kv_start, kv_end=kv_end, lengths=lengths),
        block_table,
        train_length,
        Rule(scale, True, window, softcap, log_base, log_clamped),
        (rotate_q, rotate_k),
        out,
        lse if with_lse else None,
    )
    return out, lse


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("decode_attention: has no gradients, which attention() has")


torch.library.register_fake("clex::decode", _decode_fake, lib=library)
torch.library.register_autograd("clex::decode", _no_gradient, setup_context=_no_context, lib=library)
library.impl("decode", _decode_cuda, "CUDA")


def prepare_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: RotaryTable | RotaryTableStack,
    kv_end: int | Tensor,
    kv_start: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    rotated: str,
    return_lse: bool,
    debug: bool,
) -> tuple[Any, ...]:
    """Check decode_attention's arguments; returns those of the operator that follow q and the caches.

    They serve all calls of one step whose q and caches have these shapes, dtypes and devices, and unit stride in D.
    """
    check_flag("return_lse", return_lse)
    check_flag("debug", debug)
    cache = check_cache("q", q, k_cache, v_cache, block_table)
    check_choices(cache, table, rotated)
    rule = check_rule(q, scale, True, window, softcap, table)
    slots = check_slots(cache, kv_end, kv_start, lengths, debug)
    check_no_tangent("decode_attention", q, k_cache, v_cache)
    rotates = ROTATED[rotated]
    *tables, train_length = check_table(cache, table, slots, any(rotates), debug)
    numbers = (rule.scale, rule.window, rule.softcap, rule.log_base, rule.log_clamped)
    return *tables, slots.kv_end, kv_start, lengths, block_table, train_length, *numbers, *rotates, return_lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: RotaryTable | RotaryTableStack,
    kv_end: int | Tensor,
    kv_start: Tensor | None = None,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rotated: Literal["none", "q", "k", "qk"] = "none",
    return_lse: bool = False,
    *,
    debug: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new tokens over a cache of raw keys, rotated here by `table`; without gradients.

    The new tokens' own keys and values are in the cache already (append_kv), and each sees those up to itself. All
    rows of a sequence share one t, also where its length crosses a boundary of t between them.

    On the CPU the operator allocates nothing but its output, beside memory that a thread keeps for its next call; on a
    GPU nothing waits for the device, and a captured CUDA graph stays right while kv_end, kv_start, lengths, block_table
    and the caches are written in place. DTensors: see sharding.py.

    Args:
        q: [B, L, H, D], L from 0 to 16, with unit stride in D; fp32, fp16, bf16, or fp64 on the CPU (with an fp64
            table). D up to 256 on a GPU.
        k_cache: [B, S, G, D] of q's dtype, any strides with unit stride in D; with a block_table [pages, P, G, D], P a
            multiple of 16. Query head h reads key head h // (H / G).
        v_cache: like k_cache. Infinite values also reach the call's earlier queries, as NaN.
        table: angles of all sequences at positions 0, 1, 2, ...; or a stack with a table per sequence, by its index or
            else by `lengths`, on the device (`rope.stack()` for integer t, `rope.at(lengths)` for continuous t).
        kv_end: [B] int32 or int64, end of a sequence's valid slots, new tokens included; or one int for all. Queries
            that stand before slot 0 or kv_start see nothing, and give 0; so does a sequence with kv_end = 0.
        kv_start: [B], first valid slot; None: 0.
        lengths: [B], token counts, which choose from the stack and enter the log_scale; None: kv_end - kv_start.
        block_table: [B, pages of a sequence] int32 or int64: which page of the pool holds slots j P to j P + P - 1.
            Entries past kv_end and before kv_start may be anything.
        scale: of the logits, 2^-30 to 2^30; None: D^(-1/2).
        window: tokens that a query sees, itself included; None: all.
        softcap: c in c tanh(logits / c), 2^-30 to 2^30; None: no cap.
        rotated: what comes rotated already and is not rotated here.
        return_lse: also return lse [B, H, L], natural logarithm, fp32 (fp64 for fp64), -inf where nothing is seen.
        debug: also check values that lie on a device, which waits for it. Without it bounds on a device are cut to the
            cache, and rows or pages that do not exist give NaN.

    Returns:
        out [B, L, H, D], or (out, lse).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, or a table of sampled positions came.
        RuntimeError: from backward(), or a tensor comes with a tangent.
    """
    if is_dtensor(q):
        terms = {"kv_end": kv_end, "kv_start": kv_start, "lengths": lengths, "block_table": block_table}
        terms |= {"scale": scale, "window": window, "softcap": softcap, "rotated": rotated}
        return sharded_decode(decode_attention, q, k_cache, v_cache, table, return_lse, debug, **terms)
    arguments = prepare_decode(
        *(q, k_cache, v_cache, table, kv_end, kv_start, lengths, block_table),
        *(scale, window, softcap, rotated, return_lse, debug),
    )
    out, lse = torch.ops.clex.decode(q, k_cache, v_cache, *arguments)
    return (out, lse) if return_lse else out
