"""Attention over blocks of keys, merged into attention over all of them by the blocks' LSE.

    lse = ln sum_i exp(lse_i)          out = sum_i w_i out_i          w_i = exp(lse_i - lse)

A block in which a query sees nothing has lse_i = -inf and out_i = 0, and weighs nothing; a query that sees nothing
anywhere gets lse = -inf and out = 0.

Shapes: out [B, L, H, D] with lse [B, H, L], or out [N, H, D] with lse [H, N].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def merge_lses(lses: Tensor) -> tuple[Tensor, Tensor]:
    """lse and the blocks' weights, from lses stacked along dimension 0; differentiable, also where all are -inf."""
    largest = lses.detach().amax(0)
    # subtracting an infinity from itself gives NaN.
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    shares = (lses - largest).exp()
    total = shares.sum(0)
    is_empty = total == 0
    # neither ln 0 nor a division by it: NaN would come back through them even from a branch not taken.
    total = total.masked_fill(is_empty, 1.0)
    return (largest + total.log()).masked_fill(is_empty, -math.inf), shares / total


def rows_of_lse(x: Tensor) -> Tensor:
    """[.., H, L] as [.., L, H, 1], to go with out."""
    return x.transpose(-1, -2).unsqueeze(-1)


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention out of several over blocks of its keys; differentiable in outs and lses.

    Together with attention(..., q_offset, k_offset, return_lse=True) for each block, forward and backward give what
    one call over all keys gives.

    Args:
        outs: for each block of keys [B, L, H, D], or [N, H, D]; fp32, fp16, bf16 or fp64, 0 where nothing is seen.
        lses: for each block [B, H, L], or [H, N], natural logarithm, fp32 (fp64 for fp64); -inf where nothing is seen.

    Returns:
        out like one of outs, and lse; summed in fp32 (fp64 for fp64).

    Raises:
        TypeError: an argument is no sequence of tensors, or has a dtype that attention does not give.
        ValueError: there is no block, or shapes, dtypes or devices don't fit.
    """
    _check(outs, lses)
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    lse, weights = merge_lses(torch.stack(tuple(lses)))
    out = torch.zeros_like(outs[0], dtype=dtype)
    for part, weight in zip(outs, weights.unbind(0), strict=True):
        out = out + rows_of_lse(weight) * part
    return out.to(outs[0].dtype), lse


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, given in (("outs", outs), ("lses", lses)):
        if isinstance(given, Tensor) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(given).__name__}")
        if len(given) == 0 or len(given) != len(outs):
            expected = "at least one block" if name == "outs" or not len(outs) else f"as many as outs, {len(outs)}"
            raise ValueError(f"{name}: expected {expected}, got {len(given)}")
        for i, x in enumerate(given):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}[{i}]: expected a tensor, got {type(x).__name__}")
    first = outs[0]
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"outs[0]: expected float32, float16, bfloat16 or float64, got {first.dtype}")
    if first.dim() not in (3, 4):
        raise ValueError(f"outs[0]: expected shape [B, L, H, D] or [N, H, D], got {list(first.shape)}")
    rows = first.shape[:-1]
    lse_shape, lse_dtype = (*rows[:-2], rows[-1], rows[-2]), torch.promote_types(first.dtype, torch.float32)
    for name, given, shape, dtype in (("outs", outs, first.shape, first.dtype), ("lses", lses, lse_shape, lse_dtype)):
        for i, x in enumerate(given):
            _check_like(f"{name}[{i}]", x, tuple(shape), dtype, first.device)


def _check_like(name: str, x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")
    if tuple(x.shape) != shape or x.device != device:
        raise ValueError(f"{name}: expected shape {list(shape)} on {device}, got {list(x.shape)} on {x.device}")
