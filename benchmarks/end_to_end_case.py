"""A small Llama of transformers in three ways: as it is, under apply_clex, and over raw keys with frozen frequencies.

Sizes are a real small model's, but for the vocabulary: 512, so that the projection to it doesn't drown the rest. q is
drawn larger than a fresh model has it: attention then looks at few tokens, and a wrong rotation shows in the logits.

Every step is compared with the same weights in transformers' own code in fp64, given cosines and sines of the exact
frequencies; it shares no rotary and no attention with this package.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from benchmarks import exact
from benchmarks.measure import Way, errors_over_largest
from benchmarks.weights import Weights, synthetic_weights
from clex_kernels import ClexConfig, RotaryTable, reference
from clex_kernels.integrations.raw_keys import IMPLEMENTATION, RawKeyRotary, cache_name
from clex_kernels.integrations.steps import Tokens
from clex_kernels.integrations.transformers import SAMPLING, apply_clex

SETS = 2
CLEX = "apply_clex"
FROZEN = "raw keys by this package, frozen frequencies"
STOCK = "transformers, plain RoPE: eager rotary, sdpa"
EAGER = "transformers, plain RoPE: eager rotary, eager attention"
COMPILED = "transformers, plain RoPE: layers by torch.compile"
STATIC = ", static cache"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# how many times wider than a fresh model's q is drawn.
Q_GAIN = 2.0
# slots of a static cache past those in use.
ROOM = 64
LEARNING_RATE = 1e-4
CACHE = cache_name(LlamaForCausalLM)


@dataclass(frozen=True)
class Sizes:
    """Of the model; C hidden channels and F in the MLP, t = 1 up to `train_length` tokens."""

    layers: int = 6
    C: int = 512
    F: int = 1408
    H: int = 8
    G: int = 2
    D: int = 64
    vocabulary: int = 512
    train_length: int = 1024

    def __str__(self) -> str:
        heads = f"H {self.H}, G {self.G}, D {self.D}"
        return f"{self.layers} layers, C {self.C}, MLP {self.F}, {heads}, vocabulary {self.vocabulary}"

    @property
    def clex(self) -> ClexConfig:
        return ClexConfig(head_dim=self.D, train_length=self.train_length, max_factor=16)

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers' configurations of several families take."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.C,
            "intermediate_size": self.F,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.H,
            "num_key_value_heads": self.G,
            "initializer_range": self.C**-0.5,
            "max_position_embeddings": self.clex.train_length * self.clex.max_factor,
        }

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        """The same weights every time."""
        torch.manual_seed(0)
        config = LlamaConfig(**self.settings, head_dim=self.D)
        # not .to(dtype), which would round the rotary embedding's own frequencies too.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(Q_GAIN)
        return model


SIZES = Sizes()


class Frozen:
    """Frequencies of raw keys that never change: plain RoPE's."""

    def __init__(self, config: ClexConfig):
        length = config.train_length * config.max_factor + ROOM
        self.fixed = RotaryTable.from_frequencies(plain_frequencies(config), length=length)

    def table(self, base: PreTrainedModel, tokens: Tokens) -> RotaryTable:
        return self.fixed

    def state(self, base: PreTrainedModel, tokens: Tokens) -> None:
        return None


class Rope(NamedTuple):
    """Frequencies [R] in fp64, and what cosines and sines are multiplied by."""

    freq: Tensor
    amplitude: float = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[L, R] each, in fp64."""
        cos, sin = exact.cos_sin(positions, self.freq)
        return self.amplitude * cos, self.amplitude * sin

    def rotate_keys(self, k: Tensor) -> Tensor:
        """k [B, G, S, D] at positions 0 .. S - 1, in fp64."""
        return exact.rotate(k.transpose(1, 2), *self.cos_sin(torch.arange(k.shape[2]))).transpose(1, 2)


class ExactRotary(nn.Module):
    """In a model's `rotary_emb`: cosines and sines in fp64, of the frequencies and positions that were put here."""

    rope: Rope
    positions: Tensor

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rope.cos_sin(self.positions)
        return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]


def plain_frequencies(config: ClexConfig) -> Tensor:
    return reference.plain_log_frequencies(config, torch.float64).exp()


def clex_model(sizes: Sizes, weights: Weights, dtype: torch.dtype, **sampling: Any) -> LlamaForCausalLM:
    model = sizes.model(dtype=dtype)
    ode = apply_clex(model, sizes.clex, sampling).proj_func
    with torch.no_grad():
        ode.ode_up_proj.copy_(weights.up)
        ode.ode_down_proj.copy_(weights.down)
    return model


