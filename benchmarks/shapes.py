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


@dataclass(frozen=True)
class DecodeShape:
    """One new token over caches of S slots each, all of D rotated; `lengths`: tokens cached by sequence, None for S."""

    dtype: str
    B: int
    S: int
    lengths: tuple[int, ...] | None = None
    H: int = 32
    G: int = 8
    D: int = 128

    @property
    def cache(self) -> tuple[int, int, int, int]:
        """Head-major, as it lies in memory."""
        return (self.B, self.G, self.S, self.D)

    @property
    def name(self) -> str:
        keys = (
            f"{self.S >> 10}K keys" if self.lengths is None else f"{min(self.lengths):,} to {max(self.lengths):,} keys"
        )
        return f"{self.dtype}, batch {self.B}, {keys}"

    def __str__(self) -> str:
        return f"q {[self.B, 1, self.H, self.D]}, caches {list(self.cache)} in memory"


DECODE_LENGTHS = tuple(DecodeShape("bf16", 1, keys << 10) for keys in (4, 32, 128))
DECODE_32K = DECODE_LENGTHS[1]
DECODE_FP32 = DecodeShape("fp32", 1, 32 << 10)
DECODE_BATCHES = tuple(DecodeShape("bf16", 8, keys << 10) for keys in (4, 32))
DECODE_MIXED = DecodeShape("bf16", 8, 32 << 10, (1000, 3000, 5000, 9000, 14000, 20000, 28000, 32768))


@dataclass(frozen=True)
class ProjectionShape:
    """x [1, M, C] to q [1, M, H, D], k and v [1, M, G, D], the first 2R of D rotated."""

    name: str
    C: int
    H: int
    G: int
    D: int
    R: int
    has_bias: bool = False

    @property
    def heads(self) -> tuple[int, int, int]:
        return (self.H, self.G, self.G)

    @property
    def weight(self) -> tuple[int, int]:
        """Of q, k and v in one."""
        return (sum(self.heads) * self.D, self.C)

    def __str__(self) -> str:
        bias = ", with bias" if self.has_bias else ""
        return f"C {self.C}, H {self.H}, G {self.G}, D {self.D}, 2R {2 * self.R}{bias}"


LLAMA_2_7B = ProjectionShape("Llama-2-7B", C=4096, H=32, G=32, D=128, R=64)
# Mixtral-8x7B's too.
LLAMA_3_8B = ProjectionShape("Llama-3-8B", C=4096, H=32, G=8, D=128, R=64)
MIXTRAL_8X22B = ProjectionShape("Mixtral-8x22B", C=6144, H=48, G=8, D=128, R=64)
PHI_2 = ProjectionShape("Phi-2", C=2560, H=32, G=32, D=80, R=16, has_bias=True)
PROJECTIONS = (LLAMA_2_7B, LLAMA_3_8B, MIXTRAL_8X22B, PHI_2)
