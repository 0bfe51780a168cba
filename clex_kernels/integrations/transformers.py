"""Raw keys in the cache of a transformers model, for CLEX and for the RoPE it has. CLEX, in two lines:

    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf")
    apply_clex(model, ClexConfig(head_dim=128, train_length=4096))

or, for a checkpoint whose rope_scaling is of type "clex", apply_clex(model). Its cache then holds raw keys, its
attention is this package's, and the base model has the module `clex_layer`, under the names of the authors' checkpoints
(`model.clex_layer.proj_func.ode_up_proj`). save_pretrained writes settings and weights; from_pretrained and apply_clex
bring them back, since importing this file makes the RoPE type "clex" known to transformers.

RoPE scaled otherwise (linear, YaRN, LongRoPE, Llama 3.1's) is refused, since CLEX starts from plain frequencies. Models
that share one configuration object are patched together or not at all, since that object has the settings.

In training mode every forward draws one t and one set of positions for all layers; else t comes from the lengths, of
each sequence by itself.

A model whose own RoPE changes with length (dynamic NTK, LongRoPE) needs one line, apply_raw_key_cache(model).

Models whose heads or sequences are split over processes: see parallel.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

from clex_kernels.config import ClexConfig, check_config
from clex_kernels.integrations.checkpoints import read_ode_weights
from clex_kernels.integrations.families import WITHOUT_CLEX, device_of, find_base, rotate_again
from clex_kernels.integrations.raw_keys import IMPLEMENTATION, RawKeyRotary
from clex_kernels.integrations.rope_types import RopeFrequencies, read_dims
from clex_kernels.integrations.split import WHOLE, Split
from clex_kernels.integrations.steps import Tokens
from clex_kernels.modules import ClexRotaryEmbedding
from clex_kernels.sampling import check_sampling
from clex_kernels.tables import RotaryTable, RotaryTableStack
from clex_kernels.weights import plain_frequencies

__all__ = ["apply_clex", "apply_raw_key_cache", "remove_clex", "remove_raw_key_cache"]

# contiguous runs, and every fourth step at t = 1: with uniform positions a toy model learned to interpolate between
# sparse tokens and failed on neighbours (docs/extrapolation.md: perplexity at 8x 5.88 against 4.15), and another one
# lost at 1x without plain steps. The authors train large models with positions="uniform", plain_share=0.0.
SAMPLING: Mapping[str, Any] = {"positions": "runs", "factors": "integer", "plain_share": 0.25}

# types whose frequencies are those of plain RoPE up to the length of training.
_PLAIN_AT_FIRST = ("default", "dynamic", "clex")


def apply_clex(
    model: PreTrainedModel, config: ClexConfig | None = None, sampling: Mapping[str, Any] | None = None
) -> ClexRotaryEmbedding:
    """Turn a loaded transformers model into a CLEX model, in place.

    Families: Gemma, Gemma 2, GPT-NeoX, Granite, Llama, Mistral, Mixtral, OLMo 2, Phi (1 and 2), Qwen2, Qwen3,
    their MoE forms, and Starcoder2, whatever the head of the model is. Other models of the process keep working
    unchanged. `model.config` gets the settings (rope_parameters of type "clex", and
    max_position_embeddings = train_length * max_factor).

    Args:
        model: from_pretrained's or a fresh one, with any attention implementation but flash_attention_*.
        config: all settings; None: those of model.config, whose RoPE is of type "clex".
            Where it is, the weights of the ODE come from the checkpoint that the model was loaded from; if there are
            none in it, they start as plain NTK-aware scaling, with a warning.
        sampling: options of `ClexRotaryEmbedding.sample` for forwards in training mode: generator, positions, factors,
            plain_share. None: positions in runs, plain_share = 0.25, and torch's default generator.

    Returns:
        The module of frequencies, which is `model.base_model.clex_layer`.

    Raises:
        TypeError: model, config or an option is of the wrong type.
        ValueError: the family is unknown, the settings don't fit the model, it is patched already, or the files of
            its checkpoint are not found.
    """
    base = find_base(model)
    _check_fresh(model, base)
    config = ClexConfig.from_transformers(base.config) if config is None else config
    check_config(config)
    _check_fits(base, config)
    sampling = _check_sampling(sampling)
    rope = ClexRotaryEmbedding(config, device_of(base)).train(base.training)
    if base.dtype == torch.float64:
        # attention asks for tables in fp64 then.
        rope.double()
    if base.config.rope_parameters["rope_type"] == "clex":
        read_ode_weights(model, rope)
    rotary = _rotary(model, base, _ClexFrequencies(base, config, sampling))
    base.clex_layer = rope
    rotary.attach(base)
    base.config.rope_parameters = config.to_transformers()
    base.config.max_position_embeddings = config.train_length * config.max_factor
    model.set_attn_implementation(IMPLEMENTATION)
    return rope


def remove_clex(model: PreTrainedModel) -> None:
    """Undo apply_clex: the model is again what it was before, its settings included; `clex_layer` is gone.

    Raises:
        TypeError, ValueError: model is no patched transformers model.
    """
    base, before = _detach(model, _ClexFrequencies, "apply_clex")
    del base.clex_layer
    base.config.rope_parameters = before.rope_parameters
    base.config.max_position_embeddings = before.max_position_embeddings


def apply_raw_key_cache(model: PreTrainedModel, recompute: bool | None = None) -> None:
    """Let a loaded transformers model cache raw keys, and rotate all of them by each step's own frequencies, in place.

    Frequencies and amplitude are those of the model's settings (rope_type default, linear, dynamic, yarn, longrope or
    llama3) for the length of each sequence by itself; they are what one pass over its tokens would use (but for
    PhiMoE: see rope_types). Families are apply_clex's, Phi-3 (and Phi-4 of that model_type) and PhiMoE. Other models of
    the process keep working unchanged.

    Keys and values of layers past the first come from hidden states, so they depend on the frequencies of the step
    that computed them, whatever becomes of them in the cache. `recompute` says what to do about that. All new tokens of
    a forward share the frequencies of its last one, also a chunk of a prompt and an assistant's candidates.

    Args:
        model: from_pretrained's or a fresh one, with any attention implementation but flash_attention_*.
        recompute: True: a step by other frequencies than the step before first passes all cached tokens through the
            model again, whose inputs the cache remembers; logits then are those of one pass over all tokens. False:
            cached values stay as they are. None: True for longrope, whose frequencies change once in a sequence (a
            batch is computed anew at the change of each of them); False for dynamic, whose frequencies change with
            every token past the length of training. A step over a cache on a GPU then waits for the device.

    Raises:
        TypeError: model or recompute is of the wrong type.
        ValueError: the family or the rope_type is unknown, a parameter of it is missing, or it is patched already.
    """
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute: expected a bool or None, got {type(recompute).__name__}")
    base = find_base(model)
    _check_fresh(model, base)
    frequencies = _OwnFrequencies(base, recompute)
    _, rotary_dim = read_dims(base.config)
    rotated = 2 * len(base.rotary_emb.inv_freq)
    if rotated != rotary_dim:
        raise ValueError(
            "rope_parameters: expected a partial_rotary_factor that the model follows, got one that makes"
            f" {rotary_dim} channels of a head where it rotates {rotated}"
        )
    _rotary(model, base, frequencies).attach(base)
    model.set_attn_implementation(IMPLEMENTATION)


def remove_raw_key_cache(model: PreTrainedModel) -> None:
    """Undo apply_raw_key_cache: the model is again what it was before. Caches that it filled are of no use then.

    Raises:
        TypeError, ValueError: model is no patched transformers model.
    """
    _detach(model, _OwnFrequencies, "apply_raw_key_cache")


class _OwnFrequencies:
    """Tables of a model's own RoPE; beside that, what `remove_raw_key_cache` brings back."""

    def __init__(self, base: PreTrainedModel, recompute: bool | None):
        self.rope = RopeFrequencies(base.config)
        self.recomputes = self.rope.moves and (self.rope.changes_once if recompute is None else recompute)
        self.attn_implementation = base.config._attn_implementation

    def table(self, base: PreTrainedModel, tokens: Tokens) -> RotaryTableStack:
        # attention in fp64 asks for tables in fp64, and a model may change its dtype.
        self.rope = self.rope.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
        stack = self.rope.at(self._lengths(base, tokens), tokens.most)
        return stack if stack.index is None else replace(stack, index=stack.index.expand(tokens.batch))

    def state(self, base: PreTrainedModel, tokens: Tokens) -> Tensor | None:
        return self.rope.state(self._lengths(base, tokens)) if self.recomputes else None

    def _lengths(self, base: PreTrainedModel, tokens: Tokens) -> Tensor:
        """[B], or [1] where all are equal."""
        return torch.full((1,), tokens.end, device=device_of(base)) if tokens.lengths is None else tokens.lengths


