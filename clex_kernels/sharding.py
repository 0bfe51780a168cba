"""DTensors in the public functions: what a device mesh may split, and what every rank then computes.

A dimension of the mesh splits the batch (Shard(0) of q, k and v), the heads (Shard(2)), or nothing (Replicate; any
other placement is redistributed to it). Ranks need nothing from one another then: each calls the function with its own
part of every argument, and the results are DTensors again. `attention` and `decode_attention` take the split from q,
`append_kv` from the caches, `qkv_rotary` from x and q's weight, `apply_rotary` from q and k each by itself.

Arguments that are no DTensors are taken as equal on all ranks. Of those with a row per sequence every rank takes the
rows of its own sequences. k and v follow q. Query head h reads key head h // (H / G); with n ranks along the heads,

    n divides G    rank r's H / n query heads read its G / n key heads
    G divides n    they all read key head r // (n / G), which every rank takes from a whole copy of k and v

and n that neither divides nor is divided by G is refused.

What each rank has of dfreq is a part of a sum over all tokens and heads: one all-reduce [T, R] adds the parts, as the
gradient leaves the DTensor that the table's freq is made for this. `replicate_table` makes it once for all layers.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from clex_kernels.rotary_checks import check_choice, check_kind
from clex_kernels.tables import RotaryTable, RotaryTableStack

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

BATCH, HEADS, NOTHING = "batch", "heads", "nothing"


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor; there is none where torch was built without its distributed package."""
    return type(x) is not Tensor and torch.distributed.is_available() and isinstance(x, DTensor)


def replicate_table(table: RotaryTable | RotaryTableStack, mesh: "DeviceMesh") -> RotaryTable | RotaryTableStack:
    """The table with its freq as a DTensor on `mesh`, for calls with DTensors on it; equal on all ranks before.

    Calls do this by themselves. Done once per step, it lets all layers share the one all-reduce that adds up dfreq.
    A table that has been through this is returned as it is.

    Raises:
        TypeError: table is no table, or mesh no DeviceMesh.
        ValueError: its freq is a DTensor of another mesh.
    """
    check_kind(table)
    if not (torch.distributed.is_available() and isinstance(mesh, DeviceMesh)):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    if is_dtensor(table.freq):
        check_mesh("table", table.freq, mesh)
        return table
    whole = [Replicate()] * mesh.ndim
    return replace(table, freq=DTensor.from_local(table.freq, mesh, whole, run_check=False))


