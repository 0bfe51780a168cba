"""Checks of the projection with rotary, by both of its backends, and of appending to a cache, which is bit for bit."""

from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.on_gpu.attention_checks import to_pages
from benchmarks.on_gpu.checks import DTYPES, Check, Head, follow_rule, label, spread_over
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import Sizes
from clex_kernels import RotaryTable, append_kv, qkv_rotary, reference

OFFSET = 100
HEADS = (4, 2)
# tokens of two sequences, columns and which keys: a row for every tile of the launch table, which goes by tokens.
PROJECTIONS = {
    "tile of 16 tokens": (5, 200, "rotated", False),
    "tile of 64 tokens": (21, 256, "raw", True),
    "tile of 512 tokens": (150, 200, "both", True),
    "tile of many tokens": (330, 264, "both", False),
}
# kv_end by sequence, new tokens, slots and page.
APPENDS = {
    "one token": ((37, 150), 1, 160, None),
    "a prefill and padding": ((70, 30), 70, 160, None),
    "pages of 16": ((33, 160), 5, 160, 16),
    "pages of 64": ((65, 192), 1, 192, 64),
    "pages of 256, a prefill": ((300, 512), 70, 512, 256),
}


def check_projection(feature: str, head: Head, dtype: str, backend: str, gpu: Gpu) -> None:
    """Forward and backward."""
    length, width, keys, has_bias = PROJECTIONS[feature]
    kind, generator = DTYPES[dtype], torch.Generator().manual_seed(6)
    rows = (HEADS[0] + 2 * HEADS[1]) * head[0]

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator)).to(kind)

    inputs = {"x": draw(2, length, width), "weight": draw(rows, width, scale=width**-0.5)}
    if has_bias:
        inputs["bias"] = draw(rows)
    freq = 10000.0 ** -(torch.arange(head[1], dtype=torch.float64) / head[1])
    douts = [draw(2, length, heads, head[0]) for heads in (*HEADS, HEADS[1], HEADS[1])]

    def results(outs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(
            outs, list(leaves.values()), [dy.to(y) for y, dy in zip(outs, douts, strict=False)]
        )
        named = dict(zip(("q", "k", "v", "raw k"), outs, strict=False))
        return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}

    def actual() -> dict[str, Tensor]:
        leaves = {name: x.to(gpu.device, copy=True).requires_grad_() for name, x in (inputs | {"freq": freq}).items()}
        table = RotaryTable.from_frequencies(leaves["freq"], length=1024)
        arguments = (leaves["x"], leaves["weight"], table, *HEADS, leaves.get("bias"), OFFSET, keys)
        return results(qkv_rotary(*arguments, backend=backend), leaves)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()} | {
            "freq": freq.clone().requires_grad_()
        }
        projected = F.linear(leaves["x"], leaves["weight"], leaves.get("bias")).unflatten(-1, (-1, head[0]))
        q, k, v = projected.split((*HEADS, HEADS[1]), dim=-2)
        tables = reference.tables(leaves["freq"], OFFSET + torch.arange(length))
        rotated = reference.rotary(k, *tables)
        outs = {"rotated": (rotated, v), "raw": (k, v), "both": (rotated, v, k)}[keys]
        return results((reference.rotary(q, *tables), *outs), leaves)

    follow_rule(kind, actual(), expected(kind), expected(torch.float64))


def check_append(feature: str, head: Head, dtype: str, gpu: Gpu) -> None:
    """The whole cache afterwards, against a plain loop over tokens."""
    ends, length, slots, page = APPENDS[feature]
    generator = torch.Generator().manual_seed(0)
    kv_end = torch.tensor(ends)

    def draw(rows: int) -> list[Tensor]:
        size = (len(ends), rows, 3, head[0])
        return [torch.randn(size, generator=generator).to(DTYPES[dtype]) for _ in range(2)]

    new, caches = draw(length), draw(slots)
    truths = [cache.clone() for cache in caches]
    for (b, end), token in product(enumerate(ends), range(length)):
        if end - length + token >= 0:
            for truth, x in zip(truths, new, strict=True):
                truth[b, end - length + token] = x[b, token]
    block_table = None
    if page is not None:
        truths, block_table = to_pages(page, kv_end, *truths)
        caches, _ = to_pages(page, kv_end, *caches)
    on_device = [x.to(gpu.device) for x in (*new, *caches)]
    append_kv(*on_device, kv_end.to(gpu.device), None if block_table is None else block_table.to(gpu.device))
    for name, cache, truth in zip(("k_cache", "v_cache"), on_device[2:], truths, strict=True):
        # NaN in pages of nobody equals itself as bits.
        same = torch.equal(*(x.cpu().contiguous().view(torch.uint8) for x in (cache, truth)))
        assert same, f"{name}: differs from a loop over tokens"


def projection_checks(sizes: Sizes, backends: tuple[str, ...]) -> list[Check]:
    """By each of the device's backends, of which Triton's has a tile for every row of PROJECTIONS."""
    return [
        Check("qkv_rotary", f"{label(*variant)}, backend={backend}", partial(check_projection, *variant, backend))
        for backend in backends
        for variant in spread_over(list(PROJECTIONS), sizes.heads)
    ]


def append_checks(sizes: Sizes) -> list[Check]:
    return [
        Check("append_kv", label(*variant), partial(check_append, *variant))
        for variant in spread_over(list(APPENDS), sizes.heads)
    ]
