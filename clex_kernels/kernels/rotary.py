"""Rotary embedding of q [B, L, H, D] and k [B, L, G, D] in one launch, and its backward with the frequencies' gradient.

    y0 = x0 cos - x1 sin     y1 = x1 cos + x0 sin     x0 = x[..., :R], x1 = x[..., R:2R], dims past 2R are copied
    dx = rotation of dy by -angle                     dangle = dy1 y0 - dy0 y1
    dfreq = sum of p dangle over tokens and heads, p the token's position

Grid: one program per BLOCK_L tokens of one sequence. It loads the tokens' table rows once and goes over the heads of
q, then of k, BLOCK_H at a time. Every element is read before the same program writes it, so outputs may be the inputs.
Only the rotated q and k are saved for dfreq. A row that no table holds reads NaN.

In fp32 dfreq would lose its digits where p is large, so only the heads of one token are summed in the tables' dtype;
the product with p and all sums over tokens are fp64, one product per token and pair. A program stores one partial sum
per pair; the launcher adds these in a fixed order.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.kernels.common import load_cos_sin, load_rows, load_table_index, rotate, strides
from clex_kernels.kernels.launch_tables import ROTARY, ROTARY_BWD, StreamTile, Table, find_entry


@triton.jit
def copy_tail(x_ptrs, y_ptrs, mask_h, TAIL: tl.constexpr):
    """Copy the TAIL dims that no rotation touches."""
    offs_d = tl.arange(0, triton.next_power_of_2(TAIL))[None, None, :]
    mask = mask_h & (offs_d < TAIL)
    tl.store(y_ptrs + offs_d, tl.load(x_ptrs + offs_d, mask=mask, other=0.0), mask=mask)


@triton.jit
def rotate_heads(
    x_ptr,
    y_ptr,
    x_strides,
    y_strides,
    b,
    offs_l,
    L,
    H,
    cos,
    sin,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotate the H heads of the tokens offs_l of sequence b from x into y."""
    offs_r = tl.arange(0, cos.shape[2])[None, None, :]
    offs_l = offs_l.to(tl.int64)[None, :, None]
    x_ptrs = x_ptr + b * x_strides[0] + offs_l * x_strides[1]
    y_ptrs = y_ptr + b * y_strides[0] + offs_l * y_strides[1]
    for h in range(0, H, BLOCK_H):
        offs_h = (h + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None, None]
        mask_h = (offs_l < L) & (offs_h < H)
        mask = mask_h & (offs_r < R)
        x_head_ptrs = x_ptrs + offs_h * x_strides[2]
        y_head_ptrs = y_ptrs + offs_h * y_strides[2]
        x0 = tl.load(x_head_ptrs + offs_r, mask=mask, other=0.0).to(cos.dtype)
        x1 = tl.load(x_head_ptrs + R + offs_r, mask=mask, other=0.0).to(cos.dtype)
        y0, y1 = rotate(x0, x1, cos, sin)
        tl.store(y_head_ptrs + offs_r, y0.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_head_ptrs + R + offs_r, y1.to(y_ptr.dtype.element_ty), mask=mask)
        if TAIL > 0:
            copy_tail(x_head_ptrs + 2 * R, y_head_ptrs + 2 * R, mask_h, TAIL)


