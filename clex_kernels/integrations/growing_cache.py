"""A dynamic cache's layers that write new keys and values in place, where transformers' copy the whole cache each step.

Keys and values are views of the first slots of two buffers, which have room for an eighth more: a full one is copied
into the next, so a token is copied 8 times on average in all its life, whatever the length. What crop() has cut off
is written over by what comes next. Operations of the cache that make new tensors (reordering beams, moving) lead to new
buffers at the next update, and so do views that were kept from before and put back.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

# slots of room for 1 in so many, and at least.
SHARE, LEAST = 8, 64


class GrowingLayer(DynamicLayer):
    """DynamicLayer with room for tokens to come."""

    _buffers: tuple[Tensor | None, Tensor | None] = (None, None)
    # slots of the buffers that are written.
    _filled = 0

    @classmethod
    def take_over(cls, layer: DynamicLayer) -> "GrowingLayer":
        """A layer with the contents of `layer`."""
        growing = cls()
        growing.__dict__.update(layer.__dict__)
        return growing

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, G, L, D] each; returns all keys and values [B, G, S, D]."""
        if self._must_copy():
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.keys.shape[-2]
        length = past + key_states.shape[-2]
        kept = zip(self._buffers, (self.keys, self.values), strict=True)
        if past != self._filled or not all(_has_room(buffer, x, length) for buffer, x in kept):
            self._buffers = _with_room(self.keys, length), _with_room(self.values, length)
        self._filled = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys[:, :, past:] = key_states
        self.values[:, :, past:] = value_states
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens."""
        is_newest = self.is_initialized and self.keys.shape[-2] == self._filled
        super().crop(tokens_to_remove)
        if is_newest:
            self._filled = self.keys.shape[-2]

    def _must_copy(self) -> bool:
        if not self.is_initialized or self.keys.numel() == 0 or torch.compiler.is_compiling():
            # a prompt may be all there is, and the compiler can't see whose memory a tensor is.
            return True
        # what autograd saved must not be written to.
        return torch.is_grad_enabled()


def _has_room(buffer: Tensor | None, x: Tensor, length: int) -> bool:
    """Whether x is the first slots of `buffer`, which has `length` and may be written to."""
    if buffer is None or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    is_start = x.data_ptr() == buffer.data_ptr() and x.stride() == buffer.stride() and x.shape[:2] == buffer.shape[:2]
    return is_start and length <= buffer.shape[2]


def _with_room(x: Tensor, length: int) -> Tensor:
    buffer = x.new_empty((*x.shape[:2], length + max(length // SHARE, LEAST), x.shape[3]))
    buffer[:, :, : x.shape[2]] = x
    return buffer


def let_grow(cache: Cache) -> None:
    """Exchange the plain dynamic layers of `cache` for growing ones; other caches stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = GrowingLayer.take_over(layer)
