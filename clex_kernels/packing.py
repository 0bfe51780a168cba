"""One weight for the projections to q, k and v of an existing module, and three again.

`pack_qkv` replaces three torch.nn.Linear by one, `qkv_proj`, with their rows in the order q, k, v, as qkv_rotary takes
them. state_dict and load_state_dict keep the names and shapes they had, with slices of the packed weight, so plain
checkpoints do not notice. What goes by the names of parameters does (named_parameters, optimizers, functional_call,
torch.distributed.checkpoint): it finds qkv_proj. `unpack_qkv` puts three modules back, whose weights are the slices.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

NAMES = ("q_proj", "k_proj", "v_proj")
PACKED = "qkv_proj"
# where a packed module keeps its projections' names and rows.
_ROWS = "_qkv_rows"


def pack_qkv(module: nn.Module, names: Sequence[str] = NAMES) -> nn.Linear:
    """Replaces the projections of `module` by one, which is returned and is module.qkv_proj from now on.

    Each row is copied once, to its place, and a projection is let go before the next one is copied. Whatever called the
    three, the module's own forward, and optimizers that hold their parameters are the caller's to replace.

    Args:
        module: has three torch.nn.Linear with C inputs each, of H D, G D and G D outputs.
        names: their names, q first.

    Returns:
        A torch.nn.Linear with weight [(H + 2G) D, C], and bias [(H + 2G) D] where they have one.

    Raises:
        TypeError: one of them is no plain torch.nn.Linear but, say, a LoRA or quantized layer.
        ValueError: they differ in C, dtype, device or mode, or k and v in rows; one has hooks, a .grad or a weight that
            is another's too; or there is a qkv_proj already.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"names: expected three names, got {names!r}")
    if hasattr(module, PACKED):
        raise ValueError(f"module: expected no {PACKED} yet, got a {type(module).__name__} that has one")
    names = tuple(names)
    rows = {name: checked_linear(module, name).out_features for name in names}
    _check_together(module, names, rows)
    packed = _empty_projection(getattr(module, names[0]), sum(rows.values()))
    following = _modules_after(module, names[0], names)
    first = 0
    for name, count in rows.items():
        # no reference outlives the turn.
        for kind, part in getattr(module, name).named_parameters():
            getattr(packed, kind).detach()[first : first + count].copy_(part.detach())
        del part
        delattr(module, name)
        first += count
    setattr(module, PACKED, packed)
    _move_to_end(module, following)
    name_rows(module, rows)
    return packed


def name_rows(module: nn.Module, rows: dict[str, int]) -> None:
    """From now on the state dict of `module` has slices of its qkv_proj, by name and number of rows, in its place."""
    if not hasattr(module, _ROWS):
        module.register_state_dict_post_hook(_unpack_state)
        module.register_load_state_dict_pre_hook(_pack_state)
    setattr(module, _ROWS, rows)


def unpack_qkv(module: nn.Module) -> None:
    """Puts the three projections back that `pack_qkv` replaced; nothing is copied, their weights share one memory.

    Raises TypeError or ValueError if `module` is not packed, or its qkv_proj is not what `pack_qkv` made of it.
    """
    rows = getattr(module, _ROWS, {})
    if not rows:
        raise ValueError(f"module: expected one that pack_qkv packed, got {type(module).__name__}")
    packed, following = checked_linear(module, PACKED), _modules_after(module, PACKED, (PACKED,))
    delattr(module, PACKED)
    # without rows the hooks, which stay, find nothing to do.
    setattr(module, _ROWS, {})
    first = 0
    for name, count in rows.items():
        linear = nn.Linear(packed.in_features, count, packed.bias is not None, device="meta")
        for kind, whole in packed.named_parameters():
            part = whole.detach()[first : first + count]
            setattr(linear, kind, nn.Parameter(part, requires_grad=whole.requires_grad))
        setattr(module, name, linear.train(packed.training))
        first += count
    _move_to_end(module, following)


