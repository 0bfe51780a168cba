"""A transformers model over raw keys: they enter its cache unrotated, and attention rotates them by this step's tables.

hook before the base model's forward: where the sequences stand, and their table  -> Step, a keyword argument
rotary_emb (RawKeyRotary): RAW in place of cosines and sines                      -> q and k stay raw
the cache: whatever it is, it now holds raw keys; a plain dynamic one grows in place
attention interface "clex_kernels": attention, or decode_attention for a few new tokens, by the Step's table
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from clex_kernels.attention import attention
from clex_kernels.autocast import autocast
from clex_kernels.decode_checks import MAX_NEW_TOKENS
from clex_kernels.integrations.families import RAW, pass_raw
from clex_kernels.integrations.growing_cache import let_grow
from clex_kernels.integrations.recompute import empty, find_inputs, remember
from clex_kernels.integrations.split import WHOLE, Split
from clex_kernels.integrations.steps import Step, Tokens, find_tokens, mask_of
from clex_kernels.tables import RotaryTable, RotaryTableStack

IMPLEMENTATION = "clex_kernels"

_STEP = "rotary_step"
# transformers renames the argument: the old name until 5.40, the new one from 5.24 on.
_CACHE_NAMES = ("cache", "past_key_values")


class Frequencies(Protocol):
    """What decides on the tables of a forward."""

    def table(self, base: PreTrainedModel, tokens: Tokens) -> RotaryTable | RotaryTableStack:
        """The table of this forward's tokens."""

    def state(self, base: PreTrainedModel, tokens: Tokens) -> Tensor | None:
        """[B] or [1], the same for equal frequencies; None: cached tokens are never computed anew."""


