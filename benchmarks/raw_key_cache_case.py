"""Small transformers models on their own RoPE, past the length of training: raw keys beside stock transformers.

Sizes, weights and inputs are those of end_to_end_case. A cache holds the same keys for all ways: raw for this package,
for transformers rotated by the frequencies of this very step, as no live cache of it has them; so one fp64 truth is
right for both, and what is compared is time alone. Frequencies of the truth come from formulas of its own.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from benchmarks.end_to_end_case import (
    DTYPES,
    Q_GAIN,
    SETS,
    SIZES,
    STATIC,
    DecodeShape,
    DecodeStep,
    ExactRotary,
    InputSet,
    Rope,
    Sizes,
    cache_maker,
    only,
    plain_frequencies,
)
from benchmarks.measure import Way, errors_over_largest
from clex_kernels.integrations.recompute import remember
from clex_kernels.integrations.transformers import apply_raw_key_cache
from examples.extrapolation.methods import frequencies

OURS = "apply_raw_key_cache"
STOCK = "transformers: eager rotary, sdpa"
EAGER = "transformers: eager rotary, eager attention"
RECOMPUTE = "apply_raw_key_cache: recompute, then a step"
AFTER = "apply_raw_key_cache: a step past the switch"
ONE_PASS = "transformers: one pass over all tokens"
DYNAMIC_FACTOR = 2.0


class Kind(NamedTuple):
    """A model's configuration, and the frequencies of so many tokens, both by sizes."""

    config: Callable[[Sizes], PreTrainedConfig]
    rope: Callable[[Sizes, int], Rope]


def dynamic_config(sizes: Sizes) -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": sizes.clex.rope_base, "factor": DYNAMIC_FACTOR}
    settings = {**sizes.settings, "max_position_embeddings": sizes.train_length}
    return LlamaConfig(**settings, head_dim=sizes.D, rope_parameters=rope)


def dynamic_rope(sizes: Sizes, length: int) -> Rope:
    """NTK-aware scaling is a larger base."""
    alpha = DYNAMIC_FACTOR * max(length / sizes.train_length, 1.0) - (DYNAMIC_FACTOR - 1)
    base = sizes.clex.rope_base * alpha ** (sizes.D / (sizes.D - 2))
    return Rope(base ** (-torch.arange(0, sizes.D, 2, dtype=torch.float64) / sizes.D))


def yarn_config(sizes: Sizes) -> PreTrainedConfig:
    rope = {
        "rope_type": "yarn",
        "rope_theta": sizes.clex.rope_base,
        "factor": float(sizes.clex.max_factor),
        "original_max_position_embeddings": sizes.train_length,
    }
    return LlamaConfig(**sizes.settings, head_dim=sizes.D, rope_parameters=rope)


def yarn_rope(sizes: Sizes, length: int) -> Rope:
    return Rope(*frequencies("yarn", float(sizes.clex.max_factor), sizes.clex))


def longrope_config(sizes: Sizes) -> PreTrainedConfig:
    """Of a Phi-3 whose long factors are YaRN's."""
    factors = plain_frequencies(sizes.clex) / yarn_rope(sizes, 0).freq
    rope = {
        "rope_type": "longrope",
        "rope_theta": sizes.clex.rope_base,
        "factor": float(sizes.clex.max_factor),
        "original_max_position_embeddings": sizes.train_length,
        "short_factor": [1.0] * len(factors),
        "long_factor": factors.tolist(),
    }
    # those of the real one are beyond this vocabulary.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    settings = {**sizes.settings, "original_max_position_embeddings": sizes.train_length}
    return Phi3Config(**settings, **special, rope_parameters=rope)


def longrope_rope(sizes: Sizes, length: int) -> Rope:
    freq = yarn_rope(sizes, length).freq if length > sizes.train_length else plain_frequencies(sizes.clex)
    return Rope(freq, math.sqrt(1 + math.log(sizes.clex.max_factor) / math.log(sizes.train_length)))


LONGROPE = "Phi-3, LongRoPE"
KINDS = {
    "Llama, dynamic NTK": Kind(dynamic_config, dynamic_rope),
    LONGROPE: Kind(longrope_config, longrope_rope),
    "Llama, YaRN": Kind(yarn_config, yarn_rope),
}


@functools.cache
def stock_weights(kind: str, dtype: torch.dtype, sizes: Sizes) -> PreTrainedModel:
    """The model that all ways copy, with q as in end_to_end_case."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[kind].config(sizes), dtype=dtype, attn_implementation="sdpa")
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            q = attention.q_proj.weight if hasattr(attention, "q_proj") else attention.qkv_proj.weight
            q[: sizes.H * sizes.D].mul_(Q_GAIN)
    return model.eval()


def stock_model(kind: str, dtype: torch.dtype, sizes: Sizes, attention: str = "sdpa") -> PreTrainedModel:
    model = copy.deepcopy(stock_weights(kind, dtype, sizes))
    model.set_attn_implementation(attention)
    return model


def raw_model(kind: str, dtype: torch.dtype, sizes: Sizes) -> PreTrainedModel:
    model = stock_model(kind, dtype, sizes)
    apply_raw_key_cache(model)
    return model


def exact_model(kind: str, dtype: torch.dtype, sizes: Sizes) -> PreTrainedModel:
    """The weights of `dtype` in fp64."""
    model = stock_model(kind, dtype, sizes).double()
    model.model.rotary_emb = ExactRotary()
    return model


class StockStep(DecodeStep):
    """A step of transformers' own, which computes frequencies by length anew, as every step of a growing cache does."""

    def prepare(self, turn: int) -> None:
        super().prepare(turn)
        # dynamic NTK's are computed where a step is longer than all before it.
        self.model.model.rotary_emb.max_seq_len_cached = self.cache.get_seq_length()


