"""Appending the keys and values of new tokens to a cache, in place, as decode_attention reads it.

Keys enter unrotated. Token l of the L new ones of sequence b goes to slot kv_end[b] - L + l, so that kv_end counts
the new tokens too, and the same kv_end serves append_kv and decode_attention.

Shapes: k and v [B, L, G, D]; caches [B, S, G, D], or a pool [pages, P, G, D] in which slot j of sequence b is slot
j % P of page block_table[b, j // P].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from clex_kernels.config import check_flag
from clex_kernels.decode_checks import Cache, check_cache, check_slots
from clex_kernels.extension import library
from clex_kernels.rotary_checks import check_apart, check_distinct, check_no_tangent, check_strided, check_writable
from clex_kernels.sharded_calls import sharded_append
from clex_kernels.sharding import is_dtensor

library.define(
    "append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor kv_end, Tensor? block_table) -> ()"
)


def _append_fake(*arguments: Any) -> None:
    return None


def _append_cuda(*arguments: Any) -> None:
    # imported at the first call: Triton does not exist on every platform.
    from clex_kernels.kernels.append import launch_append

    launch_append(*arguments)


torch.library.register_fake("clex::append", _append_fake, lib=library)
library.impl("append", _append_cuda, "CUDA")


def check_append(cache: Cache, v: Tensor) -> None:
    """What appending asks for beyond a cache that fits k."""
    k, k_cache, v_cache, _ = cache
    if not isinstance(v, Tensor):
        raise TypeError(f"v: expected a tensor, got {type(v).__name__}")
    if (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(
            f"v: expected k's {list(k.shape)} {k.dtype} on {k.device}, got {list(v.shape)} {v.dtype} on {v.device}"
        )
    check_strided("v", v)
    if v.shape[3] > 1 and v.stride(3) != 1 and v.numel() > 0:
        raise ValueError(f"v: expected unit stride in D, got strides {list(v.stride())}")
    if k.shape[2] != k_cache.shape[2]:
        raise ValueError(f"k: expected G={k_cache.shape[2]} heads as k_cache's, got {k.shape[2]}")
    check_distinct("k_cache, v_cache", k_cache, v_cache)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_writable(name, x)
    _check_no_gradient(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    for x in (k_cache, v_cache):
        check_apart("k", k, x)
        check_apart("v", v, x)


def _check_no_gradient(**tensors: Tensor) -> None:
    """That no gradient is asked for, which would be lost."""
    check_no_tangent("append_kv", *tensors.values())
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: append_kv has no gradients, expected {name}.detach() or torch.no_grad()")


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_end: int | Tensor,
    block_table: Tensor | None = None,
    *,
    debug: bool = False,
) -> None:
    """Writes the keys and values of new tokens to the slots before kv_end of a cache, in place; without gradients.

    One launch writes both. On a GPU nothing waits for the device, and a captured CUDA graph stays right while k, v,
    kv_end and block_table are written in place. DTensors: see sharding.py.

    Args:
        k: [B, L, G, D], keys of the new tokens, not rotated, any strides with unit stride in D; fp32, fp16, bf16, or
            fp64 on the CPU. Any L: a prefill is appended like one token. No part of a cache.
        v: like k.
        k_cache: [B, S, G, D] of k's dtype, any strides with unit stride in D; with a block_table [pages, P, G, D], P a
            multiple of 16. No two elements may share memory.
        v_cache: like k_cache; both may be slices of one tensor.
        kv_end: [B] int32 or int64, end of a sequence's valid slots, new tokens included, as decode_attention takes it;
            or one int for all. Tokens whose slot kv_end - L + l is negative are padding and are not written: with
            kv_end = 0 none is.
        block_table: [B, pages of a sequence] int32 or int64: which page of the pool holds slots j P to j P + P - 1.
            Entries of slots that are not written may be anything; a slot that is written belongs to one sequence.
        debug: also check values that lie on a device, which waits for it. Without it tokens past the cache, or in
            pages that do not exist, are not written there, nor in compiled code.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, or a cache can't be written to.
        RuntimeError: k, v or a cache requires grad where gradients are enabled, or comes with a tangent.
    """
    check_flag("debug", debug)
    if is_dtensor(k):
        return sharded_append(append_kv, k, v, k_cache, v_cache, kv_end, block_table, debug)
    cache = check_cache("k", k, k_cache, v_cache, block_table)
    check_append(cache, v)
    slots = check_slots(cache, kv_end, debug=debug, written=k.shape[1])
    torch.ops.clex.append(k, v, k_cache, v_cache, slots.kv_end, block_table)
    if not torch.compiler.is_compiling():
        # lets autograd notice if a backward pass needs what was there; the operator does not tell it.
        increment_version((k_cache, v_cache))
