"""Decoding over a cache of raw keys, a program per range of a sequence's keys; decode_combine.py merges the ranges.

    q'_p . k'_(m + j)  =  (conj(coarse[c]) * q'_p) . (fine[j] * k_(m + j)),    m = 64 c, j < 64      (../decode.py)

Rows of a program are those of the L * H / G query rows that read one key head. They stay in fp32 and are turned once
per tile of 64 slots. The fine rows are the same for every tile and stay in registers: the loop reads K, V and one
coarse row a tile, and computes no sine. Where registers are short a step takes part of a tile: the same few fine rows
serve all parts, and the coarse row is turned on by a part's length from each part to the next.

kv_end is known on the device only, so the grid is that of a full cache, and programs past the last range of their
sequence return at once.

Grid: a program per range of a sequence, and per key head and block of its rows. What it gives: the softmax over its
range times v [B, G, rows, ranges, D], and the logarithm of the sum of exponentials [B, G, rows, ranges] in base 2.
"""

import math

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
    rule_constants,
)
from clex_kernels.kernels.common import load_table_index, rotate, strides
from clex_kernels.kernels.decode_combine import SLOTS, launch_decode_combine, most_ranges, most_splits, split_keys
from clex_kernels.kernels.launch_tables import DECODE, architecture_of
from clex_kernels.kernels.parts import cast_parts, dot_parts, load_columns, load_parts, rotate_parts, store_columns
from clex_kernels.kernels.sequences import (
    cap,
    load_length,
    load_rotation_of,
    load_scale,
    load_sequence,
    row_pointers,
    sees_something,
    shift_of,
)


@triton.jit
def choose_table(table, tokens, b, start, end, train_length, T):
    """Which table sequence b reads; perhaps none there is."""
    if train_length is None:
        return load_table_index(table.index, table.index_strides, b, T)
    else:
        t = (load_length(tokens, b, start, end).to(tl.int64) - 1) // train_length
        return tl.minimum(tl.maximum(t, 0), T - 1)


