"""Stand-ins for the packages that are timed beside ours: in plain torch, by the signatures that these packages have.

flash-attn 2.8: flash_attn_interface.py and layers/rotary.py; FlashInfer 0.7: rope.py, prefill.py and decode.py;
Liger-Kernel 0.8: transformers/rope.py.
"""

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.formulations import bare_sdpa, decode_sdpa, split_halves

called: list[str] = []


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False, seqlen_offsets: int = 0
) -> Tensor:
    called.append("flash-attn rotary")
    assert not interleaved
    return x.copy_(split_halves(x, cos, sin)) if inplace else split_halves(x, cos, sin)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    called.append("flash_attn_func")
    assert causal
    return bare_sdpa(q, k, v)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    called.append("flash_attn_with_kvcache")
    assert cache_seqlens.dtype == torch.int32
    if block_table is not None:
        assert block_table.dtype == torch.int32
        k_cache, v_cache = gather(k_cache, block_table), gather(v_cache, block_table)
    return decode(q, k_cache, v_cache)


def liger_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    called.append("Liger rotary")
    assert cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
    tables = [x[0, :, : x.shape[2] // 2] for x in (cos, sin)]
    return tuple(split_halves(x.transpose(1, 2), *tables).transpose(1, 2) for x in (q, k))


def apply_rope_with_cos_sin_cache(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    called.append("FlashInfer rotary")
    assert cos_sin_cache.dtype == torch.float32
    assert is_neox
    tables = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    return tuple(split_halves(x.unflatten(1, (-1, head_size))[None], *tables)[0].flatten(1) for x in (query, key))


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
) -> None:
    rotated = apply_rope_with_cos_sin_cache(positions, query, key, head_size, cos_sin_cache, is_neox)
    for x, y in zip((query, key), rotated, strict=True):
        x.copy_(y)


def single_prefill_with_kv_cache(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    called.append("FlashInfer prefill")
    assert causal
    return bare_sdpa(q[None], k[None], v[None])[0]


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
) -> Tensor:
    called.append(f"FlashInfer decode, {pos_encoding_mode}")
    if pos_encoding_mode == "ROPE_LLAMA":
        pairs = q.shape[1] // 2
        angle = torch.arange(k.shape[0])[:, None] * 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        cos, sin = angle.cos().float(), angle.sin().float()
        q, k = split_halves(q[None, None], cos[-1:], sin[-1:])[0, 0], split_halves(k[None], cos, sin)[0]
    return decode(q[None, None], k[None], v[None])[0, 0]


class BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's, for sequences that fill their pages."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_tensor_cores: bool = False):
        assert kv_layout == "NHD"
        # must be zero for its first use.
        assert not float_workspace_buffer.any()

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert (last_page_len == page_size).all()
        self.rows = torch.stack([indices[start:end] for start, end in pairwise(indptr)])

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        called.append("FlashInfer paged decode")
        return decode(q[:, None], *(gather(cache, self.rows) for cache in paged_kv_cache))[:, 0]


def gather(pool: Tensor, block_table: Tensor) -> Tensor:
    """[B, S, G, D] from pages."""
    return pool[block_table.long()].flatten(1, 2)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, 1, H, D] over k and v [B, S, G, D]."""
    grouped = q.unflatten(2, (k.shape[2], -1))[:, 0]
    return decode_sdpa(grouped, k.transpose(1, 2), v.transpose(1, 2)).flatten(1, 2)[:, None]


MODULES: dict[str, list[Any]] = {
    "flash_attn": [flash_attn_func, flash_attn_with_kvcache],
    "flash_attn.layers.rotary": [apply_rotary_emb],
    "liger_kernel.transformers.rope": [liger_rotary_pos_emb],
    "flashinfer": [
        apply_rope_with_cos_sin_cache,
        apply_rope_with_cos_sin_cache_inplace,
        single_prefill_with_kv_cache,
        single_decode_with_kv_cache,
        BatchDecodeWithPagedKVCacheWrapper,
    ],
}


def import_module(name: str) -> ModuleType:
    module = ModuleType(name)
    vars(module).update({member.__name__: member for member in MODULES[name]})
    return module
