"""Attention forward: q' k'^T by the rule, softmax, times v, in one pass over the keys (FlashAttention-2).

    q', k' = rotary(q), rotary(k)    lse = ln sum_j exp(logits_j)    out = sum_j exp(logits_j - lse) v_j

Keys are rotated once, by a pass over k alone, and queries once per program, before its loop over the keys: the loop is
that of attention without rotary. Under grouped heads the pass over k moves a fraction of what q takes.

Loops differ by where q' comes from (QUERY). Of heads rotated whole its halves may stay as they are, with keys in halves
as well, or be joined in registers, where that costs the loop nothing. Else a program writes the q' of its rows to
memory and loads it back as it would q: to where it is saved, or to these rows of out, which the program writes last.

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
    head_constants,
    launch_config,
    precision,
    rule_constants,
    sequence_count,
    tile_count,
    token_arguments,
)
from clex_kernels.kernels.common import strides
from clex_kernels.kernels.launch_tables import (
    ATTENTION_FWD,
    ATTENTION_FWD_KEYS,
    READS_SHARED,
    architecture_of,
    constants_of,
    dtype_kind,
    find_entry,
)
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
    QUERY: tl.constexpr,
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
    """out, lse and, unless None, q' of BLOCK_L queries; k has rotated keys. q_rotated may be out."""
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
    shift = shift_of(q_first, k_first)
    # rows past the end repeat the last. Masked they would share their mask with out, which would be kept in registers.
    there = tl.minimum(offs_l, queries - 1)
    ptrs = row_pointers(q, at, q_row + there, h)
    if ROTATE_Q:
        sees = sees_something(there, queries, start, end, shift, window, IS_CAUSAL)
        cos, sin = load_rotation(table, b, q_first + there, sees, T, num_rows, R, TILE, BLOCK_R)
        rotated = rotate_parts(load_parts(ptrs, None, R, TAIL, BLOCK_R, BLOCK_T), cos, sin)
        rotated = cast_parts(rotated, q.ptr.dtype.element_ty)
        if q_rotated is not None:
            ptrs = row_pointers(q_rotated, at, q_row + there, h)
            store_parts(ptrs, rotated, None, R, TAIL)
            # other threads load what this one stored.
            tl.debug_barrier()
    if QUERY == "halves":
        query = rotated
    elif QUERY == "joined":
        query = join_halves(rotated)
    else:
        query = (load_columns(ptrs, None, D, BLOCK_D),)
    # a head in one part is all tail.
    KEY_R: tl.constexpr = R if QUERY == "halves" else 0
    KEY_TAIL: tl.constexpr = 0 if QUERY == "halves" else D
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
                *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, BLOCK_D),
            )
    for slot in range(whole_start, whole_end, BLOCK_S):
        state = attend(
            *(state, query, k, v, at, k_row + slot + offs_s, h // group, None, None, scale),
            *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, BLOCK_D),
        )
    for slot in range(whole_end, high, BLOCK_S):
        slots = slot + offs_s
        seen = is_visible(offs_l[:, None], slots[None, :], start, end, shift, window, IS_CAUSAL)
        state = attend(
            *(state, query, k, v, at, k_row + slots, h // group, seen, slots < high, scale),
            *(D, KEY_R, KEY_TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, BLOCK_D),
        )

    weighted, total, largest = state
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    store_columns(row_pointers(out, at, rows_l, h), weighted / total[:, None], mask_l, D)
    lse = tl.where(is_empty, float("-inf"), largest / LOG2_E + tl.log(total))
    tl.store(lse_ptr + (at * tl.num_programs(1) + h) * L + rows_l, lse, mask=mask_l)


def forward_config(q: torch.Tensor, pairs: int, softcap: float | None) -> dict[str, int | str]:
    """Constexprs, warps and stages, among them how q' comes into the loop.

    Counted instructions of the loop with q' in halves, joined and stored, D 128: 482, 778, 487 on sm_80; 647, 597, 597
    on sm_100. On sm_90 563 joined and 569 stored, but for D 256 544 and 512.
    """
    config = launch_config(ATTENTION_FWD, q, 0) | head_constants(q.shape[3], pairs)
    reads_shared = architecture_of(q) in READS_SHARED and dtype_kind(q) == "half"
    if reads_shared and softcap is not None:
        # the tanh beside so many products spills.
        config["BLOCK_S"] = min(config["BLOCK_S"], 64)
    query = "stored"
    if config["TAIL"] == 0 and config["R"] == config["BLOCK_R"] and dtype_kind(q) == "half":
        query = "halves" if not reads_shared else "joined" if config["BLOCK_D"] <= 128 else "stored"
    return {**config, "QUERY": query}


def launch_attention_fwd_keys(k: torch.Tensor, k_rotated: torch.Tensor, tables: Tables, tokens: Tokens, L: int) -> None:
    """Rotate the valid slots of k [B, S, G, D] into k_rotated; L is the row length of q, for default positions."""
    T, C, _, R = tables.coarse.shape
    tile = tables.fine.shape[1]
    keys_tile = find_entry(ATTENTION_FWD_KEYS, k, k.shape[1])
    grid = (tile_count(tokens.cu_seqlens_k, k.shape[0], k.shape[1], keys_tile.block_l),)
    with torch.cuda.device_of(k):
        attention_fwd_keys_kernel[grid](
            *(Operand.of(k), k_rotated, strides(k_rotated, 3), TableOperand.of(tables)),
            *(*token_arguments(tokens), L, k.shape[1], k.shape[2], sequence_count(k.shape[0], tokens), T, C * tile),
            R=R,
            TAIL=k.shape[3] - 2 * R,
            TILE=tile,
            BLOCK_R=triton.next_power_of_2(R),
            **constants_of(keys_tile),
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
        if rotate_q and q_rotated is None and config["QUERY"] == "stored":
            q_rotated = out
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
