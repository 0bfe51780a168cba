"""Rotary and attention as they are written in plain torch: the formulations that the package is compared with.

Those of rotary rotate the whole of D, pairs (x_i, x_(R+i)), with cos and sin [L, R] in fp32, and compute in fp32. The
`_into` forms write into memory the caller brings, the `_in_place` form into its input. Those of attention are causal,
take raw q, k and v [B, L, ., D] with cos and sin [L, 2R] of `reference.tables`, and compute in the inputs' dtype, as
transformers does. Those of decode take one token's q [B, G, H/G, D], viewed per key head, and k and v [B, G, S, D];
they attend over keys that are rotated already, except for the `rotate_and_` ones. Those of the projection take x
[B, L, C], the weights of q, k and v in one, or three of them, and (H, G, G); all but `project` and `project_apart`
rotate q and k, in their first 2R channels.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clex_kernels import reference


def double(table: Tensor) -> Tensor:
    return torch.cat((table, table), dim=-1)[:, None]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The form of transformers and of the CLEX authors."""
    x0, x1 = x.chunk(2, dim=-1)
    return (x * double(cos) + torch.cat((-x1, x0), dim=-1) * double(sin)).to(x.dtype)


def split_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).to(x.dtype)


def complex_product(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.float().chunk(2, dim=-1)
    y = torch.complex(x0, x1) * torch.complex(cos, sin)[:, None]
    return torch.cat((y.real, y.imag), dim=-1).to(x.dtype)


def rotate_half_into(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> None:
    y.copy_(rotate_half(x, cos, sin))


def split_halves_into(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor) -> None:
    x0, x1 = x.chunk(2, dim=-1)
    y0, y1 = y.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    # both halves before either is written: y may be x.
    rotated0, rotated1 = x0 * cos - x1 * sin, x1 * cos + x0 * sin
    y0.copy_(rotated0)
    y1.copy_(rotated1)


def split_halves_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    split_halves_into(x, cos, sin, x)


Formulation = Callable[..., Tensor | None]

# every form compiles through the same inner function: at the default limit of 8 the later ones would run in eager mode.
torch._dynamo.config.recompile_limit = 64


@functools.cache
def for_q_and_k(formulation: Formulation, compiled: bool) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """The formulation applied to q and k in one call, one compiled graph where `compiled`."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *into: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return formulation(q, cos, sin, *into[:1]), formulation(k, cos, sin, *into[1:])

    return torch.compile(apply, dynamic=False, fullgraph=True) if compiled else apply


@functools.cache
def with_frequencies(formulation: Formulation, compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same from frequencies [R] that want a gradient, through fp32 angles [L, R]."""

    def apply(q: Tensor, k: Tensor, freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[:, None] * freq
        cos, sin = angle.cos(), angle.sin()
        return formulation(q, cos, sin), formulation(k, cos, sin)

    return torch.compile(apply, dynamic=False, fullgraph=True) if compiled else apply


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The package's reference: rotate-half, then softmax(q k^T) v."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    q, k = (reference.rotary(x, cos, sin) for x in (q, k))
    return reference.attention(q, k, v, mask[None])[0]


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of x [B, H, L, D], the layout of transformers; cos and sin [L, D]."""
    x0, x1 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x1, x0), dim=-1) * sin


def bare_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No rotation at all; keys are shared by `enable_gqa`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def sdpa_shared(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' sdpa attention without a mask."""
    cos, sin = cos.to(q), sin.to(q)
    q, k = (rotate_heads(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    return bare_sdpa(q, k, v)


def sdpa_repeated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with keys and values copied for every query head, as transformers does with a mask."""
    cos, sin = cos.to(q), sin.to(q)
    q, k = (rotate_heads(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1).transpose(1, 2) for x in (k, v))
    return bare_sdpa(q, k, v)


@functools.cache
def attend(formulation: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    """An attention formulation, one compiled graph where `compiled`."""
    return torch.compile(formulation, dynamic=False, fullgraph=True) if compiled else formulation


@functools.cache
def attend_with_frequencies(formulation: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    """The same from frequencies [R] that want a gradient, through fp32 angles."""

    def apply(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, positions: Tensor) -> Tensor:
        return formulation(q, k, v, *reference.tables(freq, positions))

    return torch.compile(apply, dynamic=False, fullgraph=True) if compiled else apply


def decode_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Without enable_gqa, which is eight times slower here."""
    return F.scaled_dot_product_attention(q, k, v, mask)


def decode_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def decode_split(q: Tensor, k: Tensor, v: Tensor, parts: int = 8) -> Tensor:
    """Split-KV: ranges of keys are as many more heads for SDPA, whose results merge by their log-sum-exp."""
    groups = k.shape[1]
    k, v = (x.unflatten(2, (parts, -1)).flatten(1, 2) for x in (k, v))
    q = q.repeat_interleave(parts, dim=1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    out, lse = (x.unflatten(1, (groups, parts)) for x in (out, lse))
    return (lse.softmax(dim=2)[..., None] * out).sum(dim=2).to(q.dtype)


def rotate_and_attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of the whole raw cache at every step, keys shared by the query heads."""
    return decode_softmax(rotate_heads(q, cos[-1:], sin[-1:]), rotate_heads(k, cos, sin), v)


def rotate_and_attend_repeated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with keys and values copied for every query head, as the CLEX authors have it."""
    shape, shared = q.shape, q.shape[2]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (rotate_heads(k, cos, sin), v))
    q = rotate_heads(q, cos[-1:], sin[-1:]).flatten(1, 2)[:, :, None]
    return decode_softmax(q, k, v).reshape(shape)


def read_by_dot(k: Tensor, v: Tensor) -> Tensor:
    """One pass over the bytes of both, as fp32 whatever they mean."""
    return torch.dot(*(x.reshape(-1).view(torch.float32) for x in (k, v)))


def read_by_sum(k: Tensor, v: Tensor) -> list[Tensor]:
    return [x.reshape(-1).view(torch.float32).sum() for x in (k, v)]


def read_by_max(k: Tensor, v: Tensor) -> list[Tensor]:
    return [x.reshape(-1).view(torch.int32).amax() for x in (k, v)]


Projected = tuple[Tensor, Tensor, Tensor]
Heads = tuple[int, int, int]


def project(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Heads) -> Projected:
    """q, k and v as views of one product."""
    return F.linear(x, weight, bias).unflatten(-1, (sum(heads), -1)).split(heads, dim=-2)


def project_apart(x: Tensor, weights: Projected, biases: Projected | None, heads: Heads) -> list[Tensor]:
    parts = zip(weights, biases or (None,) * len(weights), heads, strict=True)
    return [F.linear(x, weight, bias).unflatten(-1, (count, -1)) for weight, bias, count in parts]


def rotate_first(rotate: Formulation, x: Tensor, cos: Tensor, sin: Tensor, dims: int) -> Tensor:
    """`rotate` on the first channels, the others as they are, put together as transformers' Phi does."""
    if dims == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :dims], cos, sin), x[..., dims:]), dim=-1)


def project_rotate_half(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Heads, cos: Tensor, sin: Tensor
) -> Projected:
    """transformers' rotary after one linear; cos and sin [L, 2R], computed with in x's dtype."""
    q, k, v = project(x, weight, bias, heads)
    cos, sin, dims = cos.to(x), sin.to(x), cos.shape[-1]
    q, k = (rotate_first(rotate_heads, y.transpose(1, 2), cos, sin, dims).transpose(1, 2) for y in (q, k))
    return q, k, v


def project_split_halves(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Heads, cos: Tensor, sin: Tensor
) -> Projected:
    """cos and sin [L, R] in fp32."""
    q, k, v = project(x, weight, bias, heads)
    q, k = (rotate_first(split_halves, y, cos, sin, 2 * cos.shape[-1]) for y in (q, k))
    return q, k, v


@functools.cache
def compiled_whole(formulation: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled graph."""
    return torch.compile(formulation, dynamic=False, fullgraph=True)
