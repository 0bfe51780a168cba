"""Tiny transformers models of every family, with CLEX weights that matter; stock ones that rotate by given tables."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.masking_utils import eager_mask

from clex_kernels import ClexConfig
from clex_kernels.integrations.families import FAMILIES, WITHOUT_CLEX
from clex_kernels.integrations.transformers import apply_clex, apply_raw_key_cache

VOCABULARY, WIDTH, HEADS = 61, 48, 4
TRAIN_LENGTH = 8

# what a family has beyond the common sizes; heads of 12 are odd-sized for every kernel.
EXTRAS = {
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 5.0},
    "gpt_neox": {"rotary_pct": 0.5, "head_dim": 16, "hidden_size": 64},
    "granite": {"num_key_value_heads": 2, "attention_multiplier": 0.2},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": None, "head_dim": 12},
    "olmo2": {"num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "head_dim": 16, "hidden_size": 64},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": TRAIN_LENGTH},
    "phimoe": {"num_key_value_heads": 2, "num_local_experts": 3},
    "qwen2": {"num_key_value_heads": 2},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen3_moe": {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 3, "num_experts_per_tok": 2},
    "starcoder2": {"num_key_value_heads": 2, "sliding_window": None},
}
assert set(EXTRAS) == set(FAMILIES)
CLEX_FAMILIES = [family for family in FAMILIES if family not in WITHOUT_CLEX]
# Gemma 2 knows no sdpa, and transformers' eager attention takes its softmax in fp32.
PLAIN = "plain fp64"
STOCK_ATTENTION = {"gemma2": PLAIN}


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention in the dtype of its inputs, as transformers asks for it."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.mT * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if attention_mask is not None:
        logits = logits + attention_mask
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(PLAIN, plain_attention)
AttentionMaskInterface.register(PLAIN, eager_mask)


def stock_model(family: str, layers: int = 2, **extras: object) -> PreTrainedModel:
    """A random model in fp64, in evaluation mode, on its own RoPE."""
    torch.manual_seed(len(family))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": TRAIN_LENGTH, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(sizes | special | EXTRAS[family] | extras))
    # the grouped product of experts knows no fp64.
    config._experts_implementation = "eager"
    attention = STOCK_ATTENTION.get(family, "sdpa")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()


def clex_config(model: PreTrainedModel, **changes: object) -> ClexConfig:
    """CLEX over the model's own sizes."""
    settings = model.config
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    rotary_dim = int(head_dim * settings.rope_parameters.get("partial_rotary_factor", 1.0))
    config = ClexConfig(head_dim=head_dim, train_length=TRAIN_LENGTH, max_factor=4, rotary_dim=rotary_dim)
    return dataclasses.replace(config, rope_base=settings.rope_parameters["rope_theta"], **changes)


def clex_model(family: str, layers: int = 2, extras: dict[str, object] | None = None, **changes: object):
    """A patched model in fp64, its ODE far from its start."""
    model = stock_model(family, layers, **(extras or {}))
    rope = apply_clex(model, clex_config(model, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in rope.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


class FixedRotary(nn.Module):
    """Cosines and sines of given frequencies [R] in fp64, as transformers' own rotary embeddings hand them out."""

    def __init__(self, freq: Tensor):
        super().__init__()
        self.freq = freq

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


@torch.no_grad()
def true_logits(model: PreTrainedModel, tokens: Tensor, t: float | None = None) -> Tensor:
    """Logits [B, L, V] of a patched model's weights in stock transformers, at the t of L tokens (or `t`)."""
    rope = model.base_model.clex_layer
    length = tokens.shape[1] if t is None else int(t * rope.config.train_length)
    return stock_of(model, rope(length).freq)(tokens, use_cache=False).logits


def stock_of(model: PreTrainedModel, freq: Tensor) -> PreTrainedModel:
    """A patched model's weights in stock transformers in fp64, rotated by `freq` [R]."""
    stock = type(model)(stock_config(model)).double().eval()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "clex_layer" not in name})
    stock.base_model.rotary_emb = FixedRotary(freq)
    return stock


def stock_config(model: PreTrainedModel) -> AutoConfig:
    """The settings a patched model had before, for the same weights."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = model.base_model.rotary_emb.frequencies.rope_parameters
    config._attn_implementation = STOCK_ATTENTION.get(config.model_type, "sdpa")
    config._experts_implementation = "eager"
    return config


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length], none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch, and its mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return tokens, mask


TOKENS = random_tokens(2, 19)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor | None = TOKENS, **options: object) -> Tensor:
    """Logits [B, L, V] of one forward, without gradients."""
    return model(tokens, **options).logits


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=40)


def dynamic_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


CACHES = pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache], ids=["dynamic", "static"])
# all in fp64; what is left is the order of sums.
CLOSE = {"rtol": 0.0, "atol": 1e-10}


@torch.no_grad()
def in_steps(
    model: PreTrainedModel, tokens: Tensor, sizes: list[int], cache: object, mask: Tensor | None = None
) -> Tensor:
    """Logits [B, L, V] of several forwards over one cache."""
    logits, first = [], 0
    for size in sizes:
        last = first + size
        part = None if mask is None else mask[:, :last]
        out = model(tokens[:, first:last], attention_mask=part, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        first = last
    assert first == tokens.shape[1]
    return torch.cat(logits, dim=1)


# parameters of every type, at which half of the pairs are changed even in models of 8 tokens.
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.02},
    "llama3": {"factor": 4.0, "low_freq_factor": 0.03, "high_freq_factor": 0.8},
    "longrope": {"factor": 4.0},
}


def rope_parameters(family: str, rope_type: str, pairs: int) -> dict[str, object]:
    """Settings of a type for a family and R pairs, trained on TRAIN_LENGTH tokens."""
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    if rope_type in ("yarn", "llama3", "longrope"):
        parameters["original_max_position_embeddings"] = TRAIN_LENGTH
    if rope_type == "longrope":
        parameters["short_factor"] = [1.0 + 0.1 * i for i in range(pairs)]
        parameters["long_factor"] = [1.5 + 0.7 * i for i in range(pairs)]
    if family == "phimoe" and rope_type != "default":
        parameters |= {"short_mscale": 1.2, "long_mscale": 1.5}
    return parameters


class WideNorm(nn.Module):
    """An RMS norm in the dtype of its input; transformers' own round to fp32, where now and then a bit turns."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.offset) * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def widen_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its RMS norms in the dtype of their input from now on."""
    for part in list(model.modules()):
        for name, norm in part.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(part, name, WideNorm(norm))
    return model


