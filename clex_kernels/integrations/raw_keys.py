"""A transformers model over raw keys: they enter its cache unrotated, and attention rotates them by this step's tables.

    hook before the base model's forward: where the sequences stand, and their table  -> Step, a keyword argument
    rotary_emb (RawKeyRotary): RAW in place of cosines and sines                      -> q and k stay raw
    the cache: whatever it is, it now holds raw keys; a plain dynamic one grows in place
    attention interface "clex_kernels": attention, or decode_attention for a few new tokens, by the Step's table

A Step is made once per forward and travels to every layer as an argument, so that a checkpointed layer that runs again
in the backward pass gets the table it had. Cache slots serve as positions: only their differences count. Column m of
the 2-D mask is token m of the cache, whichever of them a layer still holds: the S slots that a layer's cache returns
are the last S columns, or, in a static cache that has more slots than there are columns, begin with the first.
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from clex_kernels.attention import attention
from clex_kernels.autocast import autocast
from clex_kernels.decode import prepare_decode
from clex_kernels.decode_checks import MAX_NEW_TOKENS
from clex_kernels.integrations.families import RAW
from clex_kernels.integrations.growing_cache import let_grow
from clex_kernels.tables import RotaryTable, RotaryTableStack, on_host

IMPLEMENTATION = "clex_kernels"

_STEP = "rotary_step"
# transformers renames the argument: the old name until 5.40, the new one from 5.24 on.
_CACHE_NAMES = ("cache", "past_key_values")


class Tokens(NamedTuple):
    """Where a forward's tokens stand: B rows of L new ones, columns `end` - L .. `end` - 1 of all that were seen.

    start: [B], the first column that is no left padding; None: 0.
    end: int, or [1] on the device of a static cache.
    lengths: [B], tokens of every sequence, new ones included; None: end.
    """

    batch: int
    new: int
    end: int | Tensor
    start: Tensor | None
    lengths: Tensor | None

    @property
    def are_first(self) -> bool:
        """Whether no cached tokens come before the new ones."""
        return isinstance(self.end, int) and self.end == self.new


class Step(NamedTuple):
    """What all layers of one forward share."""

    table: RotaryTable | RotaryTableStack
    tokens: Tokens
    prepared: dict[tuple[Any, ...], tuple[Any, ...]]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, *numbers: Any) -> Tensor:
        """decode_attention with the scale, window and softcap in `numbers`, checked once for all layers alike."""
        kinds = (*((x.shape, x.dtype, x.device, x.stride(-1)) for x in (q, k, v)), *numbers)
        if kinds not in self.prepared:
            places = (*self.slots(k.shape[1]), self.tokens.lengths, None)
            self.prepared[kinds] = prepare_decode(q, k, v, self.table, *places, *numbers, "none", False, False)
        return torch.ops.clex.decode(q, k, v, *self.prepared[kinds])[0]

    def slots(self, capacity: int) -> tuple[int | Tensor, Tensor | None]:
        """kv_end and kv_start among the S = `capacity` slots that a layer attends to."""
        end, start = self.tokens.end, self.tokens.start
        if isinstance(end, int):
            dropped = max(end - capacity, 0)
            return end - dropped, start if start is None or dropped == 0 else (start - dropped).clamp(min=0)
        dropped = (end - capacity).clamp(min=0)
        return (end - dropped).expand(self.tokens.batch), None if start is None else (start - dropped).clamp(min=0)


class Frequencies(Protocol):
    """What decides on the tables of a forward."""

    def table(self, base: PreTrainedModel, tokens: Tokens) -> RotaryTable | RotaryTableStack:
        """The table of this forward's tokens."""


class RawKeyRotary(nn.Module):
    """Stands where a model's rotary embedding stood; `plain` is that one.

    Its two hooks on the base model's forward make the Step and mark caches that hold raw keys.
    """

    def __init__(self, plain: nn.Module, frequencies: Frequencies):
        super().__init__()
        self.plain = plain
        self.frequencies = frequencies
        self._handles: list[Any] = []

    def attach(self, base: PreTrainedModel) -> None:
        """Take the place of `base.rotary_emb`."""
        base.rotary_emb = self
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end),
        ]

    def detach(self, base: PreTrainedModel) -> None:
        """Give `base` its own rotary embedding back."""
        for handle in self._handles:
            handle.remove()
        base.rotary_emb = self.plain

    def forward(self, *args: Any, **kwargs: Any) -> tuple[object, object]:
        """RAW twice, for cosines and sines."""
        return RAW, RAW

    def _begin(
        self, base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, _STEP: self._step(base, args, kwargs)}

    # tables and what masks say are looked up outside compiled code, and enter it as arguments.
    @torch.compiler.disable
    def _step(self, base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        given = _arguments(base, args, kwargs)
        _check_call(base, given)
        if given["cache"] is not None:
            let_grow(given["cache"])
        tokens = _find_tokens(given)
        table = self.frequencies.table(base, tokens)
        if table.log_scale and tokens.lengths is None:
            # a layer with a window does not hold all tokens that the scale counts.
            tokens = tokens._replace(lengths=torch.full((tokens.batch,), tokens.end, device=table.device))
        return Step(table, tokens, {})

    def _end(self, base: PreTrainedModel, args: tuple[Any, ...], output: Any) -> None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for value in values:
            if isinstance(value, Cache):
                value.holds_raw_keys = True


def _arguments(base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the forward of `base` is called with, by name."""
    given = {**dict(zip(_parameters(type(base)), args, strict=False)), **kwargs}
    given["cache"] = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
    return given


@lru_cache
def _parameters(model: type[PreTrainedModel]) -> tuple[str, ...]:
    # the first one is self.
    return tuple(inspect.signature(model.forward).parameters)[1:]


def _check_call(base: PreTrainedModel, given: dict[str, Any]) -> None:
    """Refuse what raw keys or this package's attention do not serve."""
    config = base.config
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation: expected {IMPLEMENTATION!r}, which rotates raw keys, got"
            f" {config._attn_implementation!r}, which does not; undo the patch first (remove_clex), or set it back"
        )
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions: expected False, since no kernel here keeps the attention weights; undo the patch"
            ' (remove_clex) and use attn_implementation="eager" to look at them'
        )
    cache = given["cache"]
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"cache: expected a transformers Cache, got {type(cache).__name__}")
    if cache is not None and not getattr(cache, "holds_raw_keys", False) and not _is_empty(cache):
        raise ValueError(
            "cache: expected an empty one or one that this model filled, got one that holds keys from elsewhere, which"
            " are rotated already; run its tokens through this model anew"
        )
    if base.training and torch.is_grad_enabled() and _is_reentrant(base.layers[0]):
        raise ValueError(
            "use_reentrant: expected False in gradient_checkpointing_kwargs, got True, which can't carry gradients to"
            " frequencies that all layers share"
        )


