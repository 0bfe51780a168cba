"""Calls of other packages, in this package's layouts: q [B, L, H, D], k and v [B, S, G, D], cos and sin [L, R] in fp32.

Every import is inside, so that a missing or broken package is the affair of the way that needs it.
"""

import importlib.util
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Pair = tuple[Tensor, Tensor]

# by the module to import: the distributions that may hold it.
LIBRARIES = {
    "flash_attn": ("flash-attn",),
    "flash_attn_interface": ("flash-attn-3", "flashattn-hopper"),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "liger_kernel": ("liger-kernel", "liger-kernel-nightly"),
}
FLASH_ATTENTION = {"flash-attn": "flash_attn", "flash-attn 3": "flash_attn_interface"}
SDPA_BACKENDS = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
WORKSPACE_BYTES = 128 << 20


def library_versions() -> dict[str, str]:
    """By module, its version, or that it is not installed."""
    return {module: version_of(module, names) for module, names in LIBRARIES.items()}


def version_of(module: str, distributions: tuple[str, ...]) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "installed, of unknown version"


def flash_rotary(inplace: bool) -> Callable[..., Pair]:
    """flash-attn's Triton rotary; differentiable, but in the frequencies."""
    rotate = import_module("flash_attn.layers.rotary").apply_rotary_emb

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return tuple(rotate(x, cos, sin, interleaved=False, inplace=inplace) for x in (q, k))

    return run


def liger_rotary() -> Callable[..., Pair]:
    """Liger's, which is in place where q and k are dense; cos and sin [1, L, 2R]."""
    rotate = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(x.transpose(1, 2) for x in rotated)

    return run


def flashinfer_rotary(inplace: bool) -> Callable[..., Pair]:
    """FlashInfer's with a table [L, 2R] of cosines, then sines, in fp32; tokens stand at `positions` [B L]."""
    library = import_module("flashinfer")

    def run(q: Tensor, k: Tensor, table: Tensor, positions: Tensor) -> Pair:
        rows = [x.flatten(0, 1).flatten(1) for x in (q, k)]
        arguments = (positions, *rows, q.shape[3], table)
        if inplace:
            library.apply_rope_with_cos_sin_cache_inplace(*arguments, is_neox=True)
            return q, k
        rotated = library.apply_rope_with_cos_sin_cache(*arguments, is_neox=True)
        return tuple(y.view(x.shape) for x, y in zip((q, k), rotated, strict=True))

    return run


def flash_attention(module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    attend = import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


def flashinfer_prefill() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One sequence."""
    attend = import_module("flashinfer").single_prefill_with_kv_cache
    return lambda q, k, v: attend(q[0], k[0], v[0], causal=True)[None]


def sdpa_by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention by one of torch's kernels, and no other."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
            )
        return out.transpose(1, 2)

    return run


def sdpa_decode_by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One token's q [B, G, H/G, D] over k and v [B, G, S, D]."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def flash_decode(module: str, ends: Tensor, block_table: Tensor | None = None) -> Callable[..., Tensor]:
    """Over a cache of rotated keys, or a pool of pages of them; `ends` [B]."""
    attend = import_module(module).flash_attn_with_kvcache
    paged = {"flash_attn": "block_table", "flash_attn_interface": "page_table"}[module]
    options = {"cache_seqlens": ends.int(), "causal": True}
    if block_table is not None:
        options[paged] = block_table.int()
    return lambda q, k, v: attend(q, k, v, **options)


def flashinfer_decode(rotates: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One sequence; `rotates`: raw keys and a raw query, turned on the way by plain RoPE of base 10000."""
    attend = import_module("flashinfer").single_decode_with_kv_cache
    mode = "ROPE_LLAMA" if rotates else "NONE"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensor_cores = q.shape[2] // k.shape[2] >= 4
        out = attend(q[0, 0], k[0], v[0], pos_encoding_mode=mode, use_tensor_cores=tensor_cores)
        return out[None, None]

    return run


def flashinfer_paged_decode(
    shape: tuple[int, int, int], page: int, ends: Tensor, block_table: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Sequences of `ends` [B] tokens in pages of a pool, planned beforehand as once for all layers; shape (H, G, D)."""
    heads, groups, dims = shape
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=ends.device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads // groups >= 4
    )
    counts = (ends + page - 1) // page
    indptr = F.pad(counts.cumsum(0), (1, 0)).int()
    indices = torch.cat([row[: int(n)] for row, n in zip(block_table, counts, strict=True)]).int()
    last = (ends - (counts - 1) * page).int()
    wrapper.plan(indptr, indices, last, heads, groups, dims, page, q_data_type=dtype, kv_data_type=dtype)
    return lambda q, k, v: wrapper.run(q[:, 0], (k, v))[:, None]
