"""Which tokens a program of an attention kernel works on, what they see, and what becomes of their logits.

`tokens` is an attention_terms.Tokens without its numbers, which come by themselves. Bounds read from a device are
clamped to the tensors' sizes, so that whatever they say nothing is read or written outside. Slots and query rows are
int32 and stay below 2^29; `shift` is the position of query 0 less that of slot 0, so that query l stands where slot
l + shift does.
"""

import triton
import triton.language as tl

from clex_kernels.kernels.common import load_cos_sin, load_table_index

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(1 << 30)


@triton.jit
def load_bound(cu_seqlens, b, length):
    """Where packed sequence b begins, within [0, length]."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), length).to(tl.int32)


@triton.jit
def first_tile_of(cu_seqlens, b, length, BLOCK: tl.constexpr):
    """First of the tiles of sequence b: there are enough for any bounds if b is added to the whole blocks before it."""
    return load_bound(cu_seqlens, b, length) // BLOCK + b


@triton.jit
def find_tile(tile, cu_seqlens, length, batch, BLOCK: tl.constexpr):
    """Sequence and first row of a tile of BLOCK rows. Packed sequences have more tiles than rows to fill them."""
    if cu_seqlens is None:
        tiles = tl.cdiv(length, BLOCK)
        return tile // tiles, tile % tiles * BLOCK
    else:
        low = tile * 0
        high = low + batch
        while high - low > 1:
            middle = (low + high) // 2
            is_before = first_tile_of(cu_seqlens, middle, length, BLOCK) <= tile
            low = tl.where(is_before, middle, low)
            high = tl.where(is_before, high, middle)
        first = (tile - first_tile_of(cu_seqlens, low, length, BLOCK)) * BLOCK
        # tokens before the first bound belong to no sequence: past the end of this one.
        return low, tl.where(first < 0, length, first)


@triton.jit
def load_bounds(cu_seqlens, b, length):
    """First row and number of rows of packed sequence b."""
    begin, end = load_bound(cu_seqlens, b, length), load_bound(cu_seqlens, b + 1, length)
    return begin.to(tl.int64), tl.maximum(end - begin, 0)


@triton.jit
def load_sequence(tokens, q_offset, k_offset, b, L, S):
    """Of sequence b: its row of the batch, first row and number of its queries, first row of its keys, valid slots
    [start, end), and the positions of query 0 and of slot 0. Rows and positions are int64.
    """
    # a zero of a program's own: in the interpreter a literal has no type.
    start = b * 0
    at, q_row, k_row = b.to(tl.int64), start.to(tl.int64), start.to(tl.int64)
    queries, keys = start + L, start + S
    if tokens.cu_seqlens_q is not None:
        at = start.to(tl.int64)
        q_row, queries = load_bounds(tokens.cu_seqlens_q, b, L)
        k_row, keys = load_bounds(tokens.cu_seqlens_k, b, S)
    end, k_first = keys, start.to(tl.int64) + k_offset
    if tokens.kv_end is not None:
        end = tl.minimum(tl.maximum(tl.load(tokens.kv_end + b), 0), keys).to(tl.int32)
    if tokens.kv_start is not None:
        start = tl.minimum(tl.maximum(tl.load(tokens.kv_start + b), 0), keys).to(tl.int32)
    if tokens.k_offsets is not None:
        k_first = tl.load(tokens.k_offsets + b).to(tl.int64)
    if tokens.q_offsets is not None:
        q_first = tl.load(tokens.q_offsets + b).to(tl.int64)
    elif q_offset is not None:
        q_first = q_row * 0 + q_offset
    else:
        q_first = k_first + end - queries
    return at, q_row, queries, k_row, start, end, q_first, k_first


@triton.jit
def shift_of(q_first, k_first):
    """The shift, cut to where it no longer matters."""
    return tl.minimum(tl.maximum(q_first - k_first, -FAR), FAR).to(tl.int32)


@triton.jit
def is_visible(offs_l, slots, start, end, shift, window, IS_CAUSAL: tl.constexpr):
    """Which queries see which slots; one of offs_l and slots is a column, the other a row."""
    seen = (slots >= start) & (slots < end)
    # the other comparison only spreads the mask over the queries.
    seen = seen & ((slots <= offs_l + shift) if IS_CAUSAL else (offs_l == offs_l))
    if window is not None:
        seen = seen & (slots > offs_l + shift - window)
    return seen


@triton.jit
def sees_something(offs_l, queries, start, end, shift, window, IS_CAUSAL: tl.constexpr):
    """Which query rows see a key. The others need no angle, and perhaps no table has their row."""
    some = (offs_l < queries) & (start < end)
    if IS_CAUSAL:
        some = some & (offs_l + shift >= start)
    if window is not None:
        some = some & (offs_l + shift - window < end - 1)
    return some


@triton.jit
def key_blocks(
    first,
    queries,
    start,
    end,
    shift,
    window,
    IS_CAUSAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Slots [low, high) that the BLOCK_L queries from `first` on see, in blocks of BLOCK_S; some query sees each slot.

    The blocks of [whole_start, whole_end) are seen whole by all queries; those before and after need a mask.
    """
    last = tl.minimum(first + BLOCK_L, queries) - 1
    low, high, whole_end = start, end, end
    if IS_CAUSAL:
        high = tl.minimum(end, last + shift + 1)
        whole_end = tl.minimum(end, first + shift + 1)
    whole_start = low
    if window is not None:
        low = tl.maximum(start, first + shift - window + 1)
        whole_start = low + tl.cdiv(tl.maximum(last + shift - window + 1 - low, 0), BLOCK_S) * BLOCK_S
    whole_end = whole_start + tl.maximum(whole_end - whole_start, 0) // BLOCK_S * BLOCK_S
    return low, whole_start, whole_end, high


