"""How decoding splits a sequence's keys into ranges, and the merging of what the ranges gave.

    lse = log2 sum_i 2^lse_i        out = sum_i 2^(lse_i - lse) out_i

Ranges are whole tiles of 64 slots, from the first slot that some query sees on. How many tiles is a function of that
slot, of the last one, and of `splits`, which comes from the model and L: a sequence has the same ranges, added in the
same order, alone and in any batch and cache. Ranges past a sequence's own last one are neither written nor read.

Grid of the merging: a program per query row and head.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.attention_terms import Tokens
from clex_kernels.kernels.attention_launch import NOT_SPECIALIZED, Operand
from clex_kernels.kernels.launch_tables import DECODE_COMBINE, constants_of, find_entry
from clex_kernels.kernels.parts import store_columns
from clex_kernels.kernels.sequences import LOG2_E, load_sequence, row_pointers

SLOTS = tl.constexpr(64)
# tiles of the shortest range.
FEWEST_TILES = tl.constexpr(2)


@triton.jit
def split_keys(start, end, L, window, splits):
    """First slot the last L of a sequence's slots see, its tile, the end of the tiles, and the tiles in a range."""
    low = start
    if window is not None:
        low = tl.maximum(start, end - L - window + 1)
    first, last = low // SLOTS, tl.cdiv(end, SLOTS)
    last = tl.where(low < end, last, first)
    return low, first, last, tl.maximum(tl.cdiv(last - first, splits), FEWEST_TILES)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "splits", "ranges"])
def decode_combine_kernel(
    partials_ptr,
    partial_lse_ptr,
    tokens,
    out,
    lse_ptr,
    L,
    S,
    window,
    splits,
    ranges,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and, unless None, lse of one row from its ranges [B, G, rows, ranges, D], BLOCK_N at a time."""
    dtype: tl.constexpr = partials_ptr.dtype.element_ty
    b, token = tl.program_id(0) // L, tl.program_id(0) % L
    h, heads = tl.program_id(1), tl.num_programs(1)
    at, _, _, _, start, end, _, _ = load_sequence(tokens, None, 0, b, L, S)
    _, first, last, size = split_keys(start, end, L, window, splits)
    row = (at * heads + h // GROUP * GROUP) * L + token * GROUP + h % GROUP
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    weighted, total = tl.zeros([BLOCK_D], dtype), tl.zeros([], dtype)
    largest = tl.full([], float("-inf"), dtype)
    used = tl.cdiv(last - first, size)
    for n in range(0, used, BLOCK_N):
        mask = n + offs_n < used
        at_range = row * ranges + n + offs_n
        lse = tl.load(partial_lse_ptr + at_range, mask=mask, other=float("-inf"))
        ptrs = partials_ptr + at_range[:, None] * D + offs_d[None, :]
        values = tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        # nothing seen yet: infinity must not be subtracted from itself.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights, faded = tl.exp2(lse - base), tl.exp2(largest - base)
        weighted = weighted * faded + tl.sum(values * weights[:, None], axis=0)
        total = total * faded + tl.sum(weights, axis=0)
        largest = new_largest
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    row_ptrs = row_pointers(out, at, token + tl.arange(0, 1), h.to(tl.int64))
    store_columns(row_ptrs, (weighted / total)[None, :], tl.arange(0, 1) == 0, D)
    if lse_ptr is not None:
        lse = tl.where(is_empty, float("-inf"), (largest + tl.log2(total)) / LOG2_E)
        tl.store(lse_ptr + (at * heads + h) * L + token, lse)


def most_splits(groups: int, rows: int) -> int:
    """Ranges that a long sequence is split into, for G key heads that `rows` query rows each read.

    128 programs keep most GPUs busy; with more, moving what they give would show beside the keys. The device itself has
    no say, so that it changes no bits.
    """
    return max(16, triton.next_power_of_2(128 // (groups * triton.cdiv(rows, 32))))


def most_ranges(capacity: int, length: int, window: int | None, splits: int) -> int:
    """Ranges of the longest sequence that fits; `split_keys` never makes more."""
    tiles = triton.cdiv(capacity, SLOTS.value)
    if window is not None:
        tiles = min(tiles, (window + length - 2) // SLOTS.value + 2)
    return max(1, min(splits, triton.cdiv(tiles, FEWEST_TILES.value)))


def launch_decode_combine(
    partials: torch.Tensor,
    partial_lse: torch.Tensor,
    tokens: Tokens,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    capacity: int,
    window: int | None,
    splits: int,
) -> None:
    """Write out [B, L, H, D] and lse [B, H, L] from partials [B, G, L * H / G, ranges, D] and their lse in base 2."""
    batch, L, H, D = out.shape
    decode_combine_kernel[batch * L, H](
        *(partials, partial_lse, tokens, Operand.of(out), lse, L, capacity, window, splits, partials.shape[3]),
        GROUP=H // partials.shape[1],
        D=D,
        BLOCK_D=triton.next_power_of_2(D),
        **constants_of(find_entry(DECODE_COMBINE, partials, D)),
    )
