"""The transformers models whose rotary embedding can be taken over: one table, and the one function patched for them.

All of them rotate q and k in a module-level function apply_rotary_pos_emb(q, k, cos, sin, ...), and what the base
model's `rotary_emb` returns travels to it as (cos, sin). With `RAW` in their place q and k pass through unrotated, and
so raw keys enter whatever cache there is. Given real cosines and sines the function does what it always did, for all
other models of the process.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedModel

# model_type: class of the base model, which owns `rotary_emb`; its module has the function.
FAMILIES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "mixtral": "MixtralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "phi": "PhiModel",
    "gpt_neox": "GPTNeoXModel",
}
_FUNCTION = "apply_rotary_pos_emb"


class _Raw:
    """Travels where cosines and sines did, and says: do not rotate."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Raw":
        return self


RAW = _Raw()

_patched: dict[str, tuple[Callable[..., Any], WeakSet[PreTrainedModel]]] = {}


def find_base(model: Any) -> PreTrainedModel:
    """The base model inside `model`, which owns the layers, if it is of a known family.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: its family is not in the table.
    """
    if not isinstance(model, PreTrainedModel):
        hint = ""
        if hasattr(model, "peft_config"):
            hint = "; patch the model first, then give it to get_peft_model"
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    base = model.base_model
    expected = FAMILIES.get(base.config.model_type)
    if type(base).__name__ != expected:
        raise ValueError(
            f"model: expected one of the families {', '.join(FAMILIES)}, got {type(model).__name__} (model_type"
            f" {base.config.model_type!r}); for others use ClexAttention or attention() in the model's own code"
        )
    return base


def pass_raw(base: PreTrainedModel) -> None:
    """Let q and k of `base` pass its rotary function where it meets RAW."""
    name = type(base).__module__
    if name not in _patched:
        original = getattr(sys.modules[name], _FUNCTION)
        setattr(sys.modules[name], _FUNCTION, _unless_raw(original))
        _patched[name] = original, WeakSet()
    _patched[name][1].add(base)


def rotate_again(base: PreTrainedModel) -> None:
    """Undo `pass_raw`; the last model of a family gives its module the original function back."""
    name = type(base).__module__
    original, models = _patched.get(name, (None, WeakSet()))
    models.discard(base)
    if original is not None and not models:
        setattr(sys.modules[name], _FUNCTION, original)
        del _patched[name]


def _unless_raw(rotate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(rotate)
    def rotate_unless_raw(q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(cos, _Raw):
            return q, k
        return rotate(q, k, cos, sin, *args, **kwargs)

    return rotate_unless_raw