def scaled_model(family: str, rope_type: str, layers: int = 2, **extras: object) -> PreTrainedModel:
    """A random model whose RoPE is of the given type, in fp64 all through."""
    pairs = len(stock_model(family, layers, **extras).base_model.rotary_emb.inv_freq)
    parameters = rope_parameters(family, rope_type, pairs)
    if family in ("phi", "gpt_neox"):
        parameters["partial_rotary_factor"] = 0.5
    return widen_norms(stock_model(family, layers, rope_parameters=parameters, **extras))


def exact_rope(config: PreTrainedConfig, length: int) -> tuple[Tensor, float]:
    """Frequencies [R] and amplitude of a sequence of `length` tokens in fp64, pair by pair."""
    rope = {"factor": None, **config.rope_parameters}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    trained = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    factor = config.max_position_embeddings / trained if rope["factor"] is None else rope["factor"]
    theta, amplitude = rope["rope_theta"], rope.get("attention_factor")
    if rope["rope_type"] == "dynamic":
        growth = factor * max(length, config.max_position_embeddings) / config.max_position_embeddings - (factor - 1)
        theta *= growth ** (dim / (dim - 2))
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if rope["rope_type"] == "linear":
        plain = [freq / factor for freq in plain]
    if rope["rope_type"] == "llama3":
        plain = [_llama3(freq, trained, factor, rope) for freq in plain]
    if rope["rope_type"] == "longrope":
        name = "long" if length > trained else "short"
        plain = [freq / by for freq, by in zip(plain, rope[f"{name}_factor"], strict=True)]
        own = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        amplitude = rope.get(f"{name}_mscale") or (own if amplitude is None else amplitude)
    if rope["rope_type"] == "yarn":
        plain = _yarn(plain, trained, factor, rope)
        weights = [rope.get("mscale"), rope.get("mscale_all_dim")]
        above, below = (1 + 0.1 * weight * math.log(max(factor, 1)) for weight in (weights if all(weights) else (1, 0)))
        amplitude = above / below if amplitude is None else amplitude
    return torch.tensor(plain, dtype=torch.float64), 1.0 if amplitude is None else amplitude


def _llama3(freq: float, trained: int, factor: float, rope: dict[str, float]) -> float:
    wavelength = 2 * math.pi / freq
    if wavelength < trained / rope["high_freq_factor"]:
        return freq
    if wavelength > trained / rope["low_freq_factor"]:
        return freq / factor
    share = (trained / wavelength - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    return (1 - share) * freq / factor + share * freq


def _yarn(plain: list[float], trained: int, factor: float, rope: dict[str, float]) -> list[float]:
    pairs, base = len(plain), math.log(rope["rope_theta"])
    turns = [rope.get("beta_fast") or 32, rope.get("beta_slow") or 1]
    first, last = (pairs * math.log(trained / (2 * math.pi * each)) / base for each in turns)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last = last + 0.001 if first == last else last
    shares = [min(max((pair - first) / (last - first), 0), 1) for pair in range(pairs)]
    return [freq * (1 - share) + freq / factor * share for freq, share in zip(plain, shares, strict=True)]


class LengthRotary(nn.Module):
    """Exact cosines and sines in fp64 for the length of each row by itself, handed out as transformers' do."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        tables = []
        for positions in position_ids:
            freq, amplitude = exact_rope(self.config, int(positions.max()) + 1)
            angle = positions[:, None].double() * torch.cat((freq, freq))
            tables.append((amplitude * angle.cos(), amplitude * angle.sin()))
        return tuple(torch.stack(side).to(x.dtype) for side in zip(*tables, strict=True))


def exact_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a stock model that rotates every sequence by its exact frequencies; no cache suits it."""
    exact = copy.deepcopy(model)
    exact.base_model.rotary_emb = LengthRotary(model.config)
    return exact


def raw_key_model(
    family: str, rope_type: str, layers: int = 2, recompute: bool | None = True, **extras: object
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model over raw keys, and the stock one whose single pass over a sequence is the truth."""
    model = scaled_model(family, rope_type, layers, **extras)
    exact = exact_model(model)
    apply_raw_key_cache(model, recompute)
    return model, exact


@torch.no_grad()
def one_pass(exact: PreTrainedModel, row: Tensor, ends: list[int]) -> Tensor:
    """Logits [n, V] of the last tokens of row[:end], each of one pass over these tokens."""
    return torch.cat([exact(row[None, :end], use_cache=False).logits[:, -1] for end in ends])
