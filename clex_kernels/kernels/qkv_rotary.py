"""The projections of attention, with the rotary embedding where the product leaves its accumulator.

    y = x W^T + bias    q, k = rotary(y_q), rotary(y_k)    v = y_v

x [B, L, C] is a matrix of M = B L rows; W stands for the weights of q [H D, C], k [G D, C] and v [G D, C].

A rotation needs both columns of a pair in one tile. So a head of D columns, of which R pairs are rotated, is made up of
HALF = ceil(D / 2) pairs, the last of them of the columns past 2 R, which no rotation touches:

    pair p < R:    columns p and R + p, turned by the table's angle
    pair p >= R:   columns R + p and HALF + p, with cos 1 and sin 0; if D is odd the last has no second column

A projection of n heads is a list of n HALF pairs, and a tile BLOCK_N / 2 consecutive ones, of whatever heads: as rows
of W are gathered anyway, no D is padded and a tile may be narrower than a head. Columns of the accumulator are ordered
[GROUPS, 2, SPAN], the first columns of SPAN pairs before their second ones. The loop knows nothing of this, and is that
of the product alone; the epilogue takes the accumulator apart, 32 columns at a time, which leaves registers for the
angles. Tiles of v go the same way, with cos 1 and sin 0.

Rows of a tile may belong to several sequences, each with its own table. A row that no table holds reads NaN.

Grid: a program per BLOCK_M rows and per tile of a projection. Programs that follow one another share GROUP_M blocks of
rows, for the sake of L2.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.attention_terms import Tables
from clex_kernels.kernels.attention_launch import Operand, precision
from clex_kernels.kernels.common import load_cos_sin_at, load_rows, load_table_index, rotate, strides
from clex_kernels.kernels.launch_tables import QKV_ROTARY, constants_of, find_entry


@triton.jit
def pick(projection, q, k, v):
    """That of three scalars or pointers which belongs to the projection."""
    return tl.where(projection == 0, q, tl.where(projection == 1, k, v))


@triton.jit
def find_tile(
    M,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The program's block of rows, its projection (0, 1, 2 for q, k, v) and in this the first of its pairs."""
    HALF: tl.constexpr = (D + 1) // 2
    PAIRS: tl.constexpr = BLOCK_N // 2
    Q_TILES: tl.constexpr = (H * HALF + PAIRS - 1) // PAIRS
    K_TILES: tl.constexpr = (G * HALF + PAIRS - 1) // PAIRS
    GROUP: tl.constexpr = GROUP_M * (Q_TILES + 2 * K_TILES)
    group, inside = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    blocks = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    block_m, tile = group * GROUP_M + inside % blocks, inside // blocks
    projection = (tile >= Q_TILES).to(tl.int32) + (tile >= Q_TILES + K_TILES).to(tl.int32)
    return block_m, projection, (tile - pick(projection, 0, Q_TILES, Q_TILES + K_TILES)) * PAIRS


@triton.jit
def locate_pairs(pairs, R: tl.constexpr, D: tl.constexpr):
    """Head, number in the head, and both columns of pairs of a projection."""
    HALF: tl.constexpr = (D + 1) // 2
    heads, p = pairs // HALF, pairs % HALF
    if D == 2 * R:
        return heads, p, p, p + R
    else:
        is_rotary = p < R
        return heads, p, tl.where(is_rotary, p, p + R), tl.where(is_rotary, p + R, p + HALF)


