"""Over which ranks a patched model's heads and sequences are split, and what that changes for a forward.

Heads: every rank rotates its own by the same table, so its gradient to the frequencies is that of its heads. They are
summed over the ranks once per step, on what all layers share.

Sequences: every rank has its zigzag shard of each, [B, L / n]; table, t and padding are those of the whole ones.
ring_attention sums dfreq over the n ranks, so on each of them it is that of the sum of their losses. All other weights
get that sum's gradient in shares, one per rank, and DDP, FSDP or whoever averages gradients over the ranks turns it
into that of the mean loss. For the frequencies an average of n equal sums would be n times too large: they are divided
by n here. Then averaging over the ranks is right for every parameter, and changes nothing in the ODE's.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from clex_kernels.tables import RotaryTable, RotaryTableStack

# what needs torch.distributed, which not every build of torch has, is imported where ranks are.
if TYPE_CHECKING:
    from clex_kernels.distributed.groups import Ranks


class Split(NamedTuple):
    """The ranks that heads, and tokens, are split over; None: each rank has all of them."""

    heads: "Ranks | None" = None
    tokens: "Ranks | None" = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Split":
        """Itself: a copy of a model works with the same processes.

        Raises:
            TypeError: its heads are split: the forwards that transformers puts in would go on with the first one's
                weights.
        """
        if self.heads is not None:
            raise TypeError("model: expected whole heads to copy it, got heads split over ranks; copy it before that")
        return self

    @property
    def token_ranks(self) -> int:
        """n, how many ranks share a sequence."""
        return 1 if self.tokens is None else self.tokens.size

    def share(self, table: RotaryTable | RotaryTableStack) -> RotaryTable | RotaryTableStack:
        """The table for all layers of one step, whose gradient comes out as the module docstring says."""
        freq = table.freq
        if not freq.requires_grad or self == WHOLE:
            return table
        if self.heads is not None:
            from clex_kernels.distributed.tensor import sum_gradients

            freq = sum_gradients(freq, self.heads.group)
        if self.tokens is not None:
            freq = freq.view_as(freq)
            freq.register_hook(lambda dfreq: dfreq / self.token_ranks)
        return replace(table, freq=freq)

    def whole(self, x: Tensor) -> Tensor:
        """x [B, L / n] of this rank's tokens, integers, of all tokens in their order: [B, L]."""
        if self.tokens is None:
            return x
        from clex_kernels.distributed.zigzag import zigzag_unshard

        return zigzag_unshard(x, self.tokens.group)

    def check_draws(self, generator: torch.Generator | None, device: torch.device) -> None:
        """That the ranks which work on the same sequences draw alike: one all-reduce, which waits for the device.

        Raises:
            ValueError: their generators are in different states.
        """
        state = (torch.default_generator if generator is None else generator).get_state().to(device, torch.int32)
        for ranks in self:
            if ranks is None:
                continue
            bounds = torch.stack((state, -state))
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=ranks.group)
            if not torch.equal(bounds[0], -bounds[1]):
                raise ValueError(
                    "generator: expected one in the same state on all ranks that share sequences, since they must draw"
                    " the same t and positions, got different ones; seed them alike"
                    ' (sampling={"generator": StepGenerator(seed, stream).generator})'
                )


WHOLE = Split()
