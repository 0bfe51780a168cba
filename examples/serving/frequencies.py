"""Which rotary tables the sequences of a step get, by their lengths."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from clex_kernels import ClexRotaryEmbedding, RotaryTable, RotaryTableStack
from clex_kernels.integrations.rope_types import RopeFrequencies


class Frequencies(Protocol):
    """A model's RoPE, as far as the engine knows it."""

    def at(self, lengths: Tensor, most: int) -> RotaryTable | RotaryTableStack:
        """Tables of sequences that have `lengths` [B] tokens, for positions 0 .. most - 1; sequence b gets the b-th."""


class ClexFrequencies:
    """CLEX by the module's own scale policy, integer or continuous."""

    def __init__(self, rope: ClexRotaryEmbedding):
        self.rope = rope

    def at(self, lengths: Tensor, most: int) -> RotaryTableStack:
        """See Frequencies."""
        config = self.rope.config
        if config.scale_policy == "continuous":
            return self.rope.at(lengths, most)
        # of one size as long as possible, so that the cache has it.
        return self.rope.stack(max(most, config.train_length * config.max_factor)).select(lengths)


def frequencies_of(model: PreTrainedModel) -> Frequencies:
    """CLEX for a model that apply_clex patched, else the RoPE that its configuration describes."""
    rope = getattr(model.base_model, "clex_layer", None)
    if rope is not None:
        return ClexFrequencies(rope)
    return RopeFrequencies(model.config, torch.float64 if model.dtype == torch.float64 else torch.float32)
