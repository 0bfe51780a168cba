"""One forward of a model over raw keys: where its tokens stand, by the 2-D mask and the cache, and their table.

A Step is made once per forward and travels to every layer as an argument, so that a checkpointed layer that runs again
in the backward pass gets the table it had. Cache slots serve as positions: only their differences count. Column m of
the 2-D mask is token m of the cache, whichever of them a layer still holds: the S slots that a layer's cache returns
are the last S columns, or, in a static cache that has more slots than there are columns, begin with the first.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clex_kernels.decode import prepare_decode
from clex_kernels.integrations.split import WHOLE, Split
from clex_kernels.tables import RotaryTable, RotaryTableStack, on_host


class Tokens(NamedTuple):
    """Where a forward's tokens stand: B rows of L new ones, columns `end` - L .. `end` - 1 of all that were seen.

    end: int, or [1] on the device of a static cache, and then at most `most`.
    start: [B], the first column that is no left padding; None: 0.
    lengths: [B], tokens of every sequence, new ones included; None: end.
    """

    batch: int
    new: int
    end: int | Tensor
    most: int
    start: Tensor | None = None
    lengths: Tensor | None = None
    pads_right: bool = False

    @property
    def are_first(self) -> bool:
        """Whether no cached tokens come before the new ones."""
        return isinstance(self.end, int) and self.end == self.new


class Step:
    """What all layers of one forward share.

    No tuple and no dataclass: in those FSDP finds tensors, and rounds what a layer is given to its param_dtype.

    kept: what one of them worked out for the others.
    state: [B] or [1], the same for equal frequencies; None where cached tokens are never computed anew.
    split: over which ranks heads and tokens are split.
    """

    def __init__(
        self,
        table: RotaryTable | RotaryTableStack,
        tokens: Tokens,
        kept: dict[Any, Any],
        state: Tensor | None = None,
        split: Split = WHOLE,
    ):
        self.table, self.tokens, self.kept, self.state, self.split = table, tokens, kept, state, split

    def on(self, device: torch.device) -> "Step":
        """The step where a layer is, in a model over several devices."""
        if self.table.device == device:
            return self
        if device not in self.kept:
            moved = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.table, self.tokens))
            self.kept[device] = Step(*moved, {}, split=self.split)
        return self.kept[device]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, *numbers: Any) -> Tensor:
        """decode_attention with the scale, window and softcap in `numbers`, checked once for all layers alike."""
        kinds = (*((x.shape, x.dtype, x.device, x.stride(-1)) for x in (q, k, v)), *numbers)
        if kinds not in self.kept:
            places = (*self.slots(k.shape[1]), self.tokens.lengths, None)
            self.kept[kinds] = prepare_decode(q, k, v, self.table, *places, *numbers, "none", False, False)
        return torch.ops.clex.decode(q, k, v, *self.kept[kinds])[0]

    def slots(self, capacity: int) -> tuple[int | Tensor, Tensor | None]:
        """kv_end and kv_start among the S = `capacity` slots that a layer attends to."""
        end, start = self.tokens.end, self.tokens.start
        if isinstance(end, int):
            dropped = max(end - capacity, 0)
            return end - dropped, start if start is None or dropped == 0 else (start - dropped).clamp(min=0)
        dropped = (end - capacity).clamp(min=0)
        return (end - dropped).expand(self.tokens.batch), None if start is None else (start - dropped).clamp(min=0)


def find_tokens(given: Mapping[str, Any], split: Split = WHOLE) -> Tokens:
    """Where the tokens of a forward stand, from its arguments by name.

    Where sequences are split over ranks, the arguments are one rank's, and what comes out is of the whole sequences:
    masks and positions, where they are given, are gathered.

    Masks and positions on a device, where they are given, are looked at once per prompt and training step, which waits
    for the device, and not while decoding.

    Raises:
        TypeError, ValueError: the mask is no mask of padding, or position_ids are not the tokens' places.
    """
    x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if x is None:
        raise ValueError("input_ids, inputs_embeds: expected one of them, got neither")
    batch, new = x.shape[0], x.shape[1] * split.token_ranks
    cache = given["cache"]
    past = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):
        past = int(past) if on_host(past) else past.reshape(1).to(x.device)
    end = past + new
    most = end if isinstance(end, int) else cache.layers[0].max_cache_len
    mask, position_ids = mask_of(given.get("attention_mask")), given.get("position_ids")
    if split.tokens is not None:
        mask = None if mask is None else split.whole((mask != 0).to(x.device, torch.uint8))
        position_ids = None if position_ids is None else split.whole(position_ids)
    if mask is not None and (mask.shape[0] != batch or (isinstance(end, int) and mask.shape[1] != end)):
        raise ValueError(
            f"attention_mask: expected shape [B, cached and new tokens] = [{batch}, {end}], got {list(mask.shape)}"
        )
    is_first = isinstance(past, int) and past == 0
    looks = is_first or on_host(x)
    if looks and position_ids is not None:
        _check_positions(position_ids, mask, past, new)
    if mask is None or (looks and bool(mask.all())):
        return Tokens(batch, new, end, most, lengths=None if isinstance(end, int) else end.expand(batch))
    mask = mask.to(x.device, torch.bool)
    # a row of padding alone starts at the end.
    start = torch.where(mask.any(dim=1), mask.long().argmax(dim=1), end)
    # a mask may have columns for what a static cache has room for.
    lengths = mask.sum(dim=1) if is_first else end - start
    pads_right = looks and _check_mask(mask, start, lengths, is_first)
    return Tokens(batch, new, end, most, start, lengths, pads_right)


def mask_of(attention_mask: Any) -> Tensor | None:
    """The mask of padding [B, tokens] that a forward was given, if any.

    Raises TypeError or ValueError for one of another kind.
    """
    if isinstance(attention_mask, Mapping):
        # by the kind of layer; all are made from the same one.
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a 2-D tensor, got {type(attention_mask).__name__}")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected a 2-D one, [B, tokens], of padding only, got shape {list(attention_mask.shape)};"
            " this package masks by index (causal, window, padding) and takes no mask of pairs"
        )
    return attention_mask


def _check_mask(mask: Tensor, start: Tensor, lengths: Tensor, is_first: bool) -> bool:
    """That every row is one block of ones, and ends with the last column if tokens are cached; whether any does not."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    block = (columns >= start[:, None]) & (columns < (start + lengths)[:, None])
    if not torch.equal(block, mask):
        row = int((block != mask).any(dim=1).nonzero()[0])
        expected = "one block of ones in every row" if is_first else "padding on the left of cached tokens only"
        raise ValueError(
            f"attention_mask: expected {expected}, got holes in row {row}; pad on the left to generate"
            " (without a mask generate() takes every pad token for padding)"
        )
    return bool((~mask[:, -1] & (lengths > 0)).any())


def _check_positions(position_ids: Tensor, mask: Tensor | None, past: int, new: int) -> None:
    """Packed sequences restart their positions; here a row is one sequence, whose tokens stand side by side."""
    device = position_ids.device
    used = torch.ones(1, past + new, dtype=torch.bool) if mask is None else mask.bool()
    used = used.to(device)
    together = used[:, past + 1 : past + new] & used[:, past : past + new - 1]
    if not bool(((position_ids.diff(dim=-1) == 1) | ~together).all()):
        raise ValueError(
            "position_ids: expected consecutive ones within each row, got others; packed sequences are rows of their"
            " own here, padded"
        )
    if past == 0:
        # only differences of positions matter.
        return
    columns = torch.arange(past, past + new, device=device)
    places = columns - used.long().argmax(dim=1, keepdim=True)
    is_place = (position_ids == places) | (position_ids == columns) | ~used[:, past : past + new]
    if not bool(is_place.all()):
        raise ValueError(
            f"position_ids: expected those that follow {past} cached tokens, beginning with {places[:, 0].tolist()},"
            f" got {position_ids[:, 0].tolist()}; keys stand where they are cached here"
        )
