"""What the kernels for dq and for dk and dv share: P from the saved lse, and what ends a tile of rows.

For a row at position p with (y0, y1) its pairs of q' or k' and (dy0, dy1) their gradient, the end undoes the rotation
and sums dfreq over the rows of the tile:

    dangle = dy1 y0 - dy0 y1        sum p dangle = sum (p - p_0) dangle + p_0 sum dangle

with p_0 the position of the tile's first row. Both sums are in the accumulators' dtype, since p - p_0 is small; the
product with p_0 is fp64. Where q and k are both rotated here the sum of dangle over a sequence vanishes, and p counts
from the first valid key: from 0, far out, dfreq would drown in the rounding of that sum.
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
def load_positions(table, t, rows, mask, T, num_rows):
    """Positions in fp64 of rows of table t, 0 where masked or not there."""
    if table.positions is None:
        return rows.to(tl.float64)
    else:
        in_table = mask & (rows >= 0) & (rows < num_rows) & (t >= 0) & (t < T)
        ptrs = table.positions + t * table.positions_strides[0] + rows * table.positions_strides[1]
        return tl.load(ptrs, mask=in_table, other=0.0)


@triton.jit
def finish_rows(
    dy,
    y,
    dx_ptrs,
    mask,
    partials_ptr,
    table,
    b,
    rows,
    first_row,
    centre_row,
    has_angle,
    T,
    num_rows,
    ROTATE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rotate the gradient dy of y back, store it where mask, and store the rows' share of dfreq if it has a pointer.

    rows are the table's, first_row the tile's first, centre_row that from which positions count if IS_CENTRED. Rows
    without an angle have no gradient.
    """
    if ROTATE:
        if partials_ptr is not None:
            dangle = dy[1] * y[0].to(dy[0].dtype) - dy[0] * y[1].to(dy[0].dtype)
            t = load_table_index(table.index, table.index_strides, b, T)
            origin = load_positions(table, t, first_row, True, T, num_rows)
            distance = (load_positions(table, t, rows, has_angle, T, num_rows) - origin).to(dangle.dtype)
            distance = tl.where(has_angle, distance, 0.0)
            if IS_CENTRED:
                origin -= load_positions(table, t, centre_row, True, T, num_rows)
            near = tl.sum(distance[:, None] * dangle, axis=0).to(tl.float64)
            partials = near + origin * tl.sum(dangle, axis=0).to(tl.float64)
            offs_r = tl.arange(0, BLOCK_R)
            tl.store(partials_ptr + offs_r, partials, mask=offs_r < R)
        cos, sin = load_rotation(table, b, rows, has_angle, T, num_rows, R, TILE, BLOCK_R)
        dx0, dx1 = rotate(dy[0], dy[1], cos, -sin)
        if TAIL > 0:
            store_parts(dx_ptrs, (dx0, dx1, dy[2]), mask, R, TAIL)
        else:
            store_parts(dx_ptrs, (dx0, dx1), mask, R, TAIL)
    else:
        store_parts(dx_ptrs, dy, mask, R, TAIL)
