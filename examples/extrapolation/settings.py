"""Every setting of the experiment, and the key under which a result with those settings is stored."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from clex_kernels import ClexConfig


@dataclass(frozen=True)
class Base:
    """The model, and its training from scratch with plain RoPE, which all methods start from."""

    train_length: int = 128
    head_dim: int = 64
    heads: int = 2
    kv_heads: int = 1
    width: int = 128
    layers: int = 4
    batch: int = 16
    steps: int = 1500
    lr: float = 3e-3
    seed: int = 0


@dataclass(frozen=True)
class Ode:
    """What concerns the ODE alone.

    In the first `head_start` steps of a fine-tuning it learns, at the rate `head_start_lr`, while the model stays as it
    is; then both learn.
    """

    activation: Literal["tanh", "silu"] = "silu"
    hidden_factor: int = 1
    lr: float = 1e-5
    head_start: int = 0
    head_start_lr: float = 1e-4
    down_std: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning at train_length, for equally many steps with all methods."""

    base: Base = field(default_factory=Base)
    max_factor: int = 16
    batch: int = 16
    steps: int = 250
    lr: float = 1e-3
    plain_share: float = 0.25
    factors: Literal["integer", "continuous"] = "integer"
    per_sequence: bool = True
    seed: int = 0
    ode: Ode = field(default_factory=Ode)

    def config(self) -> ClexConfig:
        """CLEX's settings."""
        return ClexConfig(
            head_dim=self.base.head_dim,
            train_length=self.base.train_length,
            max_factor=self.max_factor,
            activation=self.ode.activation,
            hidden_factor=self.ode.hidden_factor,
        )


@dataclass(frozen=True)
class Reading:
    """What a trained model is read on: lengths in train_length, and how much of which text."""

    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    segments: int = 32
    split: Literal["validation", "test"] = "test"


def storage_key(*settings: object) -> str:
    """A name for the results of these dataclasses: equal settings, equal name."""
    text = json.dumps([[type(part).__name__, asdict(part)] for part in settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