class RawKeyRotary(nn.Module):
    """Stands where a model's rotary embedding stood; `plain` is that one.

    Its two hooks on the base model's forward make the Step and mark caches that hold raw keys. `split` says over which
    ranks heads and sequences are split.
    """

    def __init__(self, plain: nn.Module, frequencies: Frequencies, split: Split = WHOLE):
        super().__init__()
        self.plain = plain
        self.frequencies = frequencies
        self.split = split
        self._handles: list[Any] = []

    def attach(self, base: PreTrainedModel) -> None:
        """Take the place of `base.rotary_emb`."""
        base.rotary_emb = self
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, with_kwargs=True),
        ]

    def also_remove(self, handle: Any) -> None:
        """A hook's handle, to remove in `detach`."""
        self._handles.append(handle)

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
        kwargs = {**kwargs, _STEP: self._step(base, args, kwargs)}
        if self.split.tokens is not None and "use_cache" not in arguments_of(base, args, {}):
            # a cache of one rank's tokens is of no use.
            kwargs["use_cache"] = False
        return args, kwargs

    @torch.compiler.disable(reason="clex_kernels: masks are read and tables built outside, and enter as arguments")
    def _step(self, base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        given = arguments_of(base, args, kwargs)
        _check_call(base, given)
        if self.split.tokens is not None:
            _check_uncached(given)
        # anew, for a copy of a patched model or one from a file.
        pass_raw(base)
        if given["cache"] is not None:
            let_grow(given["cache"])
        tokens = find_tokens(given, self.split)
        table = self.split.share(self.frequencies.table(base, tokens))
        if table.log_scale and tokens.lengths is None:
            # a layer with a window does not hold all tokens that the scale counts.
            tokens = tokens._replace(lengths=torch.full((tokens.batch,), tokens.end, device=table.device))
        step = Step(table, tokens, {}, self.frequencies.state(base, tokens), self.split)
        if given["cache"] is not None:
            if step.state is not None:
                _renew(base, given, step)
            given["cache"].is_whole = False
        return step

    def _end(self, base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        for value in values:
            if isinstance(value, Cache):
                value.holds_raw_keys = value.is_whole = True
                value.pads_right = kwargs[_STEP].tokens.pads_right
                if kwargs[_STEP].state is not None:
                    remember(value, base, arguments_of(base, args, kwargs), kwargs[_STEP].state)


def _renew(base: PreTrainedModel, given: dict[str, Any], step: Step) -> None:
    """Compute cached tokens anew if this step's frequencies are not those that they were computed by."""
    cache, inputs = given["cache"], find_inputs(given["cache"])
    if cache.offloading:
        raise ValueError(
            "cache: expected one that is not offloaded, since a change of frequencies computes all of it anew, got an"
            " offloaded one; apply_raw_key_cache(model, recompute=False) takes it"
        )
    past = int(cache.get_seq_length())
    if past == 0:
        return
    if inputs is None or inputs.get_seq_length() != past:
        raise ValueError(
            "cache: expected one that this model filled under recompute, which remembers all its inputs, got one"
            f" without those of {past - (inputs.get_seq_length() if inputs else 0)} of its {past} tokens; run them"
            " through this model anew"
        )
    if torch.equal(*torch.broadcast_tensors(inputs.state, step.state)):
        return
    cache.is_whole = False
    empty(cache)
    mask = mask_of(given.get("attention_mask"))
    again = {**inputs.renew(step.state), "attention_mask": None if mask is None else mask[:, :past]}
    tokens = find_tokens({**again, "cache": cache})
    base.forward(
        **again,
        **{cache_name(type(base)): cache, "use_cache": True, _STEP: Step(step.table, tokens, {}, split=step.split)},
    )


def arguments_of(base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the forward of `base` is called with, by name."""
    given = {**dict(zip(_parameters(type(base)), args, strict=False)), **kwargs}
    given["cache"] = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
    return given


def cache_name(model: type[PreTrainedModel]) -> str:
    """What a model's forward calls its cache."""
    return next(name for name in _CACHE_NAMES if name in _parameters(model))


@lru_cache
def _parameters(model: type[PreTrainedModel]) -> tuple[str, ...]:
    # the first one is self.
    return tuple(inspect.signature(model.forward).parameters)[1:]


def _check_call(base: PreTrainedModel, given: dict[str, Any]) -> None:
    """Refuse what raw keys or this package's attention do not serve."""
    config, cache = base.config, given["cache"]
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation: expected {IMPLEMENTATION!r}, which rotates raw keys, got"
            f" {config._attn_implementation!r}, which does not; set it back, or undo the patch first"
            " (remove_clex or remove_raw_key_cache)"
        )
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions: expected False, since no kernel here keeps the attention weights; undo the patch"
            ' (remove_clex or remove_raw_key_cache) and use attn_implementation="eager" to look at them'
        )
    if cache is not None and not isinstance(cache, Cache):
        raise TypeError(f"cache: expected a transformers Cache, got {type(cache).__name__}")
    if not getattr(cache, "is_whole", True) and not all(int(layer.get_seq_length()) == 0 for layer in cache.layers):
        raise ValueError(
            "cache: expected a whole one, got one of which a forward that failed has left parts; run its tokens through"
            " this model anew"
        )
    if cache is not None and not getattr(cache, "holds_raw_keys", False) and not _is_empty(cache):
        raise ValueError(
            "cache: expected an empty one or one that this model filled, got one that holds keys from elsewhere, which"
            " are rotated already; run its tokens through this model anew"
        )
    if getattr(cache, "pads_right", False) and not _is_empty(cache):
        raise ValueError(
            "cache: expected padding on the left of cached tokens only, got a cache that was filled with some on the"
            " right; pad on the left to generate"
        )
    if base.training and getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            "attention_dropout: expected 0 in training, since the fused attention has no dropout, got"
            f" {config.attention_dropout}; load the model with from_pretrained(..., attention_dropout=0.0)"
        )
    if base.training and torch.is_grad_enabled() and getattr(base.layers[0], "gradient_checkpointing", False):
        _check_checkpointing(base.layers[0], cache)


