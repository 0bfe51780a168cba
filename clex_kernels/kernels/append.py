"""Keys and values of new tokens written to their slots of a cache.

Token l of k and v [B, L, G, D] goes to slot kv_end[b] - L + l of a cache [B, S, G, D], or, in a pool [pages, P, G, D],
to row slot % P of page block_table[b, slot // P]. A slot or page that does not exist is not written.

Grid: one program per BLOCK_L tokens of one sequence. It goes over the heads, BLOCK_G at a time.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.kernels.common import strides
from clex_kernels.kernels.launch_tables import APPEND, find_entry


# a value that changes from call to call must not choose among compiled kernels.
@triton.jit(do_not_specialize=["L", "capacity", "pages", "row_stride", "page_stride"])
def append_kernel(
    k_ptr,
    v_ptr,
    kv_end_ptr,
    block_table_ptr,
    k_cache_ptr,
    v_cache_ptr,
    L,
    G,
    capacity,
    pages,
    row_stride,
    page_stride,
    k_strides,
    v_strides,
    kv_end_strides,
    k_cache_strides,
    v_cache_strides,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write k and v; P is 1 without a block table."""
    chunks = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    offs_l = (tl.program_id(0) % chunks * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    end = tl.load(kv_end_ptr + b * kv_end_strides[0]).to(tl.int64)
    slots = end - L + offs_l
    # past the smallest number `slots` comes round to positive ones, none of them below the capacity.
    mask_l = (offs_l < L) & (slots >= 0) & (slots < capacity)
    blocks, rows = b, slots
    if block_table_ptr is not None:
        # unsigned division is a shift where P is a power of two.
        columns = (slots.to(tl.uint64) // P).to(tl.int64)
        rows = (slots.to(tl.uint64) % P).to(tl.int64)
        block_table_ptrs = block_table_ptr + b * row_stride + columns * page_stride
        blocks = tl.load(block_table_ptrs, mask=mask_l, other=-1).to(tl.int64)
        mask_l &= (blocks >= 0) & (blocks < pages)

    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    mask = mask_l[:, None, None] & (offs_d < D)
    k_ptrs = k_ptr + (b * k_strides[0] + offs_l * k_strides[1])[:, None, None] + offs_d
    v_ptrs = v_ptr + (b * v_strides[0] + offs_l * v_strides[1])[:, None, None] + offs_d
    k_slots_ptrs = k_cache_ptr + (blocks * k_cache_strides[0] + rows * k_cache_strides[1])[:, None, None] + offs_d
    v_slots_ptrs = v_cache_ptr + (blocks * v_cache_strides[0] + rows * v_cache_strides[1])[:, None, None] + offs_d
    for g in range(0, G, BLOCK_G):
        offs_g = (g + tl.arange(0, BLOCK_G)).to(tl.int64)[None, :, None]
        mask_g = mask & (offs_g < G)
        # both are on their way before the first is stored.
        k = tl.load(k_ptrs + offs_g * k_strides[2], mask=mask_g)
        v = tl.load(v_ptrs + offs_g * v_strides[2], mask=mask_g)
        tl.store(k_slots_ptrs + offs_g * k_cache_strides[2], k, mask=mask_g)
        tl.store(v_slots_ptrs + offs_g * v_cache_strides[2], v, mask=mask_g)


def launch_config(k: torch.Tensor) -> dict[str, int]:
    """Constexprs and warps for k [B, L, G, D]."""
    _, length, heads, dims = k.shape
    tile = find_entry(APPEND, k, length)
    block_d = triton.next_power_of_2(dims)
    row_bytes = block_d * k.element_size()
    block_g = min(triton.next_power_of_2(heads), max(1, tile.tile_bytes // row_bytes))
    block_l = min(tile.tokens, max(1, tile.tile_bytes // (block_g * row_bytes)))
    return {
        "D": dims,
        "BLOCK_L": block_l,
        "BLOCK_G": block_g,
        "BLOCK_D": block_d,
        # 16 warps of AMD's 64 threads are the most that a block takes.
        "num_warps": min(16, max(1, tile.num_warps * block_l * block_g * row_bytes // tile.tile_bytes)),
    }


def launch_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_end: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """Write k and v [B, L, G, D] to the slots that end at kv_end [B] in the caches.

    These are [B, S, G, D], or [pages, P, G, D] with block_table [B, pages of a sequence].
    """
    if k.numel() == 0 or k_cache.numel() == 0 or (block_table is not None and block_table.numel() == 0):
        return
    config = launch_config(k)
    slots = k_cache.shape[1]
    with torch.cuda.device_of(k):
        append_kernel[k.shape[0] * triton.cdiv(k.shape[1], config["BLOCK_L"]),](
            *(k, v, kv_end, block_table, k_cache, v_cache),
            *(k.shape[1], k.shape[2], slots if block_table is None else block_table.shape[1] * slots),
            *(k_cache.shape[0], *strides(block_table, 2)),
            *(strides(k, 3), strides(v, 3), strides(kv_end, 1), strides(k_cache, 3), strides(v_cache, 3)),
            P=1 if block_table is None else slots,
            **config,
        )
