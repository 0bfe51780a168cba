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
    """A cache's last layer: token numbers [B, 1, S, 1], or embeddings [B, 1, S, C], in place of keys.

    In place of values [B, 1, S, 1], the same for all tokens of a sequence: what its frequencies were when the other
    layers' contents were computed.
    """

    is_compileable = True
    supports_early_init = False

    @property
    def state(self) -> Tensor:
        """[B] of the sequences' frequencies."""
        return self.values[:, 0, -1, 0]

    def add(self, base: PreTrainedModel, given: Mapping[str, Any], state: Tensor) -> None:
        """Append the inputs of a forward by the frequencies of `state`, as embeddings once some are."""
        inputs = _inputs(given)
        if self.is_initialized and inputs.is_floating_point() != self.keys.is_floating_point():
            if inputs.is_floating_point():
                self.keys = _embed(base, self.keys)
            else:
                inputs = _embed(base, inputs)
        self.update(inputs, _per_token(state, inputs))

    def renew(self, state: Tensor) -> dict[str, Tensor]:
        """All inputs, as the base model's forward takes them, whose results are by the frequencies of `state` then."""
        self.values = _per_token(state, self.keys).contiguous()
        inputs = self.keys[:, 0]
        return {"inputs_embeds": inputs} if inputs.is_floating_point() else {"input_ids": inputs[..., 0]}

    def reset(self) -> None:
        """Forget everything."""
        # transformers before 5.24 only zeroes.
        self.keys = self.values = None
        self.is_initialized = False


def _inputs(given: Mapping[str, Any]) -> Tensor:
    if given.get("inputs_embeds") is not None:
        return given["inputs_embeds"][:, None]
    return given["input_ids"][:, None, :, None]


def _per_token(state: Tensor, inputs: Tensor) -> Tensor:
    """state [B] or [1] for inputs [B, 1, L, ...]: [B, 1, L, 1]."""
    return state.to(inputs.device)[:, None, None, None].expand(len(inputs), 1, inputs.shape[2], 1)


def _embed(base: PreTrainedModel, numbers: Tensor) -> Tensor:
    return base.get_input_embeddings()(numbers[:, 0, :, 0])[:, None]


def find_inputs(cache: Cache) -> InputsLayer | None:
    """What the cache remembers of its inputs."""
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, InputsLayer) and last.get_seq_length() else None


def remember(cache: Cache, base: PreTrainedModel, given: Mapping[str, Any], state: Tensor) -> None:
    """Note what a forward added to `cache`, and by which frequencies all of it is now."""
    if not cache.layers or not isinstance(cache.layers[-1], InputsLayer):
        cache.layers.append(InputsLayer())
    cache.layers[-1].add(base, given, state)


def empty(cache: Cache) -> None:
    """Let all layers but the inputs forget what they hold."""
    for layer in cache.layers[:-1]:
        if isinstance(layer, DynamicLayer):
            # transformers before 5.24 only zeroes these.
            layer.keys = layer.values = None
            layer.is_initialized = False
        layer.reset()