def frozen_model(sizes: Sizes, dtype: torch.dtype) -> LlamaForCausalLM:
    model = sizes.model(dtype=dtype)
    RawKeyRotary(model.model.rotary_emb, Frozen(sizes.clex)).attach(model.model)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def exact_model(sizes: Sizes) -> LlamaForCausalLM:
    model = sizes.model(dtype=torch.float64).eval()
    model.model.rotary_emb = ExactRotary()
    return model


def only(cache: Cache, step: Tensor) -> dict[str, Any]:
    return {"input_ids": step, CACHE: cache, "use_cache": True}


class TrainingStep:
    """One way to train: a model and its optimizer, and what is true of its next step."""

    def __init__(self, case: "TrainingCase", name: str, model: LlamaForCausalLM):
        self.case, self.name, self.model = case, name, model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def prepare(self, turn: int) -> None:
        case = self.case
        generator = torch.Generator().manual_seed(turn)
        self.tokens = torch.randint(case.sizes.vocabulary, (1, case.length), generator=generator)
        case.sampling.manual_seed(turn)
        self.truth = case.truth(self)
        case.sampling.manual_seed(turn)

    def run(self) -> tuple[Tensor, Tensor]:
        with self.case.autocast():
            out = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False)
        self.optimizer.zero_grad()
        out.loss.backward()
        self.optimizer.step()
        return out.loss.detach(), out.logits.detach()

    def errors(self, turn: int, result: tuple[Tensor, Tensor]) -> dict[str, float]:
        return errors_over_largest(dict(zip(("loss", "logits"), result, strict=True)), self.truth)

    def way(self, every: int = 1) -> Way:
        return Way(self.name, self.run, self.prepare, self.errors, every)


class TrainingCase:
    """Whole training steps, optimizer included, on other tokens, weights and t every time; bf16 is autocast."""

    def __init__(self, dtype: str, length: int | None = None, sizes: Sizes = SIZES):
        self.dtype, self.sizes, self.length = dtype, sizes, length or sizes.train_length
        self.weights = synthetic_weights(sizes.clex)
        self.sampling = torch.Generator()
        self.exact = exact_model(sizes)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    @torch.no_grad()
    def truth(self, step: TrainingStep) -> dict[str, Tensor]:
        """Of a step that has its tokens; draws as that step will."""
        rotary = self.exact.model.rotary_emb
        rotary.rope, rotary.positions = Rope(plain_frequencies(self.sizes.clex)), torch.arange(self.length)
        if step.name == CLEX:
            rope = step.model.model.clex_layer
            drawn = rope.sample(self.length, **{**SAMPLING, "generator": self.sampling})
            time = torch.tensor([float(drawn.t)], dtype=torch.float64)
            ode = rope.proj_func
            rotary.rope = Rope(exact.solve_exactly(ode.ode_up_proj, ode.ode_down_proj, time, self.sizes.clex)[0])
            rotary.positions = drawn.positions
        found = self.exact.load_state_dict(step.model.state_dict(), strict=False)
        assert not found.missing_keys
        out = self.exact(input_ids=step.tokens, labels=step.tokens, use_cache=False)
        return {"loss": out.loss, "logits": out.logits}

    def clex(self) -> TrainingStep:
        model = clex_model(self.sizes, self.weights, torch.float32, generator=self.sampling)
        return TrainingStep(self, CLEX, model)

    def frozen(self) -> TrainingStep:
        return TrainingStep(self, FROZEN, frozen_model(self.sizes, torch.float32))

    def rivals(self) -> list[TrainingStep]:
        compiled = self.sizes.model()
        for layer in compiled.model.layers:
            layer.compile()
        return [
            TrainingStep(self, STOCK, self.sizes.model()),
            TrainingStep(self, COMPILED, compiled),
            TrainingStep(self, EAGER, self.sizes.model("eager")),
        ]


