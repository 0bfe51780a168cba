"""Named sizes and dtypes of the benchmarks; letters as in the README."""

from dataclasses import dataclass

import torch

from clex_kernels import ClexConfig

CONFIG = ClexConfig(head_dim=128, train_length=4096, max_factor=16)
MAX_FACTOR = 16

TABLE_LENGTHS = {"4K": 4 << 10, "128K": 128 << 10, "1M": 1 << 20}
LONGEST = TABLE_LENGTHS["1M"]


@dataclass(frozen=True)
class RotaryShape:
    """q [B, L, H, D] and k [B, L, G, D], all of D rotated."""

    name: str
    B: int
    L: int
    H: int
    G: int
    D: int

    @property
    def q(self) -> tuple[int, int, int, int]:
        return (self.B, self.L, self.H, self.D)

    @property
    def k(self) -> tuple[int, int, int, int]:
        return (self.B, self.L, self.G, self.D)

    def __str__(self) -> str:
        return f"{self.name}: q {list(self.q)}, k {list(self.k)}"


LLAMA_4K = RotaryShape("Llama 8B at 4K", B=1, L=4096, H=32, G=8, D=128)
ROTARY_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

GQA_1K = RotaryShape("grouped-query attention at 1K", B=1, L=1024, H=8, G=2, D=128)

LAYER_LENGTHS = (1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10)
LAYER_WIDTH, LAYER_HEADS, LAYER_KV_HEADS, LAYER_HEAD_DIM = 256, 4, 2, 64
# most time that CLEX may take: over this package with frozen frequencies, and over transformers with plain RoPE.
LAYER_GOALS = (1.03, 0.95)
