"""dk and dv of attention: a program per BLOCK_S slots of a sequence and key head goes over the queries that see them.

    dv = P^T dout     dlogits = P (dout v^T - delta)     dk' = scale dlogits^T q'     dk, dfreq: attention_bwd_rows.py

With a softcap, dlogits times 1 - tanh^2. Products are transposed: slots are rows. The queries are those of all heads
that read the key head, head by head; of each, in blocks that see all of the program's slots, with blocks that need a
mask before and after.
"""

import triton
import triton.language as tl

from clex_kernels.kernels.attention_bwd_rows import finish_rows, load_query_rows, weigh
from clex_kernels.kernels.attention_launch import NOT_SPECIALIZED
from clex_kernels.kernels.parts import (
    add_products,
    dot_parts,
    keep_rows,
    load_columns,
    load_parts,
    scale_parts,
    split_halves,
    store_columns,
    zero_parts,
)
from clex_kernels.kernels.sequences import (
    cap,
    find_tile,
    is_visible,
    load_scale,
    load_sequence,
    query_blocks,
    row_pointers,
    shift_of,
)


@triton.jit
def add_dk_dv(
    sums,
    keys,
    values,
    q,
    dout,
    lse_ptr,
    delta_ptr,
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
    """One block of queries added to dk' / scale and dv; seen [BLOCK_S, BLOCK_L] and mask [BLOCK_L] may be None."""
    dk, dv = sums
    query = load_parts(row_pointers(q, at, rows, h), mask, R, TAIL, BLOCK_R, BLOCK_T)
    dout_rows = load_columns(row_pointers(dout, at, rows, h), mask, D, BLOCK_D)
    lse, delta = load_query_rows(lse_ptr, delta_ptr, rows, mask)
    logits, log2_scale = cap(dot_parts(keys, query, lse.dtype, PRECISION), scale, SOFTCAP)
    weights = weigh(logits, log2_scale, lse[None, :], seen)
    dv = tl.dot(weights.to(dout_rows.dtype), dout_rows, dv, input_precision=PRECISION, out_dtype=dv.dtype)
    dweights = tl.dot(values, tl.trans(dout_rows), input_precision=PRECISION, out_dtype=lse.dtype)
    dlogits = weights * (dweights - delta[None, :])
    if SOFTCAP is not None:
        dlogits *= 1.0 - logits * logits
    return (add_products(dk, dlogits.to(dout_rows.dtype), query, PRECISION), dv)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_bwd_dkv_kernel(
    dout,
    q,
    k,
    v,
    lse_ptr,
    delta_ptr,
    table,
    dk,
    dv,
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
    """dk and dv of BLOCK_S slots of a key head where they are valid, and their share of dfreq [tiles, G, R]."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    b, first = find_tile(tl.program_id(0), tokens.cu_seqlens_k, S, batch, BLOCK_S)
    at, q_row, queries, k_row, start, end, q_first, k_first = load_sequence(tokens, q_offset, k_offset, b, L, S)
    slots = first + tl.arange(0, BLOCK_S)
    mask_s = (slots >= start) & (slots < end)
    key_head = tl.program_id(1).to(tl.int64)
    rows_s = k_row + slots
    # a head in one part is all tail.
    PART_R: tl.constexpr = 0 if IS_JOINED else R
    PART_TAIL: tl.constexpr = D if IS_JOINED else TAIL
    PART_BLOCK: tl.constexpr = BLOCK_D if IS_JOINED else BLOCK_T
    keys = load_parts(row_pointers(k, at, rows_s, key_head), mask_s, PART_R, PART_TAIL, BLOCK_R, PART_BLOCK)
    values = load_columns(row_pointers(v, at, rows_s, key_head), mask_s, D, BLOCK_D)

    shift = shift_of(q_first, k_first)
    low, whole_start, whole_end, high = query_blocks(
        first, queries, start, end, shift, window, IS_CAUSAL, BLOCK_L, BLOCK_S
    )
    if (first >= end) | (first + BLOCK_S <= start):
        # nobody sees these slots.
        whole_end, high = whole_start, low
    scale = load_scale(tokens, b, start, end, dtype, SCALE, LOG_BASE, LOG_CLAMPED)
    sums = (zero_parts(BLOCK_S, PART_R, PART_TAIL, BLOCK_R, PART_BLOCK, dtype), tl.zeros([BLOCK_S, BLOCK_D], dtype))
    offs_l = tl.arange(0, BLOCK_L)
    for member in range(group):
        h = key_head * group + member
        lse_start = (at * tl.num_programs(1) * group + h) * L
        lse_head_ptr, delta_head_ptr = lse_ptr + lse_start, delta_ptr + lse_start
        if IS_CAUSAL:
            for row in range(low, tl.minimum(whole_start, high), BLOCK_L):
                offs = row + offs_l
                seen = is_visible(offs[None, :], slots[:, None], start, end, shift, window, IS_CAUSAL)
                sums = add_dk_dv(
                    *(sums, keys, values, q, dout, lse_head_ptr, delta_head_ptr, at, q_row + offs, h),
                    *(seen, offs < high, scale, D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
                )
        for row in range(whole_start, whole_end, BLOCK_L):
            sums = add_dk_dv(
                *(sums, keys, values, q, dout, lse_head_ptr, delta_head_ptr, at, q_row + row + offs_l, h),
                *(None, None, scale, D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
            )
        for row in range(whole_end, high, BLOCK_L):
            offs = row + offs_l
            seen = is_visible(offs[None, :], slots[:, None], start, end, shift, window, IS_CAUSAL)
            sums = add_dk_dv(
                *(sums, keys, values, q, dout, lse_head_ptr, delta_head_ptr, at, q_row + offs, h),
                *(seen, offs < high, scale, D, PART_R, PART_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, PART_BLOCK),
            )

    dk_rows, dv_rows = sums
    store_columns(row_pointers(dv, at, rows_s, key_head), dv_rows, mask_s, D)
    if IS_JOINED:
        dk_rows = split_halves(dk_rows)
    # slots that are not valid are not masked in the blocks that see all the others: keep nothing of theirs.
    dk_rows = keep_rows(scale_parts(dk_rows, scale), mask_s)
    # read again: keeping them in registers through the loops would make these spill.
    keys = load_parts(row_pointers(k, at, rows_s, key_head), mask_s, R, TAIL, BLOCK_R, BLOCK_T)
    if partials_ptr is not None:
        partials_ptr += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + key_head) * R
    finish_rows(
        *(dk_rows, keys, row_pointers(dk, at, rows_s, key_head), mask_s, partials_ptr, table, b),
        *(k_first + slots, k_first + tl.maximum(first, start), k_first + start, mask_s, T, num_rows),
        *(ROTATE, IS_CENTRED, R, TAIL, TILE, BLOCK_R),
    )
