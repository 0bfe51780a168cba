"""The zigzag order of a sequence split over ranks: of 2n equal chunks, rank r holds r and 2n - 1 - r (context.py)."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from clex_kernels.distributed.groups import Group, Ranks, ranks_of
from clex_kernels.tables import MAX_LENGTH
from clex_kernels.weights import check_device


def _chunks(length: int, ranks: Ranks, name: str) -> int:
    """Tokens of a chunk."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"{name}: expected an int, got {type(length).__name__}")
    if length > MAX_LENGTH:
        raise ValueError(f"{name}: expected at most {MAX_LENGTH} tokens, got {length}")
    if length < 0 or length % (2 * ranks.size):
        raise ValueError(f"{name}: expected L divisible by 2n = {2 * ranks.size}, got {length}")
    return length // (2 * ranks.size)


def _check_sharded(x: Tensor, dim: int) -> int:
    """dim, counted from the front."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of x {list(x.shape)}, got {dim}")
    return dim % x.dim()


def zigzag_positions(length: int, group: Group = None, device: torch.device | str | None = None) -> Tensor:
    """Which tokens of a sequence of `length` this rank holds: int64 [L/n], chunks r and 2n - 1 - r of 2n.

    Raises ValueError for a length not divisible by 2n, a group this process is not in, or a device torch lacks.
    """
    check_device(device)
    ranks = ranks_of(group)
    chunk = _chunks(length, ranks, "length")
    first = torch.arange(chunk, device=device)
    return torch.cat([first + a * chunk for a in (ranks.rank, 2 * ranks.size - 1 - ranks.rank)])


def zigzag_shard(x: Tensor, group: Group = None, dim: int = 1) -> Tensor:
    """This rank's shard of x, whose dimension `dim` is the whole sequence: [.., L/n, ..] of [.., L, ..].

    Differentiable; the gradient of x is that of this rank's loss alone, 0 outside the shard.

    Raises ValueError for an L not divisible by 2n, for a dim x lacks, and for a group this process is not in.
    """
    dim = _check_sharded(x, dim)
    ranks = ranks_of(group)
    chunk = _chunks(x.shape[dim], ranks, f"x: dimension {dim}")
    return torch.cat([x.narrow(dim, a * chunk, chunk) for a in (ranks.rank, 2 * ranks.size - 1 - ranks.rank)], dim)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, dim: int) -> Tensor:
        ctx.ranks, ctx.dim = ranks, dim
        x = x.contiguous()
        shards = [torch.empty_like(x) for _ in range(ranks.size)]
        dist.all_gather(shards, x, group=ranks.group)
        early, late = zip(*(shard.chunk(2, dim) for shard in shards), strict=True)
        return torch.cat([*early, *reversed(late)], dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        group, rank, size = ctx.ranks
        chunks = dx.chunk(2 * size, ctx.dim)
        shards = [torch.cat((chunks[r], chunks[2 * size - 1 - r]), ctx.dim) for r in range(size)]
        dist.reduce_scatter(mine := torch.empty_like(shards[rank]), shards, group=group)
        return mine, None, None


def zigzag_unshard(x: Tensor, group: Group = None, dim: int = 1) -> Tensor:
    """The whole sequence, on every rank, from its zigzag shards x [.., L/n, ..].

    Differentiable: each rank's gradient is that of the sum of all ranks' losses, so a loss that all ranks compute alike
    from the whole counts n times.

    Raises ValueError for a shard that isn't two equal chunks, a dim x lacks, and a group this process is not in.
    """
    dim = _check_sharded(x, dim)
    ranks = ranks_of(group)
    _chunks(x.shape[dim] * ranks.size, ranks, f"x: dimension {dim} on all ranks")
    return _Unshard.apply(x, ranks, dim)
