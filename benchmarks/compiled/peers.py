"""Other implementations of the same, launched and counted like our own kernels, and what transformers moves eagerly.

Liger-Kernel rotates q and k in place, a program per token with all its heads at once, by the model's rows of cosines
and sines, in their dtype. It has no gradient of the frequencies. The tutorials' attention rotates every block of keys
in its loop: tutorial_attention.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from liger_kernel.ops.rope import rope_backward, rope_forward
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.compiled.cases import Case
from benchmarks.compiled.launches import meta
from benchmarks.compiled.traffic import Bytes, Traffic, count_traffic, eager_bytes
from benchmarks.compiled.traffic_figures import (
    HEADS,
    KEY_HEADS,
    TOKENS,
    Figure,
    call_and_tokens,
    make_tables,
    per_unit,
    scale,
)
from benchmarks.compiled.tutorial_attention import launch_tutorial_attention
from benchmarks.compiled.work import Constants, Work, attention_work
from clex_kernels.attention_terms import Rule, Tokens
from clex_kernels.kernels.attention_fwd import launch_attention_fwd

HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Peer:
    """A case, whose `plain` is a peer too, and the name in CASES of what it is compared with."""

    case: Case
    ours: str


def launch_liger(tables: torch.dtype, backward: bool = False) -> None:
    """Over tensors without memory: the projections' [B, L, H, D], transposed as transformers has them."""
    q, k = (meta(2, 4096, heads, 128, dtype=HALF).transpose(1, 2) for heads in (HEADS, KEY_HEADS))
    cos, sin = (meta(1, 4096, 128, dtype=tables) for _ in range(2))
    (rope_backward if backward else rope_forward)(q, k, cos, sin)