@triton.jit
def unrotate_heads(
    dy_ptr,
    y_ptr,
    dx_ptr,
    dy_strides,
    y_strides,
    dx_strides,
    b,
    offs_l,
    L,
    H,
    cos,
    sin,
    dangle,
    R: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Rotate dy of the H heads back into dx; returns dangle [BLOCK_H, BLOCK_L, BLOCK_R] with theirs added."""
    offs_r = tl.arange(0, cos.shape[2])[None, None, :]
    offs_l = offs_l.to(tl.int64)[None, :, None]
    dy_ptrs = dy_ptr + b * dy_strides[0] + offs_l * dy_strides[1]
    y_ptrs = y_ptr + b * y_strides[0] + offs_l * y_strides[1]
    dx_ptrs = dx_ptr + b * dx_strides[0] + offs_l * dx_strides[1]
    for h in range(0, H, dangle.shape[0]):
        offs_h = (h + tl.arange(0, dangle.shape[0])).to(tl.int64)[:, None, None]
        mask_h = (offs_l < L) & (offs_h < H)
        mask = mask_h & (offs_r < R)
        dy_head_ptrs = dy_ptrs + offs_h * dy_strides[2]
        y_head_ptrs = y_ptrs + offs_h * y_strides[2]
        dx_head_ptrs = dx_ptrs + offs_h * dx_strides[2]
        dy0 = tl.load(dy_head_ptrs + offs_r, mask=mask, other=0.0).to(cos.dtype)
        dy1 = tl.load(dy_head_ptrs + R + offs_r, mask=mask, other=0.0).to(cos.dtype)
        y0 = tl.load(y_head_ptrs + offs_r, mask=mask, other=0.0).to(cos.dtype)
        y1 = tl.load(y_head_ptrs + R + offs_r, mask=mask, other=0.0).to(cos.dtype)
        dangle += dy1 * y0 - dy0 * y1
        dx0, dx1 = rotate(dy0, dy1, cos, -sin)
        tl.store(dx_head_ptrs + offs_r, dx0.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_head_ptrs + R + offs_r, dx1.to(dx_ptr.dtype.element_ty), mask=mask)
        if TAIL > 0:
            copy_tail(dy_head_ptrs + 2 * R, dx_head_ptrs + 2 * R, mask_h, TAIL)
    return dangle


# a value that changes from call to call must not choose among compiled kernels.
@triton.jit(do_not_specialize=["L", "T", "num_rows", "offset"])
def rotary_kernel(
    q_ptr,
    k_ptr,
    coarse_ptr,
    fine_ptr,
    index_ptr,
    position_ids_ptr,
    q_out_ptr,
    k_out_ptr,
    L,
    H,
    G,
    T,
    num_rows,
    offset,
    q_strides,
    k_strides,
    table_strides,
    index_strides,
    position_ids_strides,
    q_out_strides,
    k_out_strides,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Forward, or dq and dk alone with CONJUGATE."""
    chunks = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    offs_l = tl.program_id(0) % chunks * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    t = load_table_index(index_ptr, index_strides, b, T)
    rows = load_rows(position_ids_ptr, position_ids_strides, b, offs_l, mask_l, offset)
    in_table = mask_l & (rows >= 0) & (rows < num_rows) & (t >= 0) & (t < T)
    some_t = tl.minimum(tl.maximum(t, 0), T - 1)
    cos, sin = load_cos_sin(coarse_ptr, fine_ptr, table_strides, some_t, rows, in_table, R, TILE, BLOCK_R)
    if CONJUGATE:
        sin = -sin
    cos = cos[None, :, :]
    sin = sin[None, :, :]
    rotate_heads(q_ptr, q_out_ptr, q_strides, q_out_strides, b, offs_l, L, H, cos, sin, R, TAIL, BLOCK_H)
    if k_ptr is not None:
        rotate_heads(k_ptr, k_out_ptr, k_strides, k_out_strides, b, offs_l, L, G, cos, sin, R, TAIL, BLOCK_H)


@triton.jit(do_not_specialize=["L", "T", "num_rows", "offset"])
def rotary_bwd_kernel(
    dq_out_ptr,
    dk_out_ptr,
    q_out_ptr,
    k_out_ptr,
    coarse_ptr,
    fine_ptr,
    positions_ptr,
    index_ptr,
    position_ids_ptr,
    dq_ptr,
    dk_ptr,
    partials_ptr,
    L,
    H,
    G,
    T,
    num_rows,
    offset,
    dq_out_strides,
    dk_out_strides,
    q_out_strides,
    k_out_strides,
    table_strides,
    positions_strides,
    index_strides,
    position_ids_strides,
    dq_strides,
    dk_strides,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Backward with partial sums of dfreq [programs, R]."""
    chunks = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    offs_l = tl.program_id(0) % chunks * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    t = load_table_index(index_ptr, index_strides, b, T)
    rows = load_rows(position_ids_ptr, position_ids_strides, b, offs_l, mask_l, offset)
    in_table = mask_l & (rows >= 0) & (rows < num_rows) & (t >= 0) & (t < T)
    some_t = tl.minimum(tl.maximum(t, 0), T - 1)
    cos, sin = load_cos_sin(coarse_ptr, fine_ptr, table_strides, some_t, rows, in_table, R, TILE, BLOCK_R)
    cos = cos[None, :, :]
    sin = sin[None, :, :]
    dangle = tl.zeros([BLOCK_H, BLOCK_L, BLOCK_R], dtype=cos.dtype)
    dangle = unrotate_heads(
        dq_out_ptr,
        q_out_ptr,
        dq_ptr,
        dq_out_strides,
        q_out_strides,
        dq_strides,
        b,
        offs_l,
        L,
        H,
        cos,
        sin,
        dangle,
        R,
        TAIL,
    )
    if dk_out_ptr is not None:
        dangle = unrotate_heads(
            dk_out_ptr,
            k_out_ptr,
            dk_ptr,
            dk_out_strides,
            k_out_strides,
            dk_strides,
            b,
            offs_l,
            L,
            G,
            cos,
            sin,
            dangle,
            R,
            TAIL,
        )

    positions = rows.to(tl.float64)
    if positions_ptr is not None:
        positions = tl.load(
            positions_ptr + t * positions_strides[0] + rows * positions_strides[1], mask=in_table, other=0.0
        )
    positions = tl.where(mask_l, positions, 0.0)
    partials = tl.sum(positions[:, None] * tl.sum(dangle, axis=0).to(tl.float64), axis=0)
    offs_r = tl.arange(0, BLOCK_R)
    partials_ptrs = partials_ptr + tl.program_id(0).to(tl.int64) * R + offs_r
    tl.store(partials_ptrs, partials, mask=offs_r < R)


def launch_config(
    table: Table[StreamTile], x: torch.Tensor, k: torch.Tensor | None, pairs: int, in_place: bool
) -> dict[str, int]:
    """Constexprs and warps for x [B, L, H, D] and k [B, L, G, D] or None.

    In place a tile is one warp's or has an element for every thread: warps that shared an element would race.
    """
    tile = find_entry(table, x, x.shape[1])
    heads = x.shape[2] if k is None else max(x.shape[2], k.shape[2])
    tail = 0 if in_place else x.shape[3] - 2 * pairs
    block_r = triton.next_power_of_2(pairs)
    # a tail is moved like two halves, all at once.
    token_bytes = tile.tokens * max(block_r, triton.next_power_of_2(tail) // 2) * x.element_size()
    block_h = min(triton.next_power_of_2(heads), max(1, tile.tile_bytes // token_bytes))
    return {
        "R": pairs,
        "TAIL": tail,
        "BLOCK_L": tile.tokens,
        "BLOCK_H": block_h,
        "BLOCK_R": block_r,
        # 16 warps of AMD's 64 threads are the most that a block takes.
        "num_warps": min(16, max(1, tile.num_warps * block_h * token_bytes // tile.tile_bytes)),
    }


def launch_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    index: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    offset: int,
    conjugate: bool,
) -> None:
    """Rotate q [B, L, H, D] and k [B, L, G, D] into q_out and k_out, backwards if `conjugate`.

    coarse [T, C, 2, R], fine [T, TILE, 2, R], index [B], position_ids [B or 1, L] or None. Outputs may be
    the inputs.
    """
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    config = launch_config(ROTARY, q, k, coarse.shape[3], q_out is q and k_out is k)
    with torch.cuda.device_of(q):
        rotary_kernel[q.shape[0] * triton.cdiv(q.shape[1], config["BLOCK_L"]),](
            *(q, k, coarse, fine, index, position_ids, q_out, k_out),
            *(q.shape[1], q.shape[2], 0 if k is None else k.shape[2]),
            *(coarse.shape[0], coarse.shape[1] * fine.shape[1], offset),
            *(strides(q, 3), strides(k, 3), strides(coarse, 2) + strides(fine, 2)),
            *(strides(index, 1), strides(position_ids, 2), strides(q_out, 3), strides(k_out, 3)),
            TILE=fine.shape[1],
            CONJUGATE=conjugate,
            **config,
        )


def launch_rotary_bwd(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor | None,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    positions: torch.Tensor | None,
    index: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    offset: int,
) -> torch.Tensor:
    """Write dq and dk; returns dfreq of every sequence, [B, R] fp64. q_out and k_out are the rotated q and k.

    positions [T or 1, C] fp64 are those of a table with TILE = 1. dq and dk may be dq_out and dk_out. Where no dfreq is
    wanted, `launch_rotary` with `conjugate` does.
    """
    batch, length, pairs = dq_out.shape[0], dq_out.shape[1], coarse.shape[3]
    if dq_out.numel() == 0 and (dk_out is None or dk_out.numel() == 0):
        return torch.zeros(batch, pairs, dtype=torch.float64, device=dq_out.device)
    config = launch_config(ROTARY_BWD, dq_out, dk_out, pairs, dq is dq_out and dk is dk_out)
    chunks = triton.cdiv(length, config["BLOCK_L"])
    partials = torch.empty(batch, chunks, pairs, dtype=torch.float64, device=dq_out.device)
    with torch.cuda.device_of(dq_out):
        rotary_bwd_kernel[batch * chunks,](
            *(dq_out, dk_out, q_out, k_out, coarse, fine, positions, index, position_ids, dq, dk, partials),
            *(length, dq_out.shape[2], 0 if dk_out is None else dk_out.shape[2]),
            *(coarse.shape[0], coarse.shape[1] * fine.shape[1], offset),
            *(strides(dq_out, 3), strides(dk_out, 3), strides(q_out, 3), strides(k_out, 3)),
            *(strides(coarse, 2) + strides(fine, 2), strides(positions, 2)),
            *(strides(index, 1), strides(position_ids, 2), strides(dq, 3), strides(dk, 3)),
            TILE=fine.shape[1],
            **config,
        )
    return partials.sum(dim=1)
