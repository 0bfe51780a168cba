"""The paged cache: memory of all layers in one tensor, and which of its pages are free.

A page holds P token slots of one sequence, in every layer. memory [layers, 2, pages, P, G, D] has raw keys, then
values; memory[layer] are the two pools [pages, P, G, D] that append_kv and decode_attention take with a block_table.
"""

import torch
from torch import Tensor

from clex_kernels.config import check_integer
from clex_kernels.decode_checks import PAGE_MULTIPLE


class PagePool:
    """Pages, handed out and taken back by number; nothing moves when a sequence grows.

    Args:
        pages: how many there are.
        page_size: P, slots of a page, a multiple of 16.
        shape: layers, G and D.
        like: a tensor with the dtype and device that keys have.

    Raises:
        ValueError: pages or page_size is out of range.
    """

    def __init__(self, pages: int, page_size: int, shape: tuple[int, int, int], like: Tensor):
        check_integer("pages", pages, least=1)
        if check_integer("page_size", page_size, least=1) % PAGE_MULTIPLE:
            raise ValueError(f"page_size: expected a multiple of {PAGE_MULTIPLE}, got {page_size}")
        layers, kv_heads, head_dim = shape
        self.page_size = page_size
        # what slots hold before they are written is never looked at.
        self.memory = like.new_empty((layers, 2, pages, page_size, kv_heads, head_dim))
        self._free = list(range(pages))

    @property
    def pages(self) -> int:
        """All pages, free or not."""
        return self.memory.shape[2]

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def count_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` free pages, which are the caller's from now on; ValueError if there are fewer."""
        if count > self.free:
            raise ValueError(f"count: expected at most the {self.free} pages that are free, got {count}")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """Makes pages free again."""
        self._free += pages

    def save(self, pages: list[int]) -> Tensor:
        """The contents of pages in host memory, [layers, 2, len(pages), P, G, D]."""
        return self.memory[:, :, torch.tensor(pages, dtype=torch.int64)].cpu()

    def restore(self, pages: list[int], saved: Tensor) -> None:
        """Writes what `save` returned to as many pages, which may be others."""
        self.memory[:, :, torch.tensor(pages, dtype=torch.int64)] = saved.to(self.memory.device)
