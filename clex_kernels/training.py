"""What training a CLEX model needs beside its forward: the ODE's weights in an optimizer group of their own.

    optimizer = torch.optim.AdamW(param_groups(model, lr=2e-5))
    loss.backward()
    clip_gradients(optimizer)
    optimizer.step()

Angles are positions times frequencies, so positions multiply the ODE's gradient. Its norm grows with t: in a toy model
of train_length 128 it was 0 at t = 1, 0.2 at 2, 46 at 8 and 170 at 16 (medians early in training; single steps had up
to 800), where the rest's was 0.9 at any t. Clipped by a joint norm, the model would all but stand still at large t.
"""

import math
import warnings
from collections import defaultdict
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from clex_kernels.modules import ClexRotaryEmbedding

__all__ = ["clip_gradients", "param_groups"]


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    ode_lr: float = 1e-5,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    ode_max_norm: float = 1.0,
) -> list[dict[str, Any]]:
    """The parameters of `model` that require gradients in two groups for a torch optimizer: the rest, and the ODE's.

    Each group has "params", "lr", "weight_decay" and "max_norm", which optimizers keep and their state dicts hold.
    Works on anything with a ClexRotaryEmbedding in it, also inside DDP, torch.compile or PEFT (there, with LoRA, name
    "clex_layer" in modules_to_save: else its weights are frozen). A group without parameters is left out.

    Args:
        model: with at least one ClexRotaryEmbedding.
        lr: of everything but the ODE.
        ode_lr: of the ODE; 1e-5 was stable in a toy model, and 1e-3 made log-frequencies drift by up to 6.
        weight_decay: of everything but the ODE. The ODE has none: decay would draw the frequencies to NTK-aware ones.
        max_norm: what `clip_gradients` clips the norm of all gradients but the ODE's to; 1, as is usual. Infinity: no
            clip.
        ode_max_norm: the same for the ODE; 1 is under its norm at most t, so that they all weigh alike, and no step at
            a large one has Adam's averages to itself.

    Raises:
        TypeError: model is no module, or an option is no number.
        ValueError: model has no ClexRotaryEmbedding or nothing to train, or an option is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    ropes = [module for module in model.modules() if isinstance(module, ClexRotaryEmbedding)]
    if not ropes:
        raise ValueError(
            f"model: expected one with a ClexRotaryEmbedding in it, got {type(model).__name__} without; apply_clex adds"
            " it to a transformers model"
        )
    norms = {"max_norm": max_norm, "ode_max_norm": ode_max_norm}
    for name, value in {"lr": lr, "ode_lr": ode_lr, "weight_decay": weight_decay, **norms}.items():
        _check_number(name, value)
    ode = {id(weight) for rope in ropes for weight in rope.parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in trained if id(weight) not in ode],
            "lr": lr,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
        },
        {
            "params": [weight for weight in trained if id(weight) in ode],
            "lr": ode_lr,
            "weight_decay": 0.0,
            "max_norm": ode_max_norm,
        },
    ]
    if not trained:
        raise ValueError("model: expected parameters that require gradients, got none")
    if not groups[1]["params"]:
        warnings.warn(
            "the ODE's weights require no gradients, so they are left out of training; with PEFT, name clex_layer in"
            " modules_to_save",
            stacklevel=2,
        )
    return [group for group in groups if group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Clip the gradients of each group by that group's own norm, to its "max_norm"; nothing waits for the device.

    Norms are those of whole gradients also where they are DTensors (FSDP2, tensor parallelism), of one mesh or of
    several, beside plain ones; plain ones count once, as they are equal on all ranks. Then every rank has to call this.

    Args:
        optimizer: made from `param_groups`, or with "max_norm" in every group; wrapped ones (accelerate) do too. Where
            a gradient scaler is used, unscale first.

    Returns:
        The norms [] before the clip, one per group.

    Raises:
        ValueError: a group has no "max_norm".
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise TypeError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    if any("max_norm" not in group for group in optimizer.param_groups):
        raise ValueError('optimizer: expected "max_norm" in every group, as param_groups(model, ...) makes them')
    return [_clip(group["params"], group["max_norm"]) for group in optimizer.param_groups]


@torch.no_grad()
def _clip(weights: list[Tensor], max_norm: float) -> Tensor:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if all(type(gradient) is Tensor for gradient in gradients):
        return nn.utils.clip_grad_norm_(weights, max_norm)
    norm, parts = _norm_of_parts(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    by_device = defaultdict(list)
    for part in parts:
        by_device[part.device].append(part)
    for device, there in by_device.items():
        torch._foreach_mul_(there, scale.to(device))
    return norm


def _norm_of_parts(gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The norm [] of all gradients, of which some are DTensors, and what this rank holds of each.

    One sum over ranks for every way in which they are split.
    """
    # takes most of a second to import.
    from torch.distributed.tensor import DTensor, Partial, Replicate

    ways, held = defaultdict(list), []
    for gradient in gradients:
        way = None
        if isinstance(gradient, DTensor):
            # a sum over ranks that is still to be taken has no norm yet; a scale goes into its parts all the same.
            held.append(gradient.to_local())
            summed = [Replicate() if place.is_partial() else place for place in gradient.placements]
            gradient = gradient.redistribute(placements=summed)
            way = gradient.device_mesh, tuple(Replicate() if place.is_replicate() else Partial() for place in summed)
            gradient = gradient.to_local()
        else:
            held.append(gradient)
        ways[way].append(gradient)
    squares = []
    for way, parts in ways.items():
        square = nn.utils.get_total_norm(parts).double().square()
        squares.append(square if way is None else DTensor.from_local(square, *way, run_check=False).full_tensor())
    total = torch.stack([square.to(held[0].device) for square in squares]).sum().sqrt()
    return total.to(held[0].dtype), held


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if name.endswith("max_norm"):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, infinity for no clip, got {value!r}")
    elif not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
