"""Autocast for functions that hand their tensors to operators of this package."""

import torch
from torch import Tensor


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All tensors, those that autocast on the first one's device would cast in its dtype; differentiable.

    As torch's own products have it: floating point but for fp64; but torch casts a parameter once for all calls within
    one autocast region, and this casts it in every call. What is no tensor stays, for checks to name.
    """
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return first, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (first, *others)
    )
