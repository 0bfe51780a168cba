"""What a cache holds of layers past the first, computed anew when the frequencies change.

Raw keys leave nothing of old frequencies in the first layer. In the others keys and values come from hidden states,
which attention computed by the frequencies of their own step. To get what one pass over all tokens gives, that pass is
made: the cache remembers the model's inputs, in one more layer, so that whatever happens to a cache (beams reordered,
rows repeated or selected, cropping) happens to them too.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from clex_kernels.integrations.growing_cache import GrowingLayer


class InputsLayer(GrowingLayer):
    """A cache's last layer: in place of keys [B, 1, S, 1] token numbers, or [B, 1, S, C] embeddings."""

    is_compileable = True
    supports_early_init = False
    # [B] of the sequences' frequencies when all other layers were filled.
    state: Tensor

    def add(self, base: PreTrainedModel, given: Mapping[str, Any]) -> None:
        """Append the inputs of a forward, as embeddings once some are."""
        inputs = _inputs(given)
        if self.is_initialized and inputs.is_floating_point() != self.keys.is_floating_point():
            if inputs.is_floating_point():
                self.keys = _embed(base, self.keys)
            else:
                inputs = _embed(base, inputs)
        self.update(inputs, inputs[..., :0])

    def arguments(self) -> dict[str, Tensor]:
        """The inputs as the base model's forward takes them."""
        inputs = self.keys[:, 0]
        return {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs[..., 0]}


def _inputs(given: Mapping[str, Any]) -> Tensor:
    if given.get("inputs_embeds") is not None:
        return given["inputs_embeds"][:, None]
    return given["input_ids"][:, None, :, None]


def _embed(base: PreTrainedModel, numbers: Tensor) -> Tensor:
    return base.get_input_embeddings()(numbers[:, 0, :, 0])[:, None]


def find_inputs(cache: Cache | None) -> InputsLayer | None:
    """What the cache remembers of its inputs."""
    last = cache.layers[-1] if cache is not None and cache.layers else None
    return last if isinstance(last, InputsLayer) and last.get_seq_length() else None


def remember(cache: Cache, base: PreTrainedModel, given: Mapping[str, Any], state: Tensor) -> None:
    """Note what a forward added to `cache`, and by which frequencies all of it is now."""
    if not cache.layers or not isinstance(cache.layers[-1], InputsLayer):
        cache.layers.append(InputsLayer())
    cache.layers[-1].add(base, given)
    cache.layers[-1].state = state


def empty(cache: Cache) -> None:
    """Let all layers but the inputs forget what they hold."""
    for layer in cache.layers[:-1]:
        if isinstance(layer, DynamicLayer):
            # transformers before 5.24 only zeroes these.
            layer.keys = layer.values = None
            layer.is_initialized = False
        layer.reset()
