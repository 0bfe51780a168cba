"""Frequencies by kind: CLEX's at t = 16, plain RoPE's, and none; with the fp32 tables that rivals read."""

import functools

import torch
from torch import Tensor

from benchmarks import exact
from benchmarks.shapes import CONFIG, MAX_FACTOR
from benchmarks.weights import Weights, synthetic_weights
from clex_kernels import ClexConfig, reference

TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)


@functools.cache
def weights_of(dims: int, pairs: int) -> Weights:
    config = ClexConfig(dims, CONFIG.train_length, MAX_FACTOR, rotary_dim=2 * pairs)
    return synthetic_weights(config)


@functools.cache
def frequencies(kind: str, dims: int, pairs: int) -> Tensor:
    """[R] fp64 on the CPU: "clex", "plain" or "none"."""
    weights = weights_of(dims, pairs)
    if kind == "clex":
        return exact.solve_exactly(*weights.sets[0], TIME, weights.config)[0]
    plain = reference.plain_log_frequencies(weights.config, torch.float64).exp()
    return plain if kind == "plain" else torch.zeros_like(plain)


def half_tables(freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, R] in fp32, from fp64 angles, where the positions are."""
    return tuple(table.float() for table in exact.cos_sin(positions, freq.to(positions.device)))


def doubled_tables(freq: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [L, 2R] in dtype, as transformers has them."""
    return tuple(table.to(dtype) for table in reference.tables(freq.to(positions.device), positions.double()))
