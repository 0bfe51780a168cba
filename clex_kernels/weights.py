"""The ODE's weights: their names, their start and their precision.

Initialisation is the authors': up Kaiming-uniform, down zero. With down = 0 the ODE adds nothing and t is NTK-aware
scaling exactly, a good place to start from. At that point only down has a gradient, since up acts through it; one
optimizer step makes down nonzero, and from then on both learn.

They stay fp32 or fp64 whatever happens to the model around them: rounded to bf16 they move angles at position 100K by
tens of turns.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clex_kernels.config import ClexConfig


class OdeProjection(nn.Module):
    """ode_up_proj [R, M] and ode_down_proj [M, R], named as in the authors' checkpoints, never below fp32."""

    def __init__(self, config: ClexConfig, device: torch.device | str | None):
        super().__init__()
        pairs, hidden = config.pairs, config.hidden_size
        self.ode_up_proj = nn.Parameter(torch.empty(pairs, hidden, dtype=torch.float32, device=device))
        self.ode_down_proj = nn.Parameter(torch.empty(hidden, pairs, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation."""
        nn.init.kaiming_uniform_(self.ode_up_proj, a=math.sqrt(5))
        nn.init.zeros_(self.ode_down_proj)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OdeProjection":
        def at_least_fp32(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return tensor.to(changed.device, torch.float32) if torch.finfo(changed.dtype).bits < 32 else changed

        return super()._apply(at_least_fp32, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # load_state_dict(assign=True) would take over the checkpoint's dtype.
        for name in self._parameters:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.is_floating_point() and torch.finfo(value.dtype).bits < 32:
                state_dict[prefix + name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_dense(name: str, x: Tensor) -> None:
    """Raises TypeError for a sparse or nested tensor."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")


def on_host(x: Tensor) -> bool:
    """Whether x's values can be looked at for nothing: not on a device, nor while something is traced."""
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def check_device(device: Any) -> None:
    """Raises TypeError or ValueError unless torch can make tensors on `device`, or it is None."""
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device: expected a torch.device, a string or None, got {type(device).__name__}")
    try:
        torch.empty(0, device=device)
    # a torch without CUDA says so by an AssertionError.
    except (RuntimeError, OverflowError, ValueError, AssertionError) as error:
        raise ValueError(f"device: expected one that torch has here, got {device!r}") from error


def plain_frequencies(config: ClexConfig, device: torch.device | str = "cpu") -> Tensor:
    """Those of plain RoPE, b^(-i/R), [R] fp64 in rad/token."""
    return config.rope_base ** -(torch.arange(config.pairs, dtype=torch.float64, device=device) / config.pairs)


def are_plain(inv_freq: Tensor, config: ClexConfig) -> bool:
    """Whether inv_freq holds the frequencies [R] of plain RoPE, which checkpoints carry as a buffer."""
    plain = plain_frequencies(config)
    # bf16 checkpoints round them to 3 digits.
    return inv_freq.shape == plain.shape and torch.allclose(inv_freq.double().cpu(), plain, rtol=1e-2)
