"""ODE weights to benchmark with: those a training run left, or synthetic ones of the size the golden files have."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import CONFIG
from clex_kernels import ClexConfig

SETS = 4


@dataclass
class Weights:
    """Several weight sets behind one pair of tensors: `load` writes the next set into the tensors every way reads."""

    kind: str
    config: ClexConfig
    sets: list[tuple[Tensor, Tensor]]
    up: Tensor = field(init=False)
    down: Tensor = field(init=False)

    def __post_init__(self):
        self.up, self.down = (weight.clone() for weight in self.sets[0])

    def load(self, turn: int) -> None:
        up, down = self.sets[turn % len(self.sets)]
        with torch.no_grad():
            self.up.copy_(up)
            self.down.copy_(down)

    def index(self, turn: int) -> int:
        return turn % len(self.sets)


def synthetic_weights(config: ClexConfig = CONFIG) -> Weights:
    """Uniform up, normal down, as large as in the golden file for tanh at D = 128."""
    generator = torch.Generator().manual_seed(0)
    bound = config.hidden_size**-0.5
    up = (2 * torch.rand(config.pairs, config.hidden_size, generator=generator) - 1) * bound
    down = torch.randn(config.hidden_size, config.pairs, generator=generator) * 0.004
    return Weights("synthetic", config, perturbed(up, down))


def learned_weights(path: Path) -> Weights:
    """What examples.train_tiny learned, as saved by the report."""
    saved = torch.load(path, weights_only=True)
    return Weights("learned", ClexConfig(**saved["config"]), perturbed(saved["up"], saved["down"]))


def perturbed(up: Tensor, down: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The weights and neighbours 1 % away, for inputs that alternate."""
    generator = torch.Generator().manual_seed(1)

    def near(weight: Tensor) -> Tensor:
        return weight * (1 + 0.01 * torch.randn(weight.shape, generator=generator))

    return [(up, down)] + [(near(up), near(down)) for _ in range(SETS - 1)]