class _ClexFrequencies:
    """Which table a forward gets; beside that, what `remove_clex` brings back."""

    def __init__(self, base: PreTrainedModel, config: ClexConfig, sampling: Mapping[str, Any]):
        self.config = config
        self.sampling = sampling
        self.checked = WHOLE
        self.rope_parameters = base.config.rope_parameters
        self.max_position_embeddings = base.config.max_position_embeddings
        self.attn_implementation = base.config._attn_implementation

    def table(self, base: PreTrainedModel, tokens: Tokens) -> RotaryTable | RotaryTableStack:
        # looked up anew: PEFT may have wrapped it, and then chooses whose weights these are.
        rope = base.clex_layer
        if base.training and torch.is_grad_enabled() and tokens.are_first:
            self._check_draws(base.rotary_emb.split, rope.device)
            return rope.sample(tokens.new, **self.sampling)
        if tokens.lengths is None:
            return rope(tokens.end)
        if self.config.scale_policy == "integer":
            return rope.stack(max(tokens.most, self.config.train_length * self.config.max_factor))
        return rope.at(tokens.lengths, tokens.most)

    def state(self, base: PreTrainedModel, tokens: Tokens) -> None:
        return None

    def _check_draws(self, split: Split, device: torch.device) -> None:
        """Once for each way to split, since it waits for the device."""
        if self.checked != split:
            split.check_draws(self.sampling.get("generator"), device)
            self.checked = split