class DecodeStep:
    """One way to decode: a model, and a filled cache per input set that every step leaves as long as it was.

    `truth` says which of a set's truths are this way's.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, sets: Sequence["InputSet"], caches: Sequence[Cache], truth: str
    ):
        self.name, self.model, self.sets, self.caches, self.truth = name, model.eval(), sets, caches, truth

    def prepare(self, turn: int) -> None:
        self.cache, self.tokens = self.caches[turn % SETS], self.sets[turn % SETS].tokens

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.model(**only(self.cache, self.tokens)).logits

    def errors(self, turn: int, logits: Tensor) -> dict[str, float]:
        self.cache.crop(-1)
        return errors_over_largest({"logits": logits}, {"logits": self.sets[turn % SETS].truths[self.truth]})

    def way(self, every: int = 1) -> Way:
        return Way(self.name, self.run, self.prepare, self.errors, every)


@dataclass(frozen=True)
class DecodeShape:
    """One token for each of B sequences with S cached ones."""

    dtype: str
    B: int
    S: int

    def __str__(self) -> str:
        return f"{self.dtype}, batch {self.B}, {self.S:,} cached tokens"


class InputSet:
    """Raw keys and values [B, G, S, D] of every layer, the next tokens [B, 1], and the logits that are right."""

    def __init__(self, shape: DecodeShape, sizes: Sizes, seed: int):
        generator = torch.Generator().manual_seed(seed)
        size = (sizes.layers, 2, shape.B, sizes.G, shape.S, sizes.D)
        self.layers = torch.randn(size, generator=generator).to(DTYPES[shape.dtype])
        self.tokens = torch.randint(sizes.vocabulary, (shape.B, 1), generator=generator)
        self.truths: dict[str, Tensor] = {}

    def rotated(self, rope: Rope) -> list[Tensor]:
        """The keys of every layer, rotated in fp64."""
        return [rope.rotate_keys(k).to(k.dtype) for k, _ in self.layers]

    def fill(self, cache: Cache, rotated: Sequence[Tensor] | None) -> Cache:
        """The cache with these keys in it; None: raw ones."""
        for number, (k, v) in enumerate(self.layers):
            cache.update(k if rotated is None else rotated[number], v, number)
        cache.holds_raw_keys = rotated is None
        return cache

    @torch.no_grad()
    def find_truth(self, model: PreTrainedModel, rope: Rope) -> Tensor:
        """Logits [B, 1, vocabulary] of an exact model."""
        model.model.rotary_emb.rope = rope
        model.model.rotary_emb.positions = torch.tensor([self.layers.shape[-2]])
        cache = DynamicCache()
        for number, (k, v) in enumerate(self.layers):
            cache.update(rope.rotate_keys(k), v.double(), number)
        return model(**only(cache, self.tokens)).logits


def cache_maker(model: PreTrainedModel, shape: DecodeShape, is_static: bool) -> Callable[[], Cache]:
    if is_static:
        return partial(StaticCache, config=model.config, max_cache_len=shape.S + ROOM)
    return DynamicCache


class DecodeCase:
    """Whole decode steps over caches that alternate; t is by length."""

    def __init__(self, shape: DecodeShape, sizes: Sizes = SIZES):
        self.shape, self.sizes, self.dtype = shape, sizes, DTYPES[shape.dtype]
        self.weights = synthetic_weights(sizes.clex)
        plain = Rope(plain_frequencies(sizes.clex))
        self.t = sizes.clex.length_factor(shape.S + 1)
        time = torch.tensor([self.t], dtype=torch.float64)
        ropes = {
            "clex": Rope(exact.solve_exactly(self.weights.up, self.weights.down, time, sizes.clex)[0]),
            "plain": plain,
        }
        self.sets = [InputSet(shape, sizes, seed) for seed in range(SETS)]
        self.keys = [drawn.rotated(plain) for drawn in self.sets]
        model = exact_model(sizes)
        model.load_state_dict(sizes.model(dtype=self.dtype).state_dict())
        for drawn in self.sets:
            drawn.truths = {name: drawn.find_truth(model, rope) for name, rope in ropes.items()}

    def step(self, name: str, model: LlamaForCausalLM, is_raw: bool, is_static: bool = False) -> DecodeStep:
        make = cache_maker(model, self.shape, is_static)
        caches = [
            drawn.fill(make(), None if is_raw else keys) for drawn, keys in zip(self.sets, self.keys, strict=True)
        ]
        truth = "clex" if name == CLEX else "plain"
        return DecodeStep(name + STATIC * is_static, model, self.sets, caches, truth)

    def clex(self, is_static: bool = False) -> DecodeStep:
        return self.step(CLEX, clex_model(self.sizes, self.weights, self.dtype), True, is_static)

    def frozen(self, is_static: bool = False) -> DecodeStep:
        return self.step(FROZEN, frozen_model(self.sizes, self.dtype), True, is_static)

    def rivals(self) -> list[DecodeStep]:
        return [
            self.step(STOCK, self.sizes.model(dtype=self.dtype), False),
            self.step(EAGER, self.sizes.model("eager", self.dtype), False),
            self.step(STOCK, self.sizes.model(dtype=self.dtype), False, is_static=True),
        ]
