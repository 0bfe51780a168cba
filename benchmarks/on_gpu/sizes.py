"""The sizes that are measured on a GPU; tests have small ones of their own."""

from dataclasses import dataclass

from benchmarks.shapes import (
    DECODE_BATCHES,
    DECODE_LENGTHS,
    LLAMA_2_7B,
    LLAMA_3_8B,
    LLAMA_4K,
    LONGEST,
    PHI_2,
    TABLE_LENGTHS,
    DecodeShape,
    ProjectionShape,
    RotaryShape,
)


@dataclass(frozen=True)
class Sizes:
    """Named as their features; lengths in tokens, copies in bytes, products as sides of square matrices.

    heads: D and rotated pairs that kernels are checked at.
    """

    heads: tuple[tuple[int, int], ...]
    rotary: RotaryShape
    prefill: tuple[int, ...]
    training: tuple[int, ...]
    attention_heads: tuple[int, int, int]
    rows_checked: int
    decode: tuple[DecodeShape, ...]
    paged: DecodeShape
    pages: tuple[int, ...]
    projections: dict[ProjectionShape, tuple[int, ...]]
    tables: int
    layer: ProjectionShape
    layer_lengths: tuple[int, ...]
    layer_caches: tuple[DecodeShape, ...]
    copies: tuple[int, ...]
    products: tuple[int, ...]


FULL = Sizes(
    heads=((64, 32), (80, 16), (128, 64), (256, 128)),
    rotary=LLAMA_4K,
    prefill=(8 << 10, 1 << 10, 32 << 10, 4 << 10, 2 << 10, 16 << 10),
    training=(4 << 10, 1 << 10, 8 << 10),
    # H, G and D.
    attention_heads=(32, 8, 128),
    rows_checked=32,
    decode=(
        DECODE_LENGTHS[1],
        *DECODE_BATCHES,
        DECODE_LENGTHS[0],
        DECODE_LENGTHS[2],
        DecodeShape("bf16", 8, 128 << 10),
    ),
    paged=DECODE_BATCHES[1],
    pages=(16, 64, 256),
    projections={LLAMA_3_8B: (1, 16, 64, 512, 8192), LLAMA_2_7B: (1, 8192), PHI_2: (1, 8192)},
    tables=LONGEST,
    layer=LLAMA_3_8B,
    layer_lengths=(TABLE_LENGTHS["4K"], 1 << 10),
    layer_caches=(DECODE_LENGTHS[1], DECODE_BATCHES[1]),
    copies=(256 << 20, 1 << 30),
    products=(4096, 8192),
)