@dataclass(frozen=True)
class Layout:
    """What each dimension of a mesh splits: BATCH, HEADS or NOTHING."""

    mesh: "DeviceMesh"
    splits: tuple[str, ...]

    @classmethod
    def of(cls, x: "DTensor", batch: int | None, heads: int) -> "Layout":
        """As x is placed, whose sequences are along the dimension `batch` and its heads along `heads`."""
        by_place = {Shard(heads): HEADS} | ({} if batch is None else {Shard(batch): BATCH})
        return cls(x.device_mesh, tuple(by_place.get(place, NOTHING) for place in x.placements))

    def count(self, split: str) -> int:
        """Into how many parts something is split."""
        return prod([self.mesh.size(i) for i, kind in enumerate(self.splits) if kind == split])

    def rank(self, split: str) -> int:
        """Which of them is this rank's."""
        rank = 0
        for i, kind in enumerate(self.splits):
            if kind == split:
                rank = rank * self.mesh.size(i) + self.mesh.get_local_rank(i)
        return rank

    def placed(
        self, batch: int | None, heads: int | None, without: "Placement | None" = None
    ) -> "tuple[Placement, ...]":
        """Of a tensor with these dimensions; where it lacks what is split it is whole, or its placement `without`."""
        dims = {BATCH: batch, HEADS: heads}
        without = Replicate() if without is None else without
        return tuple(
            [
                Replicate() if kind == NOTHING else without if dims[kind] is None else Shard(dims[kind])
                for kind in self.splits
            ]
        )

    def local(self, name: str, x: Any, batch: int | None, heads: int | None) -> Tensor:
        """This rank's part of x, which is redistributed if it is placed otherwise, and so is its gradient."""
        check_mesh(name, x, self.mesh)
        placements, gradient = self.placed(batch, heads), self.placed(batch, heads, Partial())
        adds = placements != gradient and x.requires_grad and torch.is_grad_enabled()
        if x.placements != placements or adds:
            # also where nothing moves: its backward pass adds the ranks' gradients up.
            x = x.redistribute(placements=placements)
        return x.to_local(grad_placements=gradient)

    def local_keys(self, name: str, x: Any, groups: int, batch: int | None, heads: int) -> Tensor:
        """This rank's part of k, v or one of their weights, whose dimension `heads` holds G = `groups` heads."""
        if groups % self.count(HEADS) == 0:
            return self.local(name, x, batch, heads)
        return self._narrow(self.local(name, x, batch, None), groups, heads)

    def local_cache(self, name: str, x: Any, q: "DTensor", batch: int | None) -> Tensor:
        """This rank's part of a cache with heads along its dimension 2, as a view: a cache is not moved."""
        check_mesh(name, x, self.mesh)
        if x.placements == self.placed(batch, 2) and x.shape[2] % self.count(HEADS) == 0:
            return x.to_local()
        if x.placements != self.placed(batch, None):
            expected = " or ".join(str(self.placed(batch, heads)) for heads in (2, None))
            raise ValueError(
                f"{name}: expected placements {expected} beside q's {q.placements}, since a cache is not moved, got"
                f" {x.placements}"
            )
        return self._narrow(x.to_local(), x.shape[2], 2)

    def check_heads(self, name: str, heads: int, groups: int | None = None) -> None:
        """That the heads come out even, H and, if given, those of the keys."""
        count = self.count(HEADS)
        if heads % count:
            raise ValueError(
                f"{name}: expected heads in a multiple of the {count} ranks they are split over, got {heads}"
            )
        if groups is None:
            return
        if groups == 0 or heads % groups:
            raise ValueError(f"{name}: expected H to be a multiple of G={groups}, got H={heads}")
        if groups % count and count % groups:
            raise ValueError(
                f"{name}: expected H to be split over a divisor or a multiple of G={groups} ranks, got {count}"
            )

    def rows(self, name: str, x: Any, count: int) -> Any:
        """The rows of this rank's sequences, of an argument with one for each of `count`; what is no tensor stays."""
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0 or x.shape[0] != count:
            raise ValueError(f"{name}: expected B={count} rows, got shape {list(x.shape)}")
        if is_dtensor(x):
            check_mesh(name, x, self.mesh)
            return x.redistribute(placements=self.placed(0, None)).to_local()
        for i, kind in enumerate(self.splits):
            if kind == BATCH:
                parts, rank = x.chunk(self.mesh.size(i)), self.mesh.get_local_rank(i)
                x = parts[rank] if rank < len(parts) else x[:0]
        return x

    def shared_table(self, table: RotaryTable | RotaryTableStack) -> RotaryTable | RotaryTableStack:
        """The table with a freq whose gradient is this rank's part of the whole one."""
        check_kind(table)
        if not is_dtensor(table.freq) and not (table.freq.requires_grad and torch.is_grad_enabled()):
            return table
        table = replicate_table(table, self.mesh)
        whole, freq = self.placed(None, None), table.freq
        # no redistribution where there is nothing to move: its backward pass would add the parts up in every layer.
        freq = freq if freq.placements == whole else freq.redistribute(placements=whole)
        return replace(table, freq=freq.to_local(grad_placements=self.placed(None, None, Partial())))

    def local_table(
        self, table: Any, sequences: int, picks_by_length: bool, debug: bool
    ) -> RotaryTable | RotaryTableStack:
        """That, with this rank's rows of the index."""
        table = self.shared_table(table)
        if isinstance(table, RotaryTable):
            return table
        if picks_by_length and table.index is None and table.train_length is not None:
            return table
        check_choice(table, sequences, debug)
        tables = table.coarse.shape[0]
        if table.index is None and tables == 1:
            return table
        # without an index a table's number is its sequence's, which is another on this rank.
        index = torch.arange(tables, device=table.device) if table.index is None else table.index
        return replace(table, index=self.rows("index", index, sequences))

    def whole(self, x: Tensor, batch: int | None, heads: int, sizes: dict[int, int]) -> "DTensor":
        """The DTensor of which x is this rank's part; sizes: of the dimensions that may be split."""
        placements = self.placed(batch, heads)
        shape = [sizes.get(dim, size) for dim, size in enumerate(x.shape)]
        stride = list(x.stride())
        for i, place in enumerate(placements):
            if isinstance(place, Shard):
                outer = [dim for dim in range(x.dim()) if dim != place.dim and stride[dim] >= stride[place.dim]]
                for dim in outer:
                    stride[dim] *= self.mesh.size(i)
        return DTensor.from_local(
            x, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )

    def _narrow(self, x: Tensor, groups: int, dim: int) -> Tensor:
        """Of all G heads along `dim` those that this rank's queries read."""
        ranks, each = self.count(HEADS), x.shape[dim] // groups
        return x.narrow(dim, self.rank(HEADS) * groups // ranks * each, max(groups // ranks, 1) * each)


def check_mesh(name: str, x: Any, mesh: "DeviceMesh") -> None:
    """That an argument is a DTensor on the mesh of the others."""
    if not is_dtensor(x):
        raise TypeError(f"{name}: expected a DTensor beside other DTensors, got {type(x).__name__}")
    if x.device_mesh != mesh:
        raise ValueError(f"{name}: expected on one mesh with the other arguments, {mesh}, got {x.device_mesh}")
