"""Tiles of heads in parts: the two halves of the R rotary pairs, and the TAIL dims that no rotation touches.

A product over D is a sum over the parts, so nothing has to be put together after a rotation or taken apart before one;
of heads that are rotated whole the halves may be, where one product costs less than two. Without rotation, and for a
head in one part, R = 0, and the tail is the whole head. Parts are tuples of one to three tiles [rows, BLOCK_R or
BLOCK_T], each padded with zeros to a size that tl.dot takes.
"""

import triton
import triton.language as tl

from clex_kernels.kernels.common import rotate


@triton.jit
def load_columns(ptrs, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SIZE columns behind the pointers ptrs [rows, 1], as [rows, BLOCK]: zero past SIZE and where not mask [rows]."""
    offs = tl.arange(0, BLOCK)[None, :]
    if mask is not None:
        return tl.load(ptrs + offs, mask=mask[:, None] & (offs < SIZE), other=0.0)
    elif SIZE < BLOCK:
        return tl.load(ptrs + offs, mask=offs < SIZE, other=0.0)
    else:
        return tl.load(ptrs + offs)


@triton.jit
def load_parts(ptrs, mask, R: tl.constexpr, TAIL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    """The parts of the rows behind ptrs [rows, 1], zero where not mask [rows] (None: all are there)."""
    if R == 0:
        return (load_columns(ptrs, mask, TAIL, BLOCK_T),)
    elif TAIL == 0:
        return (load_columns(ptrs, mask, R, BLOCK_R), load_columns(ptrs + R, mask, R, BLOCK_R))
    else:
        return (
            load_columns(ptrs, mask, R, BLOCK_R),
            load_columns(ptrs + R, mask, R, BLOCK_R),
            load_columns(ptrs + 2 * R, mask, TAIL, BLOCK_T),
        )


@triton.jit
def store_columns(ptrs, x, mask, SIZE: tl.constexpr):
    """The first SIZE columns of x [rows, BLOCK] to ptrs [rows, 1], where mask [rows] (None: everywhere)."""
    offs = tl.arange(0, x.shape[1])[None, :]
    kept = offs < SIZE if mask is None else mask[:, None] & (offs < SIZE)
    tl.store(ptrs + offs, x.to(ptrs.dtype.element_ty), mask=kept)


@triton.jit
def store_parts(ptrs, parts, mask, R: tl.constexpr, TAIL: tl.constexpr):
    """What `load_parts` loads, back."""
    if R > 0:
        store_columns(ptrs, parts[0], mask, R)
        store_columns(ptrs + R, parts[1], mask, R)
    if TAIL > 0:
        store_columns(ptrs + 2 * R, parts[len(parts) - 1], mask, TAIL)


@triton.jit
def rotate_parts(parts, cos, sin):
    """The parts of rows with their pairs rotated, in the dtype of cos."""
    y0, y1 = rotate(parts[0].to(cos.dtype), parts[1].to(cos.dtype), cos, sin)
    if len(parts) == 2:
        return (y0, y1)
    else:
        return (y0, y1, parts[2].to(cos.dtype))


@triton.jit
def join_halves(parts):
    """The two halves of heads that are rotated whole, R a power of two, as one part again."""
    joined = tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
    return (tl.reshape(joined, (parts[0].shape[0], 2 * parts[0].shape[1])),)


@triton.jit
def split_halves(parts):
    """The two halves of what `join_halves` gives."""
    halves = tl.reshape(parts[0], (parts[0].shape[0], 2, parts[0].shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def cast_parts(parts, dtype: tl.constexpr):
    """Every part in dtype."""
    cast = ()
    for i in tl.static_range(len(parts)):
        cast = cast + (parts[i].to(dtype),)
    return cast


@triton.jit
def scale_parts(parts, factor):
    """Every part times factor, a scalar or [rows, 1]."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def keep_rows(parts, mask):
    """Every part with zeros where not mask [rows], whatever was there."""
    kept = ()
    for i in tl.static_range(len(parts)):
        kept = kept + (tl.where(mask[:, None], parts[i], 0.0),)
    return kept


@triton.jit
def zero_parts(
    ROWS: tl.constexpr,
    R: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    dtype: tl.constexpr,
):
    """Accumulators for the parts of ROWS rows."""
    if R == 0:
        return (tl.zeros([ROWS, BLOCK_T], dtype),)
    elif TAIL == 0:
        return (tl.zeros([ROWS, BLOCK_R], dtype), tl.zeros([ROWS, BLOCK_R], dtype))
    else:
        return (
            tl.zeros([ROWS, BLOCK_R], dtype),
            tl.zeros([ROWS, BLOCK_R], dtype),
            tl.zeros([ROWS, BLOCK_T], dtype),
        )


@triton.jit
def dot_parts(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of two sets of rows."""
    product = tl.zeros([a[0].shape[0], b[0].shape[0]], dtype)
    for i in tl.static_range(len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION, out_dtype=dtype)
    return product


@triton.jit
def add_products(sums, weights, rows, PRECISION: tl.constexpr):
    """sums + weights @ rows, part by part."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (tl.dot(weights, rows[i], sums[i], input_precision=PRECISION, out_dtype=sums[i].dtype),)
    return added
