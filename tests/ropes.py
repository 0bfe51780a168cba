"""Modules with weights that do something, for tests."""

import torch
from torch import Tensor

from clex_kernels.config import ClexConfig
from clex_kernels.frequencies import solve_frequencies
from clex_kernels.modules import ClexRotaryEmbedding

CONFIG = ClexConfig(head_dim=16, train_length=32, max_factor=8, activation="silu")
CONTINUOUS = ClexConfig(head_dim=16, train_length=32, max_factor=8, scale_policy="continuous")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_rope(config: ClexConfig = CONFIG, seed: int = 0) -> ClexRotaryEmbedding:
    """A module whose ODE does something: the authors' initialisation has down = 0."""
    rope = ClexRotaryEmbedding(config).eval()
    generator = seeded(seed)
    with torch.no_grad():
        for weight, size in zip(rope.parameters(), (0.3, 0.05), strict=True):
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return rope


def solved(rope: ClexRotaryEmbedding, *times: float) -> Tensor:
    """Frequencies of the module's weights by the public solver, for non-decreasing times."""
    up, down = (weight.detach() for weight in rope.parameters())
    return solve_frequencies(up, down, torch.tensor(times, dtype=torch.float64), rope.config)