@triton.jit
def load_query(
    q,
    table,
    t,
    at,
    rows,
    heads,
    positions,
    mask,
    sees,
    T,
    num_rows,
    ROTATE_Q: tl.constexpr,
    ROTATE_K: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Parts of q', in the table's dtype if they are still to be turned.

    NaN where no table has the row of a query, nor then that of the last key it sees, which stands where it does.
    """
    query = load_parts(row_pointers(q, at, rows, heads.to(tl.int64)[:, None]), mask, R, TAIL, BLOCK_R, BLOCK_T)
    if ROTATE_Q:
        cos, sin = load_rotation_of(table, t, positions, sees, T, num_rows, R, TILE, BLOCK_R)
        query = rotate_parts(query, cos, sin)
    elif ROTATE_K:
        is_missing = sees & ((positions >= num_rows) | (t < 0) | (t >= T))
        one = tl.where(is_missing, float("nan"), 1.0).to(table.coarse.dtype.element_ty)[:, None]
        query = rotate_parts(query, one, tl.zeros_like(one))
    if not ROTATE_K:
        query = cast_parts(query, q.ptr.dtype.element_ty)
    return query


@triton.jit
def load_cosines_and_sines(ptrs, offs_r, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Table rows behind ptrs, zero past R."""
    if R < BLOCK_R:
        return tl.load(ptrs, mask=offs_r < R, other=0.0), tl.load(ptrs + R, mask=offs_r < R, other=0.0)
    else:
        return tl.load(ptrs), tl.load(ptrs + R)


@triton.jit
def load_fine(fine_ptr, stride, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Fine rows [BLOCK_S, BLOCK_R] of a block, and that from one block of a tile to the next, where it has several."""
    offs_s, offs_r = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BLOCK_R)
    rows = load_cosines_and_sines(fine_ptr + offs_s * stride + offs_r[None, :], offs_r[None, :], R, BLOCK_R)
    next_ptrs = fine_ptr + (BLOCK_S if BLOCK_S < SLOTS else 0) * stride + offs_r
    return rows, load_cosines_and_sines(next_ptrs, offs_r, R, BLOCK_R)


@triton.jit
def load_row(previous, step, coarse_ptr, stride, slot, num_rows, R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Row of the first slot of a block: the table's for a tile's first block, then the previous block's turned on."""
    BLOCK_R: tl.constexpr = previous[0].shape[0]
    offs_r = tl.arange(0, BLOCK_R)
    # who sees a key past the table is NaN already.
    tile = (tl.minimum(slot, num_rows - 1) // SLOTS).to(tl.int64)
    row_ptrs = coarse_ptr + tile * stride + offs_r
    if BLOCK_S == SLOTS:
        return load_cosines_and_sines(row_ptrs, offs_r, R, BLOCK_R)
    else:
        # a branch would keep the row from being loaded steps ahead like the keys, a mask does not.
        mask = (slot % SLOTS == 0) & (offs_r < R)
        first_cos, first_sin = tl.load(row_ptrs, mask=mask, other=0.0), tl.load(row_ptrs + R, mask=mask, other=0.0)
        cos, sin = rotate(previous[0], previous[1], step[0], step[1])
        # and no tl.where: sm_100 multiplies two numbers at once, a step at D 256 is 431 instructions and not 452.
        goes_on = (slot % SLOTS != 0).to(cos.dtype)
        return first_cos + goes_on * cos, first_sin + goes_on * sin


@triton.jit
def are_seen(slots, positions, low, window, HAS_LOW: tl.constexpr):
    """Which of the slots before the end are seen from where."""
    seen = slots <= positions
    if HAS_LOW:
        seen = seen & (slots >= low)
    if window is not None:
        seen = seen & (slots > positions - window)
    return seen


@triton.jit
def clamp_slots(slots, low, end, HAS_LOW: tl.constexpr):
    """The live slots nearest to slots: dead ones, and their pages, may hold anything."""
    slots = tl.minimum(slots, end - 1)
    return tl.maximum(slots, low) if HAS_LOW else slots


@triton.jit
def locate(block_table, page_stride, pages, at, runs, slots, PAGE: tl.constexpr, RUN: tl.constexpr):
    """Where live slots lie: row of the batch or page, and row in it. `runs` has one slot of each RUN that share a page.

    In place of a page there is not, the first or the last is read.
    """
    if block_table is None:
        return at, slots
    else:
        page = tl.load(block_table + runs // PAGE * page_stride)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        BLOCK: tl.constexpr = slots.shape[0]
        if BLOCK > RUN:
            page = tl.reshape(tl.broadcast_to(page[:, None], (BLOCK // RUN, RUN)), (BLOCK, 1))
        return page, slots % PAGE


@triton.jit
def has_pages(block_table, page_stride, pages, low, end, PAGE: tl.constexpr):
    """Whether there is a page for every slot of [low, end)."""
    last = (end - 1) // PAGE
    is_there = tl.arange(0, 64) >= 0
    for first in range(low // PAGE, last + 1, 64):
        page = tl.load(block_table + tl.minimum(first + tl.arange(0, 64), last) * page_stride)
        is_there = is_there & (page >= 0) & (page < pages)
    return tl.min(is_there.to(tl.int32), axis=0) > 0


@triton.jit
def add_keys(
    state,
    query,
    fine,
    row,
    k,
    v,
    page,
    rows,
    key_head,
    seen,
    scale,
    ROTATE_K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of keys, `row` that of its first slot, added to the state: out not yet divided, exponentials [BLOCK_L,
    BLOCK_S] not yet summed over slots, which would take two barriers a block, and the largest logits in base 2.
    """
    out, total, largest = state
    dtype: tl.constexpr = v.ptr.dtype.element_ty
    keys = load_parts(row_pointers(k, page, rows, key_head), None, R, TAIL, BLOCK_R, BLOCK_T)
    if ROTATE_K:
        query = cast_parts(rotate_parts(query, row[0][None, :], -row[1][None, :]), dtype)
        keys = cast_parts(rotate_parts(keys, fine[0], fine[1]), dtype)
    logits, log2_scale = cap(dot_parts(query, keys, out.dtype, PRECISION), scale, SOFTCAP)
    logits = tl.where(seen, logits * log2_scale, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_largest[:, None])
    faded = tl.exp2(largest - new_largest)[:, None]
    values = load_columns(row_pointers(v, page, rows, key_head), None, D, BLOCK_D)
    out = tl.dot(weights.to(dtype), values, out * faded, input_precision=PRECISION, out_dtype=out.dtype)
    return (out, total * faded + weights, new_largest)


# strides change with the most pages of a sequence, and would be specialized in a tuple.
CHANGING = ["row_stride", "page_stride", "pages", "train_length", "splits", "ranges"]


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, *CHANGING])
def decode_kernel(
    q,
    k,
    v,
    table,
    tokens,
    block_table,
    row_stride,
    page_stride,
    pages,
    partials_ptr,
    partial_lse_ptr,
    L,
    S,
    window,
    T,
    num_rows,
    train_length,
    splits,
    ranges,
    ROTATE_Q: tl.constexpr,
    ROTATE_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOG_BASE: tl.constexpr,
    LOG_CLAMPED: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    RUN: tl.constexpr,
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
    """What BLOCK_L rows of a key head make of one range of keys."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    b, split = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    at, _, _, _, start, end, q_first, k_first = load_sequence(tokens, None, 0, b, L, S)
    low, first, last, size = split_keys(start, end, L, window, splits)
    first += split * size
    last = tl.minimum(last, first + size)
    if first >= last:
        return
    blocks = tl.cdiv(L * GROUP, BLOCK_L)
    key_head, block = (tl.program_id(1) // blocks).to(tl.int64), tl.program_id(1) % blocks
    rows_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_l, heads = rows_l // GROUP, key_head * GROUP + rows_l % GROUP
    mask_l = offs_l < L
    shift = shift_of(q_first, k_first)
    sees = sees_something(offs_l, L, start, end, shift, window, IS_CAUSAL)
    t = choose_table(table, tokens, b, start, end, train_length, T)
    query = load_query(
        *(q, table, t, at, offs_l, heads, shift + offs_l, mask_l, sees, T, num_rows),
        *(ROTATE_Q, ROTATE_K, R, TAIL, TILE, BLOCK_R, BLOCK_T),
    )
    t = tl.minimum(tl.maximum(t, 0), T - 1)
    coarse_ptr, fine_ptr = table.coarse + t * table.strides[0], table.fine + t * table.strides[2]
    offs_s = tl.arange(0, BLOCK_S)
    if ROTATE_K:
        fine, step = load_fine(fine_ptr, table.strides[3], R, BLOCK_R, BLOCK_S)
        row = step
    else:
        fine: tl.constexpr = None
        row: tl.constexpr = None

    scale = load_scale(tokens, b, start, end, dtype, SCALE, LOG_BASE, LOG_CLAMPED)
    state = (
        tl.zeros([BLOCK_L, BLOCK_D], dtype),
        tl.zeros([BLOCK_L, BLOCK_S], dtype),
        # less than any logit, but minus infinity less itself would not be a number.
        tl.full([BLOCK_L], -1e30, dtype),
    )
    if block_table is not None:
        block_table += at * row_stride
    HAS_LOW: tl.constexpr = tokens.kv_start is not None or window is not None
    first_slot, end_slot = first * SLOTS, tl.minimum(last * SLOTS, end)
    for i in range(tl.cdiv(end_slot - first_slot, BLOCK_S)):
        slot = first_slot + i * BLOCK_S
        slots = slot + offs_s
        seen = are_seen(slots[None, :], (shift + offs_l)[:, None], low, window, HAS_LOW)
        runs = slot if RUN == BLOCK_S else slot + tl.arange(0, BLOCK_S // RUN) * RUN
        runs, live = clamp_slots(runs, low, end, HAS_LOW), clamp_slots(slots, low, end, HAS_LOW)
        page, rows = locate(block_table, page_stride, pages, at, runs, live, PAGE, RUN)
        if ROTATE_K:
            row = load_row(row, step, coarse_ptr, table.strides[1], slot, num_rows, R, BLOCK_S)
        state = add_keys(
            *(state, query, fine, row, k, v, page, rows, key_head, seen, scale),
            *(ROTATE_K, D, R, TAIL, SOFTCAP, PRECISION, BLOCK_D, BLOCK_R, BLOCK_T),
        )

    weighted, exponentials, largest = state
    total = tl.sum(exponentials, axis=1)
    if block_table is not None:
        is_there = has_pages(block_table, page_stride, pages, tl.maximum(first_slot, low), end_slot, PAGE)
        total = tl.where(is_there, total, float("nan"))
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    results = ((at * tl.num_programs(1) // blocks + key_head) * L * GROUP + rows_l) * ranges + split
    store_columns(partials_ptr + results[:, None] * D, weighted / total[:, None], mask_l, D)
    tl.store(partial_lse_ptr + results, tl.where(is_empty, float("-inf"), largest + tl.log2(total)), mask=mask_l)


def decode_config(q: torch.Tensor, group: int, page: int, pairs: int) -> dict[str, int]:
    """Constexprs, warps and stages for q [B, L, H, D] whose heads read key heads in groups of `group`."""
    config = launch_config(DECODE, q, pairs)
    config["BLOCK_L"] = min(config["BLOCK_L"], max(16, triton.next_power_of_2(q.shape[1] * group)))
    # so many slots from a multiple on lie in one page.
    config["RUN"] = math.gcd(page, config["BLOCK_S"])
    if architecture_of(q) == "gfx942":
        # its warps are twice as wide, and its loop loads to registers.
        return config
    if config["BLOCK_L"] > 16:
        # more rows would spill in the loop of 4 warps.
        config["num_warps"] = 8
    if page > 0:
        # half of the stages go to finding the page.
        config["num_stages"] = 2 * config["num_stages"] - 1
    return config


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: Tables,
    tokens: Tokens,
    block_table: torch.Tensor | None,
    train_length: int | None,
    rule: Rule,
    rotate: tuple[bool, bool],
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Write out [B, L, H, D] and, unless None, lse [B, H, L] for caches as in ../decode.py.

    At least one query, head and slot; tables with fine rows for 64 slots if keys are rotated.
    """
    batch, L, H, D = q.shape
    pages, slots, G = k_cache.shape[:3]
    page, capacity = (0, slots) if block_table is None else (slots, block_table.shape[1] * slots)
    (T, C, _, R), tile = tables.coarse.shape, tables.fine.shape[1]
    if C == 0:
        # the kernel reads a row of any table; what it turns is NaN.
        C, tables = 1, tables._replace(coarse=tables.coarse.new_full((T, 1, 2, R), torch.nan))
    # as far as any slot is; more might not fit 32 bits.
    window = None if rule.window is None else min(rule.window, 1 << 30)
    config = decode_config(q, H // G, page, R if any(rotate) else 0)
    splits = most_splits(G, L * H // G)
    ranges = most_ranges(capacity, L, window, splits)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    partials = torch.empty(batch, G, L * H // G, ranges, D, dtype=dtype, device=q.device)
    partial_lse = torch.empty(partials.shape[:4], dtype=dtype, device=q.device)
    with torch.cuda.device_of(q):
        decode_kernel[batch * ranges, G * triton.cdiv(L * H // G, config["BLOCK_L"])](
            *(Operand.of(q), Operand.of(k_cache), Operand.of(v_cache), TableOperand.of(tables), tokens),
            *(block_table, *strides(block_table, 2), pages, partials, partial_lse),
            *(L, capacity, window, T, C * tile, train_length, splits, ranges),
            ROTATE_Q=rotate[0],
            ROTATE_K=rotate[1],
            PRECISION=precision(q),
            GROUP=H // G,
            PAGE=page,
            TILE=tile,
            **rule_constants(rule),
            **config,
        )
        launch_decode_combine(partials, partial_lse, tokens, out, lse, capacity, window, splits)