class RawKeyCase:
    """Decode steps of one kind of model past the length of training, over caches that alternate."""

    def __init__(self, kind: str, shape: DecodeShape, sizes: Sizes = SIZES):
        self.kind, self.shape, self.sizes, self.dtype = kind, shape, sizes, DTYPES[shape.dtype]
        self.rope = KINDS[kind].rope(sizes, shape.S + 1)
        self.sets = [InputSet(shape, sizes, seed) for seed in range(SETS)]
        self.keys = [drawn.rotated(self.rope) for drawn in self.sets]
        model = exact_model(kind, self.dtype, sizes)
        for drawn in self.sets:
            drawn.truths = {kind: drawn.find_truth(model, self.rope)}

    def ours(self) -> DecodeStep:
        """As apply_raw_key_cache has it by default, LongRoPE's with a memory of its inputs."""
        model = raw_model(self.kind, self.dtype, self.sizes)
        caches = [self.remembered(model, drawn.fill(DynamicCache(), None)) for drawn in self.sets]
        return DecodeStep(OURS, model, self.sets, caches, self.kind)

    def remembered(self, model: PreTrainedModel, cache: Cache) -> Cache:
        """The cache as if the model had filled it at the frequencies of the step to come."""
        chosen = model.model.rotary_emb.frequencies
        if chosen.recomputes:
            inputs = torch.zeros(self.shape.B, self.shape.S, dtype=torch.int64)
            state = chosen.rope.state(torch.tensor([self.shape.S + 1]))
            remember(cache, model.model, {"input_ids": inputs}, state)
        return cache

    def stock(self, name: str, attention: str = "sdpa", is_static: bool = False) -> StockStep:
        model = stock_model(self.kind, self.dtype, self.sizes, attention)
        make = cache_maker(model, self.shape, is_static)
        caches = [drawn.fill(make(), keys) for drawn, keys in zip(self.sets, self.keys, strict=True)]
        return StockStep(name + STATIC * is_static, model, self.sets, caches, self.kind)

    def rivals(self) -> list[StockStep]:
        return [self.stock(STOCK), self.stock(EAGER, "eager"), self.stock(STOCK, is_static=True)]


@dataclass
class SwitchStep:
    """One way to read the first token past the length of training; `first` are the tokens that its cache has."""

    name: str
    model: nn.Module
    case: "SwitchCase"
    caches: list[Cache | None]
    first: int

    def prepare(self, turn: int) -> None:
        self.tokens = self.case.tokens[turn % SETS]
        # a step changes its cache.
        self.cache = copy.deepcopy(self.caches[turn % SETS])

    @torch.no_grad()
    def run(self) -> Tensor:
        cache = {"use_cache": True} if self.cache is None else only(self.cache, self.tokens)
        return self.model(**{**cache, "input_ids": self.tokens[:, self.first :], "logits_to_keep": 1}).logits

    def errors(self, turn: int, logits: Tensor) -> dict[str, float]:
        return errors_over_largest({"logits": logits}, {"logits": self.case.truths[turn % SETS]})

    def way(self) -> Way:
        return Way(self.name, self.run, self.prepare, self.errors)


class SwitchCase:
    """The step where a LongRoPE model's frequencies change, of one sequence, against one pass over all tokens."""

    def __init__(self, dtype: str, sizes: Sizes = SIZES):
        self.dtype, self.sizes, self.cached = DTYPES[dtype], sizes, sizes.train_length
        shape = (SETS, 1, self.cached + 1)
        self.tokens = torch.randint(sizes.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.truths = self.find_truths()

    @torch.no_grad()
    def find_truths(self) -> list[Tensor]:
        """Logits [1, 1, vocabulary] after all tokens, in fp64."""
        model = exact_model(LONGROPE, self.dtype, self.sizes)
        rotary = model.model.rotary_emb
        rotary.rope = longrope_rope(self.sizes, self.cached + 1)
        rotary.positions = torch.arange(self.cached + 1)
        return [model(tokens, use_cache=False, logits_to_keep=1).logits for tokens in self.tokens]

    @torch.no_grad()
    def filled(self, model: PreTrainedModel, is_past: bool) -> list[Cache | None]:
        """Caches with all tokens but the last, of before the switch or of after it."""
        caches: list[Cache | None] = []
        for tokens in self.tokens:
            cache = DynamicCache()
            model(**only(cache, tokens if is_past else tokens[:, :-1]))
            cache.crop(-1 if is_past else 0)
            caches.append(cache)
        return caches

    def recompute(self) -> SwitchStep:
        model = raw_model(LONGROPE, self.dtype, self.sizes)
        return SwitchStep(RECOMPUTE, model, self, self.filled(model, is_past=False), self.cached)

    def after(self) -> SwitchStep:
        """The same step where the cache is of these frequencies already."""
        model = raw_model(LONGROPE, self.dtype, self.sizes)
        return SwitchStep(AFTER, model, self, self.filled(model, is_past=True), self.cached)

    def one_pass(self) -> SwitchStep:
        """What generate() of transformers' Phi-3 does there, which drops its cache."""
        return SwitchStep(ONE_PASS, stock_model(LONGROPE, self.dtype, self.sizes), self, [None] * SETS, 0)