def _check_uncached(given: dict[str, Any]) -> None:
    if given["cache"] is not None or given.get("use_cache"):
        got = "use_cache=True" if given["cache"] is None else "one"
        raise ValueError(
            f"cache: expected none where sequences are split over ranks (shard_context), got {got}; decode with an"
            " unsplit model, or over split_decode_attention"
        )


def _check_checkpointing(layer: nn.Module, cache: Cache | None) -> None:
    checkpoint = layer._gradient_checkpointing_func
    if isinstance(checkpoint, partial) and checkpoint.keywords.get("use_reentrant", False):
        raise ValueError(
            "use_reentrant: expected False for activation (gradient) checkpointing, got True, which can't carry"
            " gradients to frequencies that all layers share"
        )
    if cache is not None and not _is_empty(cache):
        raise ValueError("cache: expected an empty one under activation checkpointing, which drops it, got cached keys")


def _is_empty(cache: Cache) -> bool:
    is_filled = any(getattr(layer, "is_initialized", False) for layer in cache.layers)
    return not is_filled or int(cache.get_seq_length()) == 0


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, L, D], raw, key and value [B, G, S, D] -> [B, L, H, D]."""
    step = kwargs.get(_STEP)
    if step is None:
        raise ValueError(
            f"attn_implementation: {IMPLEMENTATION!r} expected a model patched by apply_clex or apply_raw_key_cache,"
            " got one that is not"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("is_causal: expected True, since causality goes by index here, got False")
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else _window_of(module)
    step = step.on(query.device)
    _check_heads(module, query, step.split)
    q, k, v = (x.transpose(1, 2) for x in autocast(query, key, value))
    if step.split.tokens is not None:
        return _attend_in_a_ring(q, k, v, step, dropout, scale=scaling, window=window, softcap=softcap), None
    if q.shape[1] <= MAX_NEW_TOKENS and not torch.is_grad_enabled():
        return step.decode(q, k, v, scaling, window, softcap), None
    end, start = step.slots(k.shape[1])
    if isinstance(end, int):
        k, v, end = k[:, :end], v[:, :end], None
    bounds = {"kv_start": start, "kv_end": end, "lengths": step.tokens.lengths}
    options = {"scale": scaling, "window": window, "softcap": softcap, "dropout_p": float(dropout)}
    return attention(q, k, v, step.table, is_causal=True, **bounds, **options), None


def _attend_in_a_ring(q: Tensor, k: Tensor, v: Tensor, step: Step, dropout: float, **options: Any) -> Tensor:
    # not every build of torch has torch.distributed.
    from clex_kernels.distributed.context import ring_attention

    if dropout:
        raise ValueError(f"dropout: expected 0, since the fused attention has none, got {dropout}")
    places = {"kv_start": step.tokens.start, "lengths": step.tokens.lengths}
    return ring_attention(q, k, v, step.table, step.split.tokens.group, **places, **options)


def _check_heads(module: nn.Module, query: Tensor, split: Split) -> None:
    """That the heads here are those that `split` says; else gradients to the frequencies would not be summed."""
    ranks = 1 if split.heads is None else split.heads.size
    heads = getattr(module.config, "num_attention_heads", query.shape[1])
    if query.shape[1] * ranks != heads:
        raise ValueError(
            f"heads: expected {heads} of them over {ranks} ranks, got {query.shape[1]} here; split them by shard_heads,"
            " or by transformers' plan before apply_clex or apply_raw_key_cache, which take the outermost model then"
        )


def _window_of(module: nn.Module) -> int | None:
    """The window of a layer that does not say it to attention (PhiMoE's, Qwen2-MoE's), as masks are made by it."""
    types = getattr(module.config, "layer_types", None)
    slides = types is None or types[module.layer_idx] == "sliding_attention"
    return getattr(module.config, "sliding_window", None) if slides else None


def _keep_2d(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' mask interface: the mask of padding as it came, also when it is asked for ahead of the forward."""
    return attention_mask


# at import, so that a patched model from a file finds them.
AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _keep_2d)
