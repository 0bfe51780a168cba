"""What the device itself can do, measured: bytes copied and bf16 operations a second; and floors made of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import time_once

ROUNDS = 20
# longer than the host needs for a call.
HOLD = 1e-3


@dataclass(frozen=True)
class Cost:
    """What a call can't do without, counted from its shapes: bytes of memory, and floating point operations."""

    bytes: int
    operations: int = 0


@dataclass(frozen=True)
class Floors:
    """Bytes a second, read and written, of a large copy; bf16 operations a second of a large product."""

    bandwidth: float
    rate: float

    def seconds(self, cost: Cost) -> float:
        return max(cost.bytes / self.bandwidth, cost.operations / self.rate)

    def bound(self, cost: Cost) -> str:
        """What the floor of a cost is made of."""
        return "memory" if cost.bytes / self.bandwidth >= cost.operations / self.rate else "products"


def median_seconds(gpu: Gpu, run: Callable[[], Any]) -> float:
    time_once(gpu, run)
    return statistics.median(time_once(gpu, run, HOLD)[1] for _ in range(ROUNDS))


@torch.no_grad()
def measure_floors(gpu: Gpu, sizes: Sizes) -> Floors:
    """The best medians over a few sizes."""
    bandwidths, rates = [], []
    for size in sizes.copies:
        source = torch.ones(size // 4, dtype=torch.float32, device=gpu.device)
        into = torch.empty_like(source)
        bandwidths.append(2 * size / median_seconds(gpu, lambda x=source, y=into: y.copy_(x)))
    for side in sizes.products:
        a, b = (torch.randn(side, side, device=gpu.device).bfloat16() for _ in range(2))
        into = torch.empty_like(a)
        rates.append(2 * side**3 / median_seconds(gpu, lambda a=a, b=b, y=into: torch.mm(a, b, out=y)))
    gpu.forget()
    return Floors(max(bandwidths), max(rates))


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)