def _check_fresh(model: PreTrainedModel, base: PreTrainedModel) -> None:
    if isinstance(base.rotary_emb, RawKeyRotary):
        raise ValueError(
            "model: expected one that is not patched, got one that is; remove_clex or remove_raw_key_cache undoes it"
        )
    if any(getattr(part, "_hf_peft_config_loaded", False) for part in (model, base)):
        raise ValueError(
            "model: expected one without adapters, got one loaded from an adapter's directory; load the base model,"
            " apply_clex, then PeftModel.from_pretrained"
        )
    implementation = base.config._attn_implementation or ""
    if "flash" in implementation:
        raise ValueError(
            f"attn_implementation: expected 'sdpa' or 'eager', got {implementation!r}; this package brings its own"
            ' fused attention, so load the model with attn_implementation="sdpa"'
        )
    if getattr(base.config, "output_attentions", False):
        raise ValueError("output_attentions: expected False, since no kernel here keeps the attention weights")


def _rotary(model: PreTrainedModel, base: PreTrainedModel, frequencies: Any) -> RawKeyRotary:
    # not every build of torch has torch.distributed.
    if not dist.is_available():
        return RawKeyRotary(base.rotary_emb, frequencies)
    from clex_kernels.integrations.parallel import take_heads

    return RawKeyRotary(base.rotary_emb, frequencies, Split(heads=take_heads(model, base)))


def _detach(model: PreTrainedModel, kind: type, name: str) -> tuple[PreTrainedModel, Any]:
    """Undo what both patches do; the base model, and the frequencies that it had."""
    base = find_base(model)
    rotary = base.rotary_emb
    if not isinstance(rotary, RawKeyRotary) or not isinstance(rotary.frequencies, kind):
        raise ValueError(f"model: expected one patched by {name}, got one that is not")
    rotary.detach(base)
    rotate_again(base)
    model.set_attn_implementation(rotary.frequencies.attn_implementation)
    return base, rotary.frequencies


def _check_fits(base: PreTrainedModel, config: ClexConfig) -> None:
    """That heads, rotary dimension and plain frequencies, which t = 1 keeps, are the model's."""
    if base.config.model_type in WITHOUT_CLEX:
        raise ValueError(
            f"model: expected a family other than {', '.join(WITHOUT_CLEX)}, whose configurations accept no rope_type"
            f" 'clex', so that what is saved could not be loaded, got {base.config.model_type}; apply_raw_key_cache"
            " serves the RoPE that it has"
        )
    rope = base.config.rope_parameters
    if rope["rope_type"] not in _PLAIN_AT_FIRST:
        raise ValueError(
            f"model: expected one of plain RoPE (rope_type {' or '.join(map(repr, _PLAIN_AT_FIRST))}), whose"
            f" frequencies t = 1 keeps, got rope_type {rope['rope_type']!r}; apply_raw_key_cache serves the RoPE that a"
            " model has"
        )
    head_dim, rotary_dim = read_dims(base.config)
    expected = {"head_dim": head_dim, "rotary_dim": rotary_dim, "rope_base": float(rope["rope_theta"])}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise ValueError(f"config.{name}: expected the model's {value}, got {getattr(config, name)}")


def _check_sampling(sampling: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if sampling is not None and not isinstance(sampling, Mapping):
        raise TypeError(f"sampling: expected a dictionary, got {type(sampling).__name__}")
    options = {**SAMPLING, **(sampling or {})}
    unknown = sorted(set(options) - {"generator", *SAMPLING})
    if unknown:
        raise ValueError(f"sampling: expected the options generator, {', '.join(SAMPLING)}, got {', '.join(unknown)}")
    check_sampling(options.get("generator"), *(options[name] for name in SAMPLING))
    return options


def _compute_parameters(config: Any, device: torch.device | None = None, **_: Any) -> tuple[Tensor, float]:
    """What transformers' own rotary embedding computes for the type "clex", until apply_clex replaces it."""
    return plain_frequencies(ClexConfig.from_transformers(config), device or "cpu").float(), 1.0


def _validate(config: Any, parameters: Mapping[str, Any], ignore_keys: set[str] | None = None) -> None:
    if "max_factor" not in parameters:
        raise ValueError(f'rope_parameters: expected "max_factor" for type "clex", got {dict(parameters)}')


ROPE_INIT_FUNCTIONS["clex"] = _compute_parameters
RotaryEmbeddingConfigMixin._validate_clex_rope_parameters = _validate
