"""Attention with the rotary embedding in its loop, as tutorials put it there: what ours is compared with.

    out = softmax(scale rotary(q) rotary(k)^T) v        q, out [B, H, L, D], k and v [B, G, S, D], cos and sin [S, R]

FlashAttention-2 in Triton's usual form, a program per BLOCK_L queries of a head, with the shortest way to fuse the
rotation: queries are rotated once, and every block of keys as it is loaded. So each key is rotated, and its rows of the
tables are read, again by every program that passes it. R = D / 2; with ROTATES false the same kernel takes q and k as
they are.

It is written to be a fair peer. Rows of the tables are loaded a block ahead: loaded where they are used, the compiler
has each warp rotate the whole block in the layout that the product takes, 1925 instead of 932 instructions a trip and
130 of them spills on sm_80 (counted, Triton 3.7.1). Halves are joined again for one product from shared memory.

The last query meets the last key, of which there are at least as many.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.kernels.common import rotate
from clex_kernels.kernels.parts import join_halves, load_columns, store_columns

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rotation(cos_ptr, sin_ptr, rows, mask, ROTATES: tl.constexpr, D: tl.constexpr, dtype: tl.constexpr):
    """Cosines and sines [rows, R] where mask [rows] (None: all are there), or as little as there can be."""
    if ROTATES:
        R: tl.constexpr = D // 2
        cos_ptrs, sin_ptrs = cos_ptr + rows[:, None] * R, sin_ptr + rows[:, None] * R
        return load_columns(cos_ptrs, mask, R, R).to(dtype), load_columns(sin_ptrs, mask, R, R).to(dtype)
    else:
        return tl.zeros([1, 1], dtype), tl.zeros([1, 1], dtype)


@triton.jit
def load_next_rotation(
    cos_ptr,
    sin_ptr,
    slot,
    S,
    ROTATES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    dtype: tl.constexpr,
):
    """Those of the block of keys after the one from `slot` on; past the last key, its own."""
    slots = tl.minimum(slot + BLOCK_S + tl.arange(0, BLOCK_S), S - 1)
    return load_rotation(cos_ptr, sin_ptr, slots, None, ROTATES, D, dtype)


@triton.jit
def load_rotated(ptrs, cos, sin, mask, ROTATES: tl.constexpr, D: tl.constexpr):
    """Heads behind ptrs [rows, 1], rotated or as they are."""
    if ROTATES:
        R: tl.constexpr = D // 2
        x0, x1 = load_columns(ptrs, mask, R, R), load_columns(ptrs + R, mask, R, R)
        y0, y1 = rotate(x0.to(cos.dtype), x1.to(cos.dtype), cos, sin)
        return join_halves((y0.to(x0.dtype), y1.to(x1.dtype)))[0]
    else:
        return load_columns(ptrs, mask, D, D)


@triton.jit
def add_block(state, q, ptrs, cos, sin, seen, mask, SCALE, ROTATES: tl.constexpr, D: tl.constexpr):
    """A block of keys added to out, sum of exponentials and largest logit in base 2; seen and mask None: all of it."""
    out, total, largest = state
    k = load_rotated(ptrs[0], cos, sin, mask, ROTATES, D)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=out.dtype)
    if seen is not None:
        logits = tl.where(seen, logits, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, axis=1) * (SCALE * LOG2_E))
    weights = tl.exp2(logits * (SCALE * LOG2_E) - new_largest[:, None])
    faded = tl.exp2(largest - new_largest)
    v = load_columns(ptrs[1], mask, D, D)
    out = tl.dot(weights.to(v.dtype), v, out * faded[:, None], input_precision="ieee", out_dtype=out.dtype)
    return (out, total * faded + tl.sum(weights, axis=1), new_largest)


@triton.jit
def tutorial_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    H,
    group,
    L,
    S,
    SCALE: tl.constexpr,
    ROTATES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out and lse [B, H, L]; strides are over B, heads and tokens, those of the tables R."""
    dtype: tl.constexpr = lse_ptr.dtype.element_ty
    first, b, h = tl.program_id(0) * BLOCK_L, (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    offs_l, offs_s = first + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_S)
    mask_l = offs_l < L
    positions = S - L + offs_l
    q_ptrs = q_ptr + b * q_strides[0] + h * q_strides[1] + offs_l[:, None] * q_strides[2]
    cos, sin = load_rotation(cos_ptr, sin_ptr, positions, mask_l, ROTATES, D, dtype)
    q = load_rotated(q_ptrs, cos, sin, mask_l, ROTATES, D)

    k_ptrs = k_ptr + b * k_strides[0] + h // group * k_strides[1] + offs_s[:, None] * k_strides[2]
    v_ptrs = v_ptr + b * v_strides[0] + h // group * v_strides[1] + offs_s[:, None] * v_strides[2]
    state = (
        tl.zeros([BLOCK_L, D], dtype),
        tl.zeros([BLOCK_L], dtype),
        tl.full([BLOCK_L], float("-inf"), dtype),
    )
    whole, high = S, S
    if IS_CAUSAL:
        whole, high = S - L + first + 1, tl.minimum(S, S - L + first + BLOCK_L)
    whole = whole // BLOCK_S * BLOCK_S
    cos, sin = load_next_rotation(cos_ptr, sin_ptr, -BLOCK_S, S, ROTATES, D, BLOCK_S, dtype)
    for slot in range(0, whole, BLOCK_S):
        block_ptrs = k_ptrs + slot * k_strides[2], v_ptrs + slot * v_strides[2]
        state = add_block(state, q, block_ptrs, cos, sin, None, None, SCALE, ROTATES, D)
        cos, sin = load_next_rotation(cos_ptr, sin_ptr, slot, S, ROTATES, D, BLOCK_S, dtype)
    for slot in range(whole, high, BLOCK_S):
        slots = slot + offs_s
        # without order the last query stands for all.
        last = positions if IS_CAUSAL else positions * 0 + S - 1
        seen = (slots[None, :] <= last[:, None]) & (slots < S)[None, :]
        block_ptrs = k_ptrs + slot * k_strides[2], v_ptrs + slot * v_strides[2]
        state = add_block(state, q, block_ptrs, cos, sin, seen, slots < S, SCALE, ROTATES, D)
        cos, sin = load_next_rotation(cos_ptr, sin_ptr, slot, S, ROTATES, D, BLOCK_S, dtype)

    out, total, largest = state
    out_ptrs = out_ptr + b * out_strides[0] + h * out_strides[1] + offs_l[:, None] * out_strides[2]
    store_columns(out_ptrs, out / total[:, None], mask_l, D)
    tl.store(lse_ptr + tl.program_id(1) * L + offs_l, largest / LOG2_E + tl.log(total), mask=mask_l)


# that of our kernel on sm_80.
TILE = {"BLOCK_L": 128, "BLOCK_S": 64, "num_warps": 8, "num_stages": 2}


def launch_tutorial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool,
    rotates: bool,
) -> None:
    """Write out [B, H, L, D] and lse [B, H, L], contiguous like the tables; D a power of two, rows of unit stride."""
    batch, heads, length, dims = q.shape
    tutorial_attention_kernel[triton.cdiv(length, TILE["BLOCK_L"]), batch * heads](
        *(q, k, v, cos, sin, out, lse, *(x.stride()[:3] for x in (q, k, v, out))),
        *(heads, heads // k.shape[1], length, k.shape[2]),
        SCALE=scale,
        ROTATES=rotates,
        IS_CAUSAL=is_causal,
        D=dims,
        **TILE,
    )