@triton.jit
def weight_rows(pair, heads, R: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """Rows of W behind the BLOCK_N columns of the pairs from `pair` on; past the last row there is, that one."""
    offs_n = tl.arange(0, BLOCK_N)
    head, _, first, second = locate_pairs(pair + offs_n // (2 * SPAN) * SPAN + offs_n % SPAN, R, D)
    return tl.minimum(head * D + tl.where(offs_n // SPAN % 2 == 0, first, second), heads * D - 1)


@triton.jit
def halve(parts):
    """Left and right half of each part."""
    halves = ()
    for i in tl.static_range(len(parts)):
        columns = tl.reshape(parts[i], (parts[i].shape[0], 2, parts[i].shape[1] // 2))
        halves = halves + tl.split(tl.permute(columns, (0, 2, 1)))
    return halves


@triton.jit
def split_tile(acc):
    """The tile, of up to 256 columns, in parts of 32 columns."""
    parts = (acc,)
    if acc.shape[1] > 32:
        parts = halve(parts)
    if acc.shape[1] > 64:
        parts = halve(parts)
    if acc.shape[1] > 128:
        parts = halve(parts)
    return parts


@triton.jit
def split_pairs(part, SPAN: tl.constexpr):
    """First and second columns [BLOCK_M, GROUPS, SPAN] of a part's pairs."""
    columns = tl.reshape(part, (part.shape[0], part.shape[1] // (2 * SPAN), 2, SPAN))
    return tl.split(tl.permute(columns, (0, 1, 3, 2)))


@triton.jit
def store_pairs(y_ptr, y_strides, y0, y1, b, offs_l, mask_m, pair, heads, R: tl.constexpr, D: tl.constexpr):
    """Both columns [BLOCK_M, GROUPS, SPAN] of the pairs from `pair` on, to y [B, L, heads, D]."""
    SPAN: tl.constexpr = y0.shape[2]
    pairs = pair + tl.arange(0, y0.shape[1])[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    head, _, first, second = locate_pairs(pairs, R, D)
    mask = mask_m[:, None, None] & (head < heads)[None, :, :]
    ptrs = y_ptr + (b * y_strides[0] + offs_l * y_strides[1])[:, None, None]
    ptrs += (head.to(tl.int64) * y_strides[2])[None, :, :]
    tl.store(ptrs + first[None, :, :], y0.to(y_ptr.dtype.element_ty), mask=mask)
    if D % 2 == 1:
        mask = mask & (second < D)[None, :, :]
    tl.store(ptrs + second[None, :, :], y1.to(y_ptr.dtype.element_ty), mask=mask)


# a value that changes from call to call must not choose among compiled kernels.
CHANGING = ["M", "L", "T", "num_rows", "offset", "index_stride", "ids_sequence_stride", "ids_token_stride"]


@triton.jit(do_not_specialize=CHANGING)
def qkv_rotary_kernel(
    x_ptr,
    weights,
    biases,
    coarse_ptr,
    fine_ptr,
    index_ptr,
    position_ids_ptr,
    outs,
    raw_keys,
    M,
    L,
    C,
    T,
    num_rows,
    offset,
    index_stride,
    ids_sequence_stride,
    ids_token_stride,
    x_strides,
    weight_strides,
    table_strides,
    ROTATE_Q: tl.constexpr,
    ROTATE_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """outs are q, k and v; raw_keys, if there, gets k before its rotation. IS_WHOLE: BLOCK_C divides C.

    C is no constexpr although a model has but one or two: where LLVM knows the trip count, it keeps a pointer for every
    row of the tiles and moves them all, 134 instead of 84 instructions a trip on sm_90 (counted, 128 x 256 x 64).
    """
    dtype: tl.constexpr = coarse_ptr.dtype.element_ty
    block_m, projection, first_pair = find_tile(M, H, G, D, BLOCK_M, BLOCK_N, GROUP_M)
    heads = pick(projection, H, G, G)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    # past the last row stands that row again, which needs no mask in the loop.
    offs_m = tl.minimum(offs_m, M - 1)
    b, offs_l = (offs_m // L).to(tl.int64), (offs_m % L).to(tl.int64)

    offs_c = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + (b * x_strides[0] + offs_l * x_strides[1])[:, None] + offs_c[None, :]
    rows_n = weight_rows(first_pair, heads, R, D, BLOCK_N, SPAN)
    w_ptrs = pick(projection, weights[0], weights[1], weights[2]) + offs_c[:, None]
    w_ptrs += (rows_n.to(tl.int64) * pick(projection, weight_strides[0], weight_strides[1], weight_strides[2]))[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype)
    for c in range(0, C, BLOCK_C):
        if IS_WHOLE:
            x, w = tl.load(x_ptrs + c), tl.load(w_ptrs + c)
        else:
            mask_c = c + offs_c < C
            x = tl.load(x_ptrs + c, mask=mask_c[None, :], other=0.0)
            w = tl.load(w_ptrs + c, mask=mask_c[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=dtype)

    if ROTATE_Q or ROTATE_K:
        t = load_table_index(index_ptr, (index_stride,), b, T)
        rows = load_rows(position_ids_ptr, (ids_sequence_stride, ids_token_stride), b, offs_l, mask_m, offset)
        in_table = (rows >= 0) & (rows < num_rows) & (t >= 0) & (t < T)
        some_t = tl.minimum(tl.maximum(t, 0), T - 1)[:, None]
    y_ptr = pick(projection, outs[0].ptr, outs[1].ptr, outs[2].ptr)
    y_strides = ()
    for i in tl.static_range(3):
        y_strides = y_strides + (pick(projection, outs[0].strides[i], outs[1].strides[i], outs[2].strides[i]),)
    parts = split_tile(acc)
    if biases is not None:
        bias = tl.load(pick(projection, biases[0], biases[1], biases[2]) + rows_n).to(dtype)
        bias_parts = split_tile(bias[None, :])
    for i in tl.static_range(len(parts)):
        part, pair = parts[i], first_pair + i * (parts[i].shape[1] // 2)
        if biases is not None:
            part += bias_parts[i]
        y0, y1 = split_pairs(part, SPAN)
        if raw_keys is not None and projection == 1:
            store_pairs(raw_keys.ptr, raw_keys.strides, y0, y1, b, offs_l, mask_m, pair, heads, R, D)
        if ROTATE_Q or ROTATE_K:
            p = (pair + tl.arange(0, SPAN)) % ((D + 1) // 2)
            turns = (p < R)[None, :] & pick(projection, ROTATE_Q, ROTATE_K, False)
            cos, sin = load_cos_sin_at(
                *(coarse_ptr, fine_ptr, table_strides, some_t, rows, in_table, p[None, :], turns, R, TILE)
            )
            y0, y1 = rotate(y0, y1, tl.where(turns, cos, 1.0)[:, None, :], sin[:, None, :])
        store_pairs(y_ptr, y_strides, y0, y1, b, offs_l, mask_m, pair, heads, R, D)


def launch_config(x: torch.Tensor, dims: int) -> dict[str, int]:
    """Constexprs, warps and stages for x [B, L, C] and heads of D = dims columns."""
    tile, half = find_entry(QKV_ROTARY, x, x.shape[0] * x.shape[1]), (dims + 1) // 2
    # of a part of the tile; with whole heads in it, one load of angles serves them all.
    pairs = min(tile.block_n, 32) // 2
    return {**constants_of(tile), "SPAN": half if pairs % half == 0 else pairs}


def launch_qkv_rotary(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    outs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k_rotated: torch.Tensor | None,
    tables: Tables,
    position_ids: torch.Tensor | None,
    offset: int,
    rotates: tuple[bool, bool] = (True, True),
) -> None:
    """Write outs = q [B, L, H, D], k and v [B, L, G, D] for x [B, L, C], and weights and biases of q, k and v.

    q and k are rotated as `rotates` says; or k_rotated, like k, gets the rotated keys and k those that are not.
    position_ids [B or 1, L] int64, None: 0 .. L - 1; offset is added to them. tables.positions is not used.
    """
    if x.numel() == 0:
        return
    (B, L, C), (H, D), G = x.shape, outs[0].shape[2:], outs[1].shape[2]
    T, coarse_rows, _, R = tables.coarse.shape
    tile = tables.fine.shape[1]
    keys = outs[1] if k_rotated is None else k_rotated
    with torch.cuda.device_of(x):
        config = launch_config(x, D)
        tiles = sum(triton.cdiv(heads * ((D + 1) // 2), config["BLOCK_N"] // 2) for heads in (H, G, G))
        qkv_rotary_kernel[triton.cdiv(B * L, config["BLOCK_M"]) * tiles,](
            *(x, weights, biases, tables.coarse, tables.fine, tables.index, position_ids),
            tuple(map(Operand.of, (outs[0], keys, outs[2]))),
            None if k_rotated is None else Operand.of(outs[1]),
            *(B * L, L, C, T, coarse_rows * tile, offset, *strides(tables.index, 1), *strides(position_ids, 2)),
            strides(x, 2),
            tuple(strides(weight, 1)[0] for weight in weights),
            strides(tables.coarse, 2) + strides(tables.fine, 2),
            ROTATE_Q=rotates[0],
            ROTATE_K=rotates[1] or k_rotated is not None,
            IS_WHOLE=C % config["BLOCK_C"] == 0,
            PRECISION=precision(x),
            H=H,
            G=G,
            D=D,
            R=R,
            TILE=tile,
            **config,
        )
