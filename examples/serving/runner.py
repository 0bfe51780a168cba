"""A Llama-like transformers model, run layer by layer over the paged cache.

Norms, projections and MLPs take all tokens of a step in a row, [N, C]; what each token belongs to matters in attention
only. There, neighbours of one size are one batch: the decoding sequences, one token each, and chunks of the same size.
Each sequence has its own length, its own place in the cache and its own frequencies, those of all tokens it has:
of its whole prompt while that is computed, chunk by chunk, so that chunks give what one prefill gives; then of its
length so far.

A pool is read in place by decode_attention. Longer chunks go through attention, which wants keys in a row, and so
gathers their pages first. Sliding windows are kept to, but pages that have left a window are not freed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from clex_kernels import RotaryTable, RotaryTableStack, append_kv, attention, decode_attention
from clex_kernels.decode_checks import MAX_NEW_TOKENS
from examples.serving.frequencies import Frequencies
from examples.serving.pages import PagePool
from examples.serving.scheduler import Work

# transformers' model types whose layers are what `run` says, to the last factor.
FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
# three projections, or one of their rows in this order: Phi-3's own, and what pack_qkv makes.
_THREE, _ONE = ("q_proj", "k_proj", "v_proj"), "qkv_proj"


@dataclass(frozen=True)
class Group:
    """B works of L tokens each, which attend in one call; `rows` are theirs among the step's tokens."""

    rows: slice
    size: int
    kv_end: Tensor
    lengths: Tensor
    block_table: Tensor
    table: RotaryTable | RotaryTableStack

    def attend(self, q_k_v: Iterable[Tensor], pools: Tensor, **rule: Any) -> Tensor:
        """q [N, H, D], k and v [N, G, D] of the step, and the layer's pools [2, pages, P, G, D] -> [B L, H, D]."""
        q, k, v = (x[self.rows].unflatten(0, (-1, self.size)) for x in q_k_v)
        k_pool, v_pool = pools
        append_kv(k, v, k_pool, v_pool, self.kv_end, self.block_table)
        places: dict[str, Any] = {"kv_end": self.kv_end, "lengths": self.lengths}
        if self.size <= MAX_NEW_TOKENS:
            places["block_table"] = self.block_table
            out = decode_attention(q, k_pool, v_pool, self.table, **places, **rule)
        else:
            k, v = (pool[self.block_table].flatten(1, 2) for pool in (k_pool, v_pool))
            out = attention(q, k, v, self.table, is_causal=True, **places, **rule)
        return out.flatten(0, 1)


class Runner:
    """The model beside its pool of pages.

    Args:
        model: a causal language model of one of FAMILIES, in evaluation mode; patched by apply_clex or not.
        frequencies: its RoPE.
        pages: of the pool.
        page_size: P, a multiple of 16.

    Raises:
        TypeError: model is no transformers model.
        ValueError: model is of another family, changed or in training mode; or the pool can't be as asked for.
    """

    def __init__(self, model: PreTrainedModel, frequencies: Frequencies, pages: int, page_size: int):
        check_model(model)
        self.base, self.head = model.base_model, model.get_output_embeddings()
        self.frequencies = frequencies
        first = self.base.layers[0].self_attn
        shape = (len(self.base.layers), self.base.config.num_key_value_heads, first.head_dim)
        self.pool = PagePool(pages, page_size, shape, first.o_proj.weight.detach())

    @torch.no_grad()
    def run(self, works: list[Work]) -> Tensor:
        """Computes works, whose sequences have pages for them; logits [B, V] of those that give a token, in order."""
        ids = [token for work in works for token in work.sequence.tokens[work.sequence.cached : work.end]]
        groups = list(self._groups(works))
        x = self.base.embed_tokens(self._on_device(ids))
        for layer, pools in zip(self.base.layers, self.pool.memory, strict=True):
            x = x + self._attend(layer.self_attn, layer.input_layernorm(x), pools, groups)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        ends = accumulate(work.size for work in works)
        rows = [end - 1 for work, end in zip(works, ends, strict=True) if work.gives_token]
        return self.head(self.base.norm(x[self._on_device(rows)]))

    def _groups(self, works: list[Work]) -> Iterable[Group]:
        """Neighbours of equal size, and where they stand."""
        start = 0
        for size, neighbours in groupby(works, key=lambda work: work.size):
            same = list(neighbours)
            rows = slice(start, start := start + size * len(same))
            pages = [work.sequence.pages for work in same]
            most_pages = max(map(len, pages))
            most = max(len(work.sequence.tokens) for work in same)
            lengths = self._on_device([len(work.sequence.tokens) for work in same])
            yield Group(
                rows,
                size,
                kv_end=self._on_device([work.end for work in same]),
                lengths=lengths,
                # entries past a sequence's end are not looked at.
                block_table=self._on_device([numbers + [0] * (most_pages - len(numbers)) for numbers in pages]),
                table=self.frequencies.at(lengths, most),
            )

    def _attend(self, layer: nn.Module, x: Tensor, pools: Tensor, groups: list[Group]) -> Tensor:
        """Self-attention of x [N, C] over the cache -> [N, C]."""
        q, k, v = project(layer, x)
        if hasattr(layer, "q_norm"):
            q, k = layer.q_norm(q), layer.k_norm(k)
        rule = {"scale": layer.scaling, "window": window_of(layer)}
        out = torch.cat([group.attend((q, k, v), pools, **rule) for group in groups])
        return layer.o_proj(out.flatten(1))

    def _on_device(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.pool.memory.device, non_blocking=True)


def project(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, D], k and v [N, G, D] of x [N, C]."""
    if hasattr(layer, _ONE):
        heads = layer.config.num_attention_heads, *[layer.config.num_key_value_heads] * 2
        return layer.qkv_proj(x).unflatten(-1, (-1, layer.head_dim)).split(heads, dim=-2)
    q, k, v = (getattr(layer, name)(x).unflatten(-1, (-1, layer.head_dim)) for name in _THREE)
    return q, k, v


def window_of(layer: nn.Module) -> int | None:
    """Tokens that an attention layer sees, itself included; None: all. Mistral's read it off the configuration."""
    return getattr(layer, "sliding_window", getattr(layer.config, "sliding_window", None))


def check_model(model: Any) -> None:
    """Raises TypeError or ValueError unless `run` computes what the model's own forward does."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if model.config.model_type not in FAMILIES or model.get_output_embeddings() is None:
        got = f"{type(model).__name__} (model_type {model.config.model_type!r})"
        raise ValueError(f"model: expected a causal language model of type {', '.join(FAMILIES)}, got {got}")
    for number, layer in enumerate(model.base_model.layers):
        parts = {name for name, _ in layer.self_attn.named_children()}
        if not (parts.issuperset(_THREE) or _ONE in parts):
            raise ValueError(
                f"model: expected {', '.join(_THREE)}, or {_ONE}, in every layer's self_attn, got"
                f" {', '.join(sorted(parts))} in layer {number}"
            )
    if model.training:
        raise ValueError("model: expected in evaluation mode, got one in training mode; call model.eval()")