@triton.jit
def query_blocks(
    first,
    queries,
    start,
    end,
    shift,
    window,
    IS_CAUSAL: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Queries [low, high) that see one of the BLOCK_S slots from `first` on, in blocks of BLOCK_L.

    The queries of [whole_start, whole_end) see all valid slots among them; blocks before and after need a mask.
    """
    low, high, whole_end = start * 0, queries, queries
    whole_start = low
    if IS_CAUSAL:
        low = tl.maximum(tl.maximum(first, start) - shift, 0)
        whole_start = low + tl.cdiv(tl.maximum(first + BLOCK_S - 1 - shift - low, 0), BLOCK_L) * BLOCK_L
    if window is not None:
        high = tl.minimum(queries, tl.minimum(first + BLOCK_S, end) - 1 - shift + window)
        whole_end = tl.minimum(queries, first - shift + window)
    whole_end = whole_start + tl.maximum(whole_end - whole_start, 0) // BLOCK_L * BLOCK_L
    return low, whole_start, whole_end, high


@triton.jit
def load_length(tokens, b, start, end):
    """Token count of sequence b."""
    length = end - start
    if tokens.lengths is not None:
        length = tl.load(tokens.lengths + b)
    return length


@triton.jit
def load_scale(tokens, b, start, end, dtype: tl.constexpr, SCALE: tl.constexpr, LOG_BASE, LOG_CLAMPED: tl.constexpr):
    """Scale of the logits of sequence b with its log-n factor; above zero, as -inf times it marks what is masked."""
    scale = tl.full([], SCALE, dtype)
    if LOG_BASE is not None:
        length = load_length(tokens, b, start, end)
        factor = tl.log(tl.maximum(length, 1).to(dtype)) / LOG_BASE
        if LOG_CLAMPED:
            factor = tl.maximum(factor, 1.0)
        scale = tl.maximum(scale * factor, 1e-30)
    return scale


@triton.jit
def tanh(x):
    """By exp, which cancels near zero; there by its series, to 1e-9."""
    decay = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - decay) / (1.0 + decay)
    y = tl.where(x < 0.0, -y, y)
    if x.dtype == tl.float64:
        return y
    else:
        square = x * x
        series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        return tl.where(tl.abs(x) < 0.125, series, y)


@triton.jit
def cap(products, scale, SOFTCAP: tl.constexpr):
    """Logits in a unit of their own and what turns it into base 2; under a cap they are tanh and the unit SOFTCAP."""
    log2_scale = scale * LOG2_E
    if SOFTCAP is not None:
        products = tanh(products * (scale / SOFTCAP))
        log2_scale = tl.zeros_like(scale) + SOFTCAP * LOG2_E
    return products, log2_scale


@triton.jit
def load_rotation(table, b, rows, mask, T, num_rows, R: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Cosines and sines of the table rows of tokens of sequence b, as `load_rotation_of` has them."""
    t = load_table_index(table.index, table.index_strides, b, T)
    return load_rotation_of(table, t, rows, mask, T, num_rows, R, TILE, BLOCK_R)


@triton.jit
def load_rotation_of(table, t, rows, mask, T, num_rows, R: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Cosines and sines of rows of table t: NaN where no table has the row.

    Where not mask they are row 0's: whatever they turn is not looked at, but must be finite.
    """
    rows = tl.where(mask, rows, 0)
    in_table = (rows >= 0) & (rows < num_rows) & (t >= 0) & (t < T)
    t = tl.minimum(tl.maximum(t, 0), T - 1)
    return load_cos_sin(table.coarse, table.fine, table.strides, t, rows, in_table, R, TILE, BLOCK_R)


@triton.jit
def row_pointers(x, at, rows, h):
    """Pointers [rows, 1] to rows of head h in row `at` of the batch of an operand."""
    return x.ptr + at * x.strides[0] + h * x.strides[2] + rows.to(tl.int64)[:, None] * x.strides[1]
