"""The transformers models whose rotary embedding can be taken over: one table, and the one function patched for them.

All of them rotate q and k in a module-level function apply_rotary_pos_emb(q, k, cos, sin, ...), and what the base
model's `rotary_emb` returns travels to it as (cos, sin). With `RAW` in their place q and k pass through unrotated, and
so raw keys enter whatever cache there is. Given real cosines and sines the function does what it always did, for all
other models of the process.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

# model_type: class of the base model, which owns `rotary_emb`; its module has the function. All layers of these rotate,
# pass the keyword arguments of a forward on to attention, and do nothing to q and k once they are rotated.
FAMILIES = {
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gpt_neox": "GPTNeoXModel",
    "granite": "GraniteModel",
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "mixtral": "MixtralModel",
    "olmo2": "Olmo2Model",
    "phi": "PhiModel",
    "phi3": "Phi3Model",
    "phimoe": "PhimoeModel",
    "qwen2": "Qwen2Model",
    "qwen2_moe": "Qwen2MoeModel",
    "qwen3": "Qwen3Model",
    "qwen3_moe": "Qwen3MoeModel",
    "starcoder2": "Starcoder2Model",
}
# whose configurations refuse a rope_type "clex" when they are loaded.
WITHOUT_CLEX = ("phi3", "phimoe")
_FUNCTION = "apply_rotary_pos_emb"


class _Raw:
    """Travels where cosines and sines did, and says: do not rotate."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Raw":
        return self


RAW = _Raw()


class _Patch(NamedTuple):
    """What stands in a module for its function, the function, and the models that want it so."""

    wrapper: Callable[..., Any]
    original: Callable[..., Any]
    models: WeakSet[PreTrainedModel]


_patches: dict[str, _Patch] = {}


def find_base(model: Any) -> PreTrainedModel:
    """The base model inside `model`, which owns the layers, if it is of a known family.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: it has no rotary embeddings, or its family is not in the table.
    """
    if not isinstance(model, PreTrainedModel):
        hint = (
            "; give the model that is inside, before get_peft_model wraps it" if hasattr(model, "peft_config") else ""
        )
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    base = model.base_model
    if not _has_rotary(base):
        raise ValueError(
            f"model: expected one with rotary embeddings, got {type(model).__name__}, which has no module of"
            " them; keys that are not rotated depend on no frequencies and are right as they are"
        )
    expected = (_module_name(base), FAMILIES.get(base.config.model_type))
    if not any((kind.__module__, kind.__name__) == expected for kind in type(base).__mro__):
        raise ValueError(
            f"model: expected one of transformers' families {', '.join(FAMILIES)}, got {type(model).__name__}"
            f" (model_type {base.config.model_type!r}); for others use ClexAttention or attention() in the model's code"
        )
    return base


def device_of(base: PreTrainedModel) -> torch.device:
    """Where the model computes; weights that are offloaded say "meta"."""
    return next((weight.device for weight in base.parameters() if not weight.is_meta), torch.device("cpu"))


def pass_raw(base: PreTrainedModel) -> None:
    """Let q and k of `base` pass its rotary function where it meets RAW, whoever else has replaced that meanwhile."""
    name = _module_name(base)
    patch, current = _patches.get(name), getattr(sys.modules[name], _FUNCTION)
    if patch is None or patch.wrapper is not current:
        models = WeakSet() if patch is None else patch.models
        patch = _patches[name] = _Patch(_unless_raw(current), current, models)
        setattr(sys.modules[name], _FUNCTION, patch.wrapper)
    patch.models.add(base)


def rotate_again(base: PreTrainedModel) -> None:
    """Undo `pass_raw`; the last model of a family gives its module the original function back."""
    name = _module_name(base)
    patch = _patches.get(name)
    if patch is None:
        return
    patch.models.discard(base)
    if not patch.models and getattr(sys.modules[name], _FUNCTION) is patch.wrapper:
        setattr(sys.modules[name], _FUNCTION, patch.original)
        del _patches[name]


def _has_rotary(base: PreTrainedModel) -> bool:
    return any("rotary" in type(part).__name__.lower() for part in base.modules())


def _module_name(base: PreTrainedModel) -> str:
    # not that of the class, which FSDP exchanges for one of its own.
    kind = base.config.model_type
    return f"transformers.models.{kind}.modeling_{kind}"


def _unless_raw(rotate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(rotate)
    def rotate_unless_raw(q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(cos, _Raw):
            return q, k
        return rotate(q, k, cos, sin, *args, **kwargs)

    return rotate_unless_raw
