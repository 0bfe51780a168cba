"""Layers of attention, with weights that do something, for tests."""

from typing import Any

import torch
from ropes import CONFIG, seeded
from torch import Tensor

from clex_kernels.config import ClexConfig
from clex_kernels.modules import ClexAttention

C = 24


def make_layer(config: ClexConfig = CONFIG, heads: int = 4, kv_heads: int | None = 2, **settings: Any) -> ClexAttention:
    torch.manual_seed(0)
    return ClexAttention(config, C, heads, kv_heads, **settings)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, C, generator=seeded(1), dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item())