def _is_reentrant(layer: nn.Module) -> bool:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    is_on = getattr(layer, "gradient_checkpointing", False) and isinstance(checkpoint, partial)
    return is_on and checkpoint.keywords.get("use_reentrant", False)


def _is_empty(cache: Cache) -> bool:
    return (
        not any(getattr(layer, "is_initialized", False) for layer in cache.layers) or int(cache.get_seq_length()) == 0
    )


def _find_tokens(given: dict[str, Any]) -> Tokens:
    """Where the tokens of this forward stand, from the mask, the cache and the position_ids."""
    x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if x is None:
        raise ValueError("input_ids, inputs_embeds: expected one of them, got neither")
    batch, new = x.shape[:2]
    past = 0 if given["cache"] is None else given["cache"].get_seq_length()
    if isinstance(past, Tensor):
        past = int(past) if on_host(past) else past.reshape(1).to(x.device)
    end = past + new
    mask = _mask_of(given.get("attention_mask"))
    # values on a device are looked at once per prompt, and not while decoding.
    looks = new > MAX_NEW_TOKENS or x.device.type == "cpu"
    if looks:
        _check_positions(given.get("position_ids"), mask, new)
    if mask is not None and (mask.shape[0] != batch or (isinstance(end, int) and mask.shape[1] != end)):
        raise ValueError(
            f"attention_mask: expected shape [B, cached and new tokens] = [{batch}, {end}], got {list(mask.shape)}"
        )
    if mask is None or (looks and bool(mask.all())):
        return Tokens(batch, new, end, None, None if isinstance(end, int) else end.expand(batch))
    mask = mask.to(x.device, torch.bool)
    start, lengths = mask.long().argmax(dim=1), mask.sum(dim=1)
    if looks:
        _check_mask(mask, start, lengths, past)
    return Tokens(batch, new, end, start, lengths)


def _mask_of(attention_mask: Any) -> Tensor | None:
    if isinstance(attention_mask, Mapping):
        # by the kind of layer; all are made from the same one.
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a 2-D tensor, got {type(attention_mask).__name__}")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected a 2-D one, [B, tokens], of padding only, got shape {list(attention_mask.shape)};"
            " this package masks by index (causal, window, padding) and takes no mask of pairs"
        )
    return attention_mask


def _check_mask(mask: Tensor, start: Tensor, lengths: Tensor, past: int | Tensor) -> None:
    columns = torch.arange(mask.shape[1], device=mask.device)
    block = (columns >= start[:, None]) & (columns < (start + lengths)[:, None])
    if not torch.equal(block, mask):
        row = int((block != mask).any(dim=1).nonzero()[0])
        raise ValueError(
            f"attention_mask: expected one block of ones in every row, got holes in row {row}; pad on the left to"
            " generate"
        )
    if (not isinstance(past, int) or past > 0) and bool((~mask[:, -1]).any()):
        raise ValueError("attention_mask: expected padding on the left of cached tokens, got some on the right")


def _check_positions(position_ids: Tensor | None, mask: Tensor | None, new: int) -> None:
    """Packed sequences restart their positions; here a row is one sequence, whose tokens stand side by side."""
    if position_ids is None or new < 2:
        return
    is_step = position_ids.diff(dim=-1) == 1
    if mask is not None:
        used = mask[:, -new:].to(position_ids.device, torch.bool)
        is_step = is_step | ~(used[:, 1:] & used[:, :-1])
    if not bool(is_step.all()):
        raise ValueError(
            "position_ids: expected consecutive ones within each row, got others; packed sequences are rows of their"
            " own here, padded"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, L, D], raw, key and value [B, G, S, D] -> [B, L, H, D]."""
    step = kwargs.get(_STEP)
    if step is None:
        raise ValueError(
            f"attn_implementation: {IMPLEMENTATION!r} expected a model patched by apply_clex, got one that is not"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("is_causal: expected True, since causality goes by index here, got False")
    q, k, v = (x.transpose(1, 2) for x in autocast(query, key, value))
    if q.shape[1] <= MAX_NEW_TOKENS and not torch.is_grad_enabled():
        return step.decode(q, k, v, scaling, sliding_window, softcap), None
    end, start = step.slots(k.shape[1])
    if isinstance(end, int):
        k, v, end = k[:, :end], v[:, :end], None
    bounds = {"kv_start": start, "kv_end": end, "lengths": step.tokens.lengths}
    options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "dropout_p": float(dropout)}
    return attention(q, k, v, step.table, is_causal=True, **bounds, **options), None


def _keep_2d(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' mask interface: the mask of padding as it came, also when it is asked for ahead of the forward."""
    return attention_mask


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _keep_2d)
