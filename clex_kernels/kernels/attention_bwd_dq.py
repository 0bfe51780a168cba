"""dq of attention: one program per BLOCK_L queries of a sequence and query head goes over the keys they see.

    dlogits = P (dout v^T - delta)        dq' = scale dlogits k'        dq, dfreq: attention_bwd_rows.py

With a softcap, dlogits times 1 - tanh^2. Blocks of keys as in the forward kernel.
"""

import triton
import triton.language as tl

from clex_kernels.kernels.attention_bwd_rows import finish_rows, load_query_rows, weigh
from clex_kernels.kernels.attention_launch import NOT_SPECIALIZED
from clex_kernels.kernels.parts import (
    add_products,
    dot_parts,
    load_columns,
    load_parts,
    scale_parts,
    split_halves,
    zero_parts,
)
from clex_kernels.kernels.sequences import (
    cap,
    find_tile,
    is_visible,
    key_blocks,
    load_scale,
    load_sequence,
    row_pointers,
    sees_something,
    shift_of,
)


@triton.jit
def add_dq(
    dq,
    query,
    dout,
    lse,
    delta,
    k,
    v,
    at,
    rows,
    h,
    seen,
    mask,
    scale,
    D: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One block of keys added to dq' / scale; seen [BLOCK_L, BLOCK_S] and mask [BLOCK_S] as in the forward kernel."""
    keys = load_parts(row_pointers(k, at, rows, h), mask, R, TAIL, BLOCK_R, BLOCK_T)
    values = load_columns(row_pointers(v, at, rows, h), mask, D, BLOCK_D)
    logits, log2_scale = cap(dot_parts(query, keys, lse.dtype, PRECISION), scale, SOFTCAP)
    weights = weigh(logits, log2_scale, lse[:, None], seen)
    dweights = tl.dot(dout, tl.trans(values), input_precision=PRECISION, out_dtype=lse.dtype)
    dlogits = weights * (dweights - delta[:, None])
    if SOFTCAP is not None:
        dlogits *= 1.0 - logits * logits
    return add_products(dq, dlogits.to(values.dtype), keys, PRECISION)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dq_kernel(
    dout,
    q,
    k,
    v,
    lse_ptr,
    delta_ptr,
    table,
    dq,
    partials_ptr,
    tokens,
    q_offset,
    k_offset,
    L,
    S,
    batch,
    group,
    window,
    T,
    num_rows,
    ROTATE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_JOINED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOG_BASE: tl.constexpr,
    LOG_CLAMPED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dq of BLOCK_L queries of a head, and their share of dfreq [tiles, H, R]."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b, first = find_tile(tile, tokens.cu_seqlens_q, L, batch, BLOCK_L)
    at, q_row, queries, k_row, start, end, q_first, k_first = load_sequence(tokens, q_offset, k_offset, b, L, S)
    if first >= queries:
        return
    offs_l = first + tl.arange(0, BLOCK_L)
    mask_l = offs_l < queries
    rows_l = q_row + offs_l
    # a head in one part is all tail.
    PART_R: tl.constexpr = 0 if IS_JOINED else R
    PART_TAIL: tl.constexpr = D if IS_JOINED else TAIL
    PART_BLOCK: tl.constexpr = BLOCK_D if IS_JOINED else BLOCK_T
    query = load_parts(row_pointers(q, at, rows_l, h), mask_l, PART_R, PART_TAIL, BLOCK_R, PART_BLOCK)
    dout_rows = load_columns(row_pointers(dout, at, rows_l, h), mask_l, D, BLOCK_D)
    lse_start = (at * tl.num_programs(1) + h) * L
    lse, delta = load_query_rows(lse_ptr + lse_start, delta_ptr + lse_start, rows_l, mask_l)

    shift = shift_of(q_first, k_first)
    low, whole_start, whole_end, high = key_blocks(
        first, queries, start, end, shift, window, IS_CAUSAL, BLOCK_L, BLOCK_S
    )
    scale = load_scale(tokens, b, start, end, dtype, SCALE, LOG_BASE, LOG_CLAMPED)
    total = zero_parts(BLOCK_L, PART_R, PART_TAIL, BLOCK_R, PART_BLOCK, dtype)
    offs_s = tl.arange(0, BLOCK_S)
    if window is not None:
        for slot in range(low, tl.minimum(whole_start, high), BLOCK_S):
            slots = slot + offs_s
            seen = is_visible(offs_l[:, None], slots[None, :], start, end, shift, window, IS_CAUSAL)
            total = add_dq(
                *(total, query, dout_rows, lse, delta, k, v, at, k_row + slots, h // group, seen, slots < high, scale),
                *(D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
            )
    for slot in range(whole_start, whole_end, BLOCK_S):
        total = add_dq(
            *(total, query, dout_rows, lse, delta, k, v, at, k_row + slot + offs_s, h // group, None, None, scale),
            *(D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
        )
    for slot in range(whole_end, high, BLOCK_S):
        slots = slot + offs_s
        seen = is_visible(offs_l[:, None], slots[None, :], start, end, shift, window, IS_CAUSAL)
        total = add_dq(
            *(total, query, dout_rows, lse, delta, k, v, at, k_row + slots, h // group, seen, slots < high, scale),
            *(D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
        )

    sees = sees_something(offs_l, queries, start, end, shift, window, IS_CAUSAL)
    # distances are from the first row that sees a key.
    first_row = tl.maximum(q_first + first, k_first + start) if IS_CAUSAL else q_first + first
    if partials_ptr is not None:
        partials_ptr += (tile.to(tl.int64) * tl.num_programs(1) + h) * R
    if IS_JOINED:
        # q' is read again in halves, dq' comes apart in registers, not rounded.
        total = split_halves(total)
        query = load_parts(row_pointers(q, at, rows_l, h), mask_l, R, TAIL, BLOCK_R, BLOCK_T)
    finish_rows(
        *(scale_parts(total, scale), query, row_pointers(dq, at, rows_l, h), mask_l, partials_ptr, table, b),
        *(q_first + offs_l, first_row, k_first + start, sees, T, num_rows, ROTATE, IS_CENTRED, R, TAIL, TILE, BLOCK_R),
    )
