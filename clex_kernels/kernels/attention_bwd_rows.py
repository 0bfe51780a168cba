"""What the kernels for dq and for dk and dv share: P from the saved lse, and what ends a tile of rows.

For a row at position p with (y0, y1) its pairs of q' or k' and (dy0, dy1) their gradient, the end undoes the rotation
and sums dfreq over the rows of the tile:

    dangle = dy1 y0 - dy0 y1        sum p dangle = sum (p - p_0) dangle + p_0 sum dangle

with p_0 the position of the tile's first row. Both sums are in the accumulators' dtype, since p - p_0 is small; the
product with p_0 is fp64.
"""

import triton
import triton.language as tl

from clex_kernels.kernels.common import load_table_index, rotate
from clex_kernels.kernels.parts import store_parts
from clex_kernels.kernels.sequences import LOG2_E, load_rotation


@triton.jit
def weigh(logits, log2_scale, lse, seen):
    """P; lse, broadcast to the logits, is infinite for queries that see nothing."""
    weights = tl.exp2(logits * log2_scale - lse * LOG2_E)
    return weights if seen is None else tl.where(seen, weights, 0.0)


@triton.jit
def load_query_rows(lse_ptr, delta_ptr, rows, mask):
    """lse, infinite where nothing is seen so that exp(logits - lse) is 0 there, and delta."""
    if mask is None:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    else:
        lse = tl.load(lse_ptr + rows, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=mask, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def load_distances(table, b, rows, first_row, mask, T, num_rows, dtype: tl.constexpr):
    """Positions of table rows less that of first_row, zero where not mask, and that one in fp64."""
    if table.positions is None:
        distance, origin = (rows - first_row).to(dtype), first_row.to(tl.float64)
    else:
        t = load_table_index(table.index, table.index_strides, b, T)
        is_table = (t >= 0) & (t < T)
        positions_ptr = table.positions + t * table.positions_strides[0]
        has_origin = is_table & (first_row >= 0) & (first_row < num_rows)
        origin = tl.load(positions_ptr + first_row * table.positions_strides[1], mask=has_origin, other=0.0)
        in_table = mask & is_table & (rows >= 0) & (rows < num_rows)
        position = tl.load(positions_ptr + rows * table.positions_strides[1], mask=in_table, other=0.0)
        distance = (position - origin).to(dtype)
    return tl.where(mask, distance, 0.0), origin


@triton.jit
def finish_rows(
    dy,
    y,
    dx_ptrs,
    partials_ptr,
    table,
    b,
    rows,
    first_row,
    mask,
    T,
    num_rows,
    ROTATE: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rotate the gradient dy of y back, store it, and store the rows' share of dfreq unless its pointer is None.

    rows are the table's, first_row that of the tile; where not mask, dy is zero.
    """
    if ROTATE:
        if partials_ptr is not None:
            dangle = dy[1] * y[0].to(dy[0].dtype) - dy[0] * y[1].to(dy[0].dtype)
            distance, origin = load_distances(table, b, rows, first_row, mask, T, num_rows, dangle.dtype)
            near = tl.sum(distance[:, None] * dangle, axis=0).to(tl.float64)
            partials = near + origin * tl.sum(dangle, axis=0).to(tl.float64)
            offs_r = tl.arange(0, BLOCK_R)
            tl.store(partials_ptr + offs_r, partials, mask=offs_r < R)
        cos, sin = load_rotation(table, b, rows, mask, T, num_rows, R, TILE, BLOCK_R)
        dx0, dx1 = rotate(dy[0], dy[1], cos, -sin)
        if TAIL > 0:
            store_parts(dx_ptrs, (dx0, dx1, dy[2]), mask, R, TAIL)
        else:
            store_parts(dx_ptrs, (dx0, dx1), mask, R, TAIL)
    else:
        store_parts(dx_ptrs, dy, mask, R, TAIL)
