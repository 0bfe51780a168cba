"""Attention forward: q' k'^T by the rule, softmax, times v, in one pass over the keys (FlashAttention-2).

    q', k' = rotary(q), rotary(k)    lse = ln sum_j exp(logits_j)    out = sum_j exp(logits_j - lse) v_j

Keys are rotated once, by a pass over k alone, and queries once per program, before its loop over the keys: the loop is
that of attention without rotary. Under grouped heads the pass over k moves a fraction of what q takes.

Grid of the pass over k: a program per BLOCK_L slots of a sequence, for all heads. Grid of the attention: a program per
BLOCK_L queries of a sequence and per query head, the last tiles first, since under causality they take longest. It goes
from the first visible key on, in blocks that all its queries see whole, with blocks that need a mask before and after.

Saved for the backward pass: q' and k', and lse (natural logarithm; -inf where nothing is seen, and out is 0 there).
"""

import torch
import triton
import triton.language as tl

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels.attention_launch import (
    NOT_SPECIALIZED,
    Operand,
    TableOperand,
    launch_config,
    precision,
    product_kind,
    rule_constants,
    sequence_count,
    tile_count,
    token_arguments,
)
from clex_kernels.kernels.common import strides
from clex_kernels.kernels.parts import (
    cast_parts,
    dot_parts,
    join_halves,
    load_columns,
    load_parts,
    rotate_parts,
    store_columns,
    store_parts,
)
from clex_kernels.kernels.rotary import rotate_heads
from clex_kernels.kernels.sequences import (
    LOG2_E,
    cap,
    find_tile,
    is_visible,
    key_blocks,
    load_rotation,
    load_scale,
    load_sequence,
    row_pointers,
    sees_something,
    shift_of,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_fwd_keys_kernel(
    k,
    k_rotated_ptr,
    k_rotated_strides,
    table,
    tokens,
    q_offset,
    k_offset,
    L,
    S,
    G,
    batch,
    T,
    num_rows,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The pass over k; blocks without valid slots, and slots past these, are neither read nor written."""
    b, first = find_tile(tl.program_id(0), tokens.cu_seqlens_k, S, batch, BLOCK_L)
    at, _, _, k_row, start, end, _, k_first = load_sequence(tokens, q_offset, k_offset, b, L, S)
    if first + BLOCK_L <= start:
        return
    slots = first + tl.arange(0, BLOCK_L)
    mask = (slots >= start) & (slots < end)
    cos, sin = load_rotation(table, b, k_first + slots, mask, T, num_rows, R, TILE, BLOCK_R)
    rotate_heads(
        *(k.ptr + k_row * k.strides[1], k_rotated_ptr + k_row * k_rotated_strides[1], k.strides, k_rotated_strides),
        *(at, slots, end, G, cos[None, :, :], sin[None, :, :], R, TAIL, BLOCK_H),
    )


@triton.jit
def attend(
    state,
    q,
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
    """One block of keys added to the state: out not yet divided, sum of exponentials, largest logit in base 2.

    seen [BLOCK_L, BLOCK_S] is None where every query sees every key. mask [BLOCK_S] leaves out slots that none sees:
    they may hold anything, and 0 * NaN would let it through.
    """
    out, total, largest = state
    keys = load_parts(row_pointers(k, at, rows, h), mask, R, TAIL, BLOCK_R, BLOCK_T)
    logits, log2_scale = cap(dot_parts(q, keys, out.dtype, PRECISION), scale, SOFTCAP)
    if seen is not None:
        logits = tl.where(seen, logits, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, axis=1) * log2_scale)
    # a query that has seen nothing yet must not subtract infinity from itself.
    base = new_largest if seen is None else tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(logits * log2_scale - base[:, None])
    faded = tl.exp2(largest - base)
    values = load_columns(row_pointers(v, at, rows, h), mask, D, BLOCK_D)
    out = tl.dot(weights.to(values.dtype), values, out * faded[:, None], input_precision=PRECISION, out_dtype=out.dtype)
    return (out, total * faded + tl.sum(weights, axis=1), new_largest)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def attention_fwd_kernel(
    q,
    k,
    v,
    table,
    q_rotated,
    out,
    lse_ptr,
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
    ROTATE_Q: tl.constexpr,
    JOIN_HALVES: tl.constexpr,
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
    """out, lse and, unless None, q' of BLOCK_L queries; k has rotated keys."""
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
    query = load_parts(row_pointers(q, at, rows_l, h), mask_l, R, TAIL, BLOCK_R, BLOCK_T)
    shift = shift_of(q_first, k_first)
    if ROTATE_Q:
        sees = sees_something(offs_l, queries, start, end, shift, window, IS_CAUSAL)
        cos, sin = load_rotation(table, b, q_first + offs_l, sees, T, num_rows, R, TILE, BLOCK_R)
        query = cast_parts(rotate_parts(query, cos, sin), q.ptr.dtype.element_ty)
        if q_rotated is not None:
            store_parts(row_pointers(q_rotated, at, rows_l, h), query, mask_l, R, TAIL)

    KEY_R: tl.constexpr = 0 if JOIN_HALVES else R
    KEY_TAIL: tl.constexpr = D if JOIN_HALVES else TAIL
    KEY_BLOCK_T: tl.constexpr = BLOCK_D if JOIN_HALVES else BLOCK_T
    if JOIN_HALVES:
        query = join_halves(query)
    low, whole_start, whole_end, high = key_blocks(
        first, queries, start, end, shift, window, IS_CAUSAL, BLOCK_L, BLOCK_S
    )
    scale = load_scale(tokens, b, start, end, dtype, SCALE, LOG_BASE, LOG_CLAMPED)
    state = (
        tl.zeros([BLOCK_L, BLOCK_D], dtype),
        tl.zeros([BLOCK_L], dtype),
        tl.full([BLOCK_L], float("-inf"), dtype),
    )
    offs_s = tl.arange(0, BLOCK_S)
    if window is not None:
        for slot in range(low, tl.minimum(whole_start, high), BLOCK_S):
            slots = slot + offs_s
            seen = is_visible(offs_l[:, None], slots[None, :], start, end, shift, window, IS_CAUSAL)
            state = attend(
                *(state, query, k, v, at, k_row + slots, h // group, seen, slots < high, scale),
                *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, KEY_BLOCK_T),
            )
    for slot in range(whole_start, whole_end, BLOCK_S):
        state = attend(
            *(state, query, k, v, at, k_row + slot + offs_s, h // group, None, None, scale),
            *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, KEY_BLOCK_T),
        )
    for slot in range(whole_end, high, BLOCK_S):
        slots = slot + offs_s
        seen = is_visible(offs_l[:, None], slots[None, :], start, end, shift, window, IS_CAUSAL)
        state = attend(
            *(state, query, k, v, at, k_row + slots, h // group, seen, slots < high, scale),
            *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, KEY_BLOCK_T),
        )

    weighted, total, largest = state
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    store_columns(row_pointers(out, at, rows_l, h), weighted / total[:, None], mask_l, D)
    lse = tl.where(is_empty, float("-inf"), largest / LOG2_E + tl.log(total))
    tl.store(lse_ptr + (at * tl.num_programs(1) + h) * L + rows_l, lse, mask=mask_l)


TILES = {
    "mma": {64: (128, 64, 4, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2), 512: (32, 32, 4, 2)},
    "wgmma": {64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (128, 64, 8, 2), 512: (64, 32, 4, 2)},
    "fp32": {64: (64, 32, 8, 1), 128: (64, 16, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
}
# slots by heads in a program of the pass over k.
KEYS_TILE = {"BLOCK_L": 16, "BLOCK_H": 8, "num_warps": 4}


def forward_config(q: torch.Tensor, pairs: int, softcap: float | None) -> dict[str, int | bool]:
    """Constexprs, warps and stages, among them whether heads that are rotated whole are one part again in products.

    One product from shared memory is less work than two: 597 against 647 instructions in the loop on sm_100. From
    registers it is more, since joining moves them around in every trip: 778 against 482 on sm_80 (counted, D 128).
    """
    config = launch_config(TILES, q, pairs)
    is_wgmma = product_kind(q) == "wgmma"
    joins = is_wgmma and config["TAIL"] == 0 and config["R"] == config["BLOCK_R"]
    if is_wgmma and (softcap is not None or (pairs > 0 and not joins)):
        # on sm_100 several products of 128 columns exceed the tensor memory, where Triton 3.7 compiles a kernel that
        # traps, and the tanh beside them spills.
        config["BLOCK_S"] = min(config["BLOCK_S"], 64)
    return {**config, "JOIN_HALVES": joins}


def launch_attention_fwd_keys(k: torch.Tensor, k_rotated: torch.Tensor, tables: Tables, tokens: Tokens, L: int) -> None:
    """Rotate the valid slots of k [B, S, G, D] into k_rotated; L is the row length of q, for default positions."""
    T, C, _, R = tables.coarse.shape
    tile = tables.fine.shape[1]
    grid = (tile_count(tokens.cu_seqlens_k, k.shape[0], k.shape[1], KEYS_TILE["BLOCK_L"]),)
    with torch.cuda.device_of(k):
        attention_fwd_keys_kernel[grid](
            *(Operand.of(k), k_rotated, strides(k_rotated, 3), TableOperand.of(tables)),
            *(*token_arguments(tokens), L, k.shape[1], k.shape[2], sequence_count(k.shape[0], tokens), T, C * tile),
            R=R,
            TAIL=k.shape[3] - 2 * R,
            TILE=tile,
            BLOCK_R=triton.next_power_of_2(R),
            **KEYS_TILE,
        )


def launch_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: Tables,
    tokens: Tokens,
    rule: Rule,
    rotate_q: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_rotated: torch.Tensor | None,
) -> None:
    """Write out [B, L, H, D], contiguous lse [B, H, L] and q' (unless None) for q like out, k' and v [B, S, G, D].

    Nothing is written for tokens of no sequence. At least one token, key and head.
    """
    T, C, _, R = tables.coarse.shape
    tile = tables.fine.shape[1]
    with torch.cuda.device_of(q):
        config = forward_config(q, R if rotate_q else 0, rule.softcap)
        grid = (tile_count(tokens.cu_seqlens_q, q.shape[0], q.shape[1], config["BLOCK_L"]), q.shape[2])
        attention_fwd_kernel[grid](
            *(Operand.of(q), Operand.of(k), Operand.of(v), TableOperand.of(tables), Operand.of(q_rotated)),
            *(Operand.of(out), lse, *token_arguments(tokens), q.shape[1], k.shape[1]),
            *(sequence_count(q.shape[0], tokens), q.shape[2] // k.shape[2], rule.window, T, C * tile),
            ROTATE_Q=rotate_q,
            PRECISION=precision(q),
            TILE=tile,
            **rule_constants(rule),
            **config,
        )
