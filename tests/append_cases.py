"""Appends of every kind, and what a plain loop over tokens makes of them."""

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GUARD = 4096
# how [2, B, S, G, D] lies in memory.
LAYOUTS = {"contiguous": (0, 1, 2, 3, 4), "head-major": (0, 1, 3, 2, 4), "packed": (1, 2, 3, 0, 4)}


class Case(NamedTuple):
    """kv_end by sequence, new tokens, and the cache: slots of a sequence, of a page (None: no pages), and a layout."""

    kv_end: tuple[int, ...] = (37, 150)
    length: int = 5
    slots: int = 160
    g: int = 2
    d: int = 16
    page: int | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.bfloat16
    ints: torch.dtype = torch.int64


CASES = {
    "one token": Case(length=1),
    "five tokens": Case(),
    "a prefill": Case(length=70, kv_end=(70, 150)),
    "a full cache": Case(kv_end=(160, 160)),
    "a whole cache at once": Case(length=160, kv_end=(160, 160)),
    "head-major": Case(layout="head-major", length=3),
    "head-major prefill": Case(layout="head-major", length=70, kv_end=(90, 150), dtype=torch.float32),
    "keys and values in one tensor": Case(layout="packed", length=70, kv_end=(90, 150)),
    "padding before the first slot": Case(kv_end=(3, 150), length=70),
    "nothing to write": Case(kv_end=(0, 0)),
    "nothing to write in one sequence": Case(kv_end=(0, 7, 1), ints=torch.int32),
    "pages of 16": Case(page=16),
    "pages of 48": Case(page=48, slots=192, length=70, kv_end=(192, 71)),
    "pages of 256": Case(page=256, slots=512, length=70, kv_end=(300, 0), ints=torch.int32),
    "pages and padding": Case(page=16, length=40, kv_end=(33, 9)),
    "head-major pages": Case(page=48, slots=192, length=5, kv_end=(50, 3), layout="head-major"),
    "pages of both in one tensor": Case(page=16, length=1, layout="packed", kv_end=(16, 17)),
    "int32": Case(ints=torch.int32, page=16, length=2),
    "fp32": Case(dtype=torch.float32),
    "fp16": Case(dtype=torch.float16),
    "fp64": Case(dtype=torch.float64, page=16),
    "odd D and G": Case(d=13, g=3, length=70, kv_end=(100, 60), page=16),
    "D of one": Case(d=1, g=1),
    "D 80": Case(d=80, length=66, kv_end=(66, 150)),
    "D 256, more heads than a tile takes": Case(d=256, g=11, kv_end=(37,), dtype=torch.float32, length=2),
    "no sequences": Case(kv_end=()),
    "no tokens": Case(length=0),
}


class Step(NamedTuple):
    k: Tensor
    v: Tensor
    memory: Tensor
    k_cache: Tensor
    v_cache: Tensor
    kv_end: Tensor
    block_table: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.k, self.v, self.k_cache, self.v_cache, self.kv_end, self.block_table


def cache_shape(case: Case) -> tuple[int, ...]:
    """A contiguous cache's, or a pool's with three pages to spare."""
    batch = len(case.kv_end)
    if case.page is None:
        return batch, case.slots, case.g, case.d
    return batch * case.slots // case.page + 3, case.page, case.g, case.d


def views(memory: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache in memory, between guard zones."""
    order, sizes = LAYOUTS[case.layout], (2, *cache_shape(case))
    inner = memory[GUARD : len(memory) - GUARD].view([sizes[i] for i in order])
    k_cache, v_cache = inner.permute([order.index(i) for i in range(5)]).unbind(0)
    return k_cache, v_cache


def make_step(case: Case, device: torch.device | str = "cpu") -> Step:
    """Random numbers everywhere; pages are shuffled, and the ids of those that get nothing are nonsense."""
    generator = torch.Generator().manual_seed(0)
    batch = len(case.kv_end)
    # rows with gaps, as in slices of a fused projection.
    k, v = torch.randn(batch, case.length, 2, case.g, case.d + 3, generator=generator)[..., : case.d].unbind(2)
    memory = torch.randn(2 * math.prod(cache_shape(case)) + 2 * GUARD, generator=generator)
    block_table = None
    if case.page is not None:
        pages = case.slots // case.page
        block_table = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages].reshape(batch, pages)
        first = torch.arange(pages) * case.page
        end = torch.tensor(case.kv_end)[:, None]
        unused = (first >= end) | (first + case.page <= end - case.length)
        block_table[unused] = torch.tensor([-7, 10**6])[torch.arange(int(unused.sum())) % 2]
        block_table = block_table.to(device, case.ints)
    # .to() would make the rows dense.
    k, v = (torch.empty_strided(x.shape, x.stride(), dtype=case.dtype, device=device).copy_(x) for x in (k, v))
    memory = memory.to(device, case.dtype)
    return Step(k, v, memory, *views(memory, case), torch.tensor(case.kv_end).to(device, case.ints), block_table)


def written(step: Step, case: Case) -> Tensor:
    """The memory after a plain loop over tokens, in which every index is checked."""
    memory = step.memory.clone()
    caches = views(memory, case)
    for (b, end), token in product(enumerate(step.kv_end.tolist()), range(case.length)):
        block, slot = b, end - case.length + token
        if not 0 <= slot < case.slots:
            continue
        if case.page is not None:
            block, slot = int(step.block_table[b, slot // case.page]), slot % case.page
            if not 0 <= block < len(caches[0]):
                continue
        for x, cache in zip((step.k, step.v), caches, strict=True):
            cache[block, slot] = x[b, token]
    return memory


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
