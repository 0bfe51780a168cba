"""What the Triton kernels share: the rotation, the row of factored tables that a token reads, and strides.

Position p of a table with TILE rows in `fine` has the angle p freq = (TILE c + j) freq, c = p // TILE, j = p % TILE, so

    exp(i p freq) = coarse[c] * fine[j]

with coarse [T, C, 2, R] and fine [T, TILE, 2, R], cosines first. In a table of given positions TILE = 1 and fine is 1.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rotate(x0, x1, cos, sin):
    """Rotate the pairs (x0, x1) by the angle whose cosine and sine are given."""
    return x0 * cos - x1 * sin, x1 * cos + x0 * sin


@triton.jit
def load_table_index(index_ptr, index_strides, b, T):
    """Which of the T tables sequence b reads: index[b], or without an index the only table, or table b."""
    if index_ptr is None:
        return tl.minimum(b, T - 1).to(tl.int64)
    else:
        return tl.load(index_ptr + b * index_strides[0]).to(tl.int64)


@triton.jit
def load_rows(position_ids_ptr, position_ids_strides, b, offs_l, mask_l, offset):
    """Table rows [BLOCK_L] of the tokens offs_l of sequence b."""
    rows = offs_l.to(tl.int64) + offset
    if position_ids_ptr is not None:
        ids_ptrs = position_ids_ptr + b * position_ids_strides[0] + offs_l.to(tl.int64) * position_ids_strides[1]
        rows = tl.load(ids_ptrs, mask=mask_l, other=0).to(tl.int64) + offset
    return rows


@triton.jit
def load_cos_sin(
    coarse_ptr,
    fine_ptr,
    table_strides,
    t,
    rows,
    in_table,
    R: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Cosines and sines [BLOCK_L, BLOCK_R] of table t at `rows`, as `load_cos_sin_at` has them; 0 past R."""
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    mask_r = offs_r < R if R < BLOCK_R else None
    return load_cos_sin_at(coarse_ptr, fine_ptr, table_strides, t, rows, in_table, offs_r, mask_r, R, TILE)


@triton.jit
def load_cos_sin_at(
    coarse_ptr,
    fine_ptr,
    table_strides,
    t,
    rows,
    in_table,
    offs_r,
    mask_r,
    R: tl.constexpr,
    TILE: tl.constexpr,
):
    """Cosines and sines [BLOCK_L, BLOCK_R] of the pairs offs_r of table t, one there is or [BLOCK_L, 1], at `rows`.

    NaN where in_table is false, 0 where mask_r is (None: all pairs are there). table_strides are those of coarse over T
    and C, then of fine over T and TILE.
    """
    mask = in_table[:, None] if mask_r is None else in_table[:, None] & mask_r
    # rows in the table are not negative, and unsigned division is a shift.
    rows = rows.to(tl.uint64)
    coarse_rows, fine_rows = (rows // TILE).to(tl.int64), (rows % TILE).to(tl.int64)
    coarse_ptrs = coarse_ptr + t * table_strides[0] + coarse_rows[:, None] * table_strides[1] + offs_r
    cos = tl.load(coarse_ptrs, mask=mask, other=float("nan"))
    sin = tl.load(coarse_ptrs + R, mask=mask, other=float("nan"))
    if TILE > 1:
        fine_ptrs = fine_ptr + t * table_strides[2] + fine_rows[:, None] * table_strides[3] + offs_r
        # every remainder has its row.
        fine_cos = tl.load(fine_ptrs, mask=mask_r)
        fine_sin = tl.load(fine_ptrs + R, mask=mask_r)
        cos, sin = rotate(cos, sin, fine_cos, fine_sin)
    if mask_r is not None:
        # in a product over pairs the padding must not count.
        cos, sin = tl.where(mask_r, cos, 0.0), tl.where(mask_r, sin, 0.0)
    return cos, sin


def strides(x: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """The first strides of x; 0 where there is one element, whose stride may be anything and would spoil alignment."""
    if x is None:
        return (0,) * dims
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:dims], x.stride()[:dims], strict=True))