def launch_tutorial(is_causal: bool, rotates: bool) -> None:
    """Over tensors without memory, of the sizes of our own attention's cases."""
    q, k, v = (meta(2, heads, 4096, 128, dtype=HALF) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    cos, sin = (meta(4096, 64, dtype=SINGLE) for _ in range(2))
    lse = meta(2, HEADS, 4096, dtype=SINGLE)
    launch_tutorial_attention(q, k, v, cos, sin, torch.empty_like(q), lse, 0.1, is_causal, rotates)


def tutorial_work(constants: Constants) -> Work:
    return attention_work("attention_fwd_kernel", {**constants, "BLOCK_D": constants["D"]}, 2)


def liger_peers() -> list[Peer]:
    """Tables in the model's dtype, as its rotary module gives them, and in fp32; backward differs by a sign."""

    def peer(name: str, tables: torch.dtype, backward: bool = False) -> Peer:
        launch = partial(launch_liger, tables, backward)
        case = Case(f"liger-rotary-{name}", "_triton_rope", launch, lambda _: 1, 2, has_loop=False)
        return Peer(case, "rotary-long-bfloat16-D128-R64")

    return [
        peer("bfloat16-tables", HALF),
        peer("float32-tables", SINGLE),
        peer("bfloat16-tables-backward", HALF, backward=True),
    ]


def tutorial_peers() -> list[Peer]:
    """With rotary in the loop, by fp32 tables, and without."""

    def peer(order: str, rotates: bool, ours: str) -> Peer:
        plain = f"tutorial-attention-{order}-plain"
        name = f"tutorial-attention-{order}-float32-tables" if rotates else plain
        launch = partial(launch_tutorial, order == "causal", rotates)
        case = Case(
            *(name, "tutorial_attention_kernel", launch, lambda c: c["BLOCK_L"] * c["BLOCK_S"], 2),
            is_product=True,
            work=tutorial_work,
            plain=plain if rotates else None,
        )
        return Peer(case, ours)

    return [
        peer("causal", True, "attention_fwd-bfloat16-D128-R64"),
        peer("causal", False, "attention_fwd-bfloat16-D128-plain"),
        peer("full", True, "attention_fwd-bfloat16-D128-R64-full"),
        peer("full", False, "attention_fwd-bfloat16-D128-R64-full-plain"),
    ]


PEERS = {peer.case.name: peer for peer in (*liger_peers(), *tutorial_peers())}


def count_liger(tables: torch.dtype, tokens: int) -> list[Traffic]:
    q, k = (torch.zeros(1, tokens, heads, 128, dtype=HALF).transpose(1, 2) for heads in (HEADS, KEY_HEADS))
    cos, sin = (torch.zeros(1, tokens, 128, dtype=tables) for _ in range(2))
    return count_traffic(partial(rope_forward, q, k, cos, sin))


def liger_figures() -> list[Figure]:
    parts = {"elements": ("q_ptr", "k_ptr"), "table": ("cos", "sin")}

    def figure(tables: torch.dtype) -> Figure:
        moved = scale(partial(count_liger, tables), parts, call_and_tokens, (8, 16), TOKENS)
        name = f"liger-rotary-{str(tables)[6:]}-tables"
        return per_unit(name, "element of q and k", 4, moved, TOKENS * (HEADS + KEY_HEADS) * 128)

    return [figure(tables) for tables in (HALF, SINGLE)]


def rotate_in_fp32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As precise as ours: widened, rotated and rounded once, the way models do that ask for it."""
    q_rotated, k_rotated = apply_rotary_pos_emb(q.float(), k.float(), cos, sin)
    return q_rotated.to(q.dtype), k_rotated.to(k.dtype)


def eager_figures(tokens: int = 512) -> list[Figure]:
    """transformers' Llama, operator by operator, in bf16 and, for the precision of ours, in fp32."""

    def figure(name: str, rotates: Callable[..., tuple[Tensor, Tensor]], tables: torch.dtype) -> Figure:
        q, k = (torch.zeros(1, heads, tokens, 128, dtype=HALF) for heads in (HEADS, KEY_HEADS))
        cos, sin = (torch.zeros(1, tokens, 128, dtype=tables) for _ in range(2))
        moved = eager_bytes(rotates, q, k, cos, sin).by_operator
        parts = {operator.removeprefix("aten."): Bytes(n, n) for operator, n in moved.items()}
        return per_unit(f"transformers-eager-{name}", "element of q and k", 4, parts, q.numel() + k.numel())

    return [figure("bfloat16", apply_rotary_pos_emb, HALF), figure("float32", rotate_in_fp32, SINGLE)]


def count_attention(rotates_in_loop: bool, keys: int) -> list[Traffic]:
    """128 queries of one head, over keys that ours takes rotated."""
    q, k, v, out = (torch.zeros(1, n, 1, 128, dtype=HALF) for n in (128, keys, keys, 128))
    lse = torch.zeros(1, 1, 128)
    if rotates_in_loop:
        cos, sin = (torch.zeros(keys, 64) for _ in range(2))
        operands = (x.transpose(1, 2) for x in (q, k, v))
        return count_traffic(
            partial(launch_tutorial_attention, *operands, cos, sin, out.transpose(1, 2), lse, 0.1, False, True)
        )
    terms = (make_tables(keys, 64, 64), Tokens(), Rule(0.1), True)
    return count_traffic(partial(launch_attention_fwd, q, k, v, *terms, out, lse, None))


def loop_figures() -> list[Figure]:
    """Bytes for each key that a program of attention's forward pass goes over; what is there once is left out."""
    parts = {
        "keys and values": ("k.ptr", "v.ptr", "k_ptr", "v_ptr"),
        "table": ("cos_ptr", "sin_ptr", "table.coarse", "table.fine"),
    }

    def figure(name: str, rotates_in_loop: bool) -> Figure:
        def keys_alone(keys: int) -> tuple[int, ...]:
            return (1, keys) if keys < TOKENS else (0, keys)

        moved = scale(partial(count_attention, rotates_in_loop), parts, keys_alone, (256, 384), TOKENS)
        return per_unit(name, "key of one program", 512, moved, TOKENS)

    return [figure("attention_fwd-loop", False), figure("tutorial-attention-loop", True)]


def peer_figures() -> list[Figure]:
    """Bytes of the peers, and of our attention's loop beside that of the tutorials."""
    return [*liger_figures(), *eager_figures(), *loop_figures()]