def _modules_after(module: nn.Module, name: str, leaving: Sequence[str]) -> list[str]:
    """Names of the modules behind that one, but for those that leave."""
    names = list(module._modules)
    return [other for other in names[names.index(name) :] if other not in leaving]


def _move_to_end(module: nn.Module, names: Sequence[str]) -> None:
    """Puts new modules before those of that name: optimizers know parameters by their order."""
    for name in names:
        module._modules[name] = module._modules.pop(name)


def _empty_projection(like: nn.Linear, rows: int) -> nn.Linear:
    """As `like` but for its number of rows; not initialised, which would draw random numbers to be overwritten."""
    linear = nn.Linear(like.in_features, rows, like.bias is not None, device="meta")
    for kind, part in like.named_parameters():
        empty = part.detach().new_empty((rows, *part.shape[1:]))
        setattr(linear, kind, nn.Parameter(empty, requires_grad=part.requires_grad))
    return linear.train(like.training)


def _unpack_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The packed weight's slices under the names they had."""
    rows = getattr(module, _ROWS, {})
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}{PACKED}.{kind}", None) if rows else None
        if whole is not None:
            state.update(
                (f"{prefix}{name}.{kind}", part)
                for name, part in zip(rows, whole.split(list(rows.values())), strict=True)
            )


def _pack_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The packed weight of slices under the names they had; where one is missing, the loader finds it missing."""
    rows = getattr(module, _ROWS, {})
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{name}.{kind}" for name in rows]
        if rows and all(key in state for key in keys):
            parts = [state.pop(key) for key in keys]
            if [len(part) for part in parts] != list(rows.values()):
                got = ", ".join(str(list(part.shape)) for part in parts)
                raise ValueError(f"{', '.join(keys)}: expected {', '.join(map(str, rows.values()))} rows, got {got}")
            state[f"{prefix}{PACKED}.{kind}"] = torch.cat(parts)


def checked_linear(module: nn.Module, name: str) -> nn.Linear:
    """The projection of that name, if it does what its weight and bias say and nothing else."""
    linear = getattr(module, name, None)
    if type(linear) is not nn.Linear:
        raise TypeError(f"{name}: expected a torch.nn.Linear, got {type(linear).__name__}")
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or "forward" in vars(linear) or any(part._backward_hooks for part in linear.parameters()):
        raise ValueError(f"{name}: expected no hooks and no forward of its own, which would be lost, got some")
    if any(part.grad is not None for part in linear.parameters()):
        raise ValueError(f"{name}: expected no .grad, which would be lost, got one; zero_grad() first")
    return linear


def _check_together(module: nn.Module, names: Sequence[str], rows: dict[str, int]) -> None:
    if len(names) != 3 or len(rows) != 3:
        raise ValueError(f"names: expected three different names, of q, k and v, got {list(names)}")
    q_rows, k_rows, v_rows = rows.values()
    if k_rows != v_rows or q_rows % k_rows:
        raise ValueError(
            f"{', '.join(names)}: expected H D, G D and G D rows, G a divisor of H, got {list(rows.values())}"
        )
    first, *others = (getattr(module, name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        for what, expected, got in zip(("C", "parameters", "mode"), _traits(first), _traits(other), strict=True):
            if expected != got:
                raise ValueError(f"{name}: expected {names[0]}'s {what}, {expected}, got {got}")
    held = [id(part) for linear in (first, *others) for part in linear.parameters()]
    if len(set(held)) < len(held):
        raise ValueError(f"{', '.join(names)}: expected weights and biases of their own, got shared ones")


def _traits(linear: nn.Linear) -> tuple[Any, ...]:
    """What must be the same of projections that become one."""
    parameters = {
        kind: (part.dtype, str(part.device), "trained" if part.requires_grad else "frozen")
        for kind, part in linear.named_parameters()
    }
    return linear.in_features, parameters, "training" if linear.training else "evaluation"
