"""What docs/serving.md says of other engines: their caches' layouts and steps' bounds through this package's calls."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clex_kernels import ClexConfig, ClexRotaryEmbedding, RotaryTableStack, append_kv, attention, decode_attention

PAGES, P, G, H, D = 11, 16, 2, 4, 24
# tokens of every sequence, and the pages they lie in: none is shared.
LENGTHS = (5, 33, 20)
BLOCK_TABLE = torch.tensor([[7, 0, 0], [3, 9, 1], [10, 4, 0]])


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack() -> RotaryTableStack:
    """Frequencies that move, of t = 1 to 4 by 16 tokens each."""
    rope = ClexRotaryEmbedding(ClexConfig(head_dim=D, train_length=16, max_factor=4)).double().eval()
    with torch.no_grad():
        for seed, weight in enumerate(rope.parameters()):
            weight.copy_(draw(*weight.shape, seed=seed) * 0.3)
    return rope.stack()


def tokens(seed: int, heads: int) -> list[Tensor]:
    """[L, heads, D] of every sequence."""
    return [draw(length, heads, D, seed=seed + row) for row, length in enumerate(LENGTHS)]


def pools() -> tuple[Tensor, Tensor]:
    return tuple(_filled(PAGES, P, G, D) for _ in range(2))


def fill(k_cache: Tensor, v_cache: Tensor, k: list[Tensor], v: list[Tensor]) -> None:
    """Append whole sequences by vLLM's slot mapping: one token is one sequence, and -1 is written nowhere."""
    slots = torch.cat(
        [BLOCK_TABLE[row, torch.arange(n) // P] * P + torch.arange(n) % P for row, n in enumerate(LENGTHS)]
    )
    slots = torch.cat((slots, torch.tensor([-1])))
    padded = [torch.cat((*x, torch.full((1, G, D), math.nan, dtype=torch.float64)))[:, None] for x in (k, v)]
    kv_end = torch.where(slots >= 0, slots % P + 1, 0)
    append_kv(*padded, k_cache, v_cache, kv_end, block_table=(slots // P).clamp(min=0)[:, None])


def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last L rows of one sequence of S tokens, at its own t: q [L, H, D], k and v [S, G, D]."""
    return decode_attention(q[None], k[None], v[None], stack(), len(k))[0]


LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {}


def layout(name: str) -> Callable[[Callable[[], tuple[Tensor, Tensor, Tensor]]], None]:
    def add(make: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        LAYOUTS[name] = make

    return add


def _filled(*size: int) -> Tensor:
    return torch.full(size, math.nan, dtype=torch.float64)


@layout("[2, pages, P, G, D]")
def _halves() -> tuple[Tensor, Tensor, Tensor]:
    buffer = _filled(2, PAGES, P, G, D)
    return buffer, buffer[0], buffer[1]


@layout("[pages, 2, P, G, D]")
def _interleaved() -> tuple[Tensor, Tensor, Tensor]:
    buffer = _filled(PAGES, 2, P, G, D)
    return buffer, *buffer.unbind(1)


@layout("[pages, G, P, 2D], vLLM's view")
def _side_by_side() -> tuple[Tensor, Tensor, Tensor]:
    buffer = _filled(PAGES, G, P, 2 * D)
    return buffer, *buffer.transpose(1, 2).split(D, -1)


@layout("[slots, G, D] each, SGLang's buffers")
def _slots() -> tuple[Tensor, Tensor, Tensor]:
    buffer = _filled(2, PAGES * P, G, D)
    return buffer, *(half.view(-1, P, G, D) for half in buffer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_engines_caches_are_our_pools_without_a_copy(name: str) -> None:
    buffer, k_cache, v_cache = LAYOUTS[name]()
    k, v, q = tokens(10, G), tokens(20, G), tokens(30, H)
    fill(k_cache, v_cache, k, v)
    last = torch.stack([x[-1:] for x in q])
    out = decode_attention(last, k_cache, v_cache, stack(), torch.tensor(LENGTHS), block_table=BLOCK_TABLE)
    for row in range(len(LENGTHS)):
        torch.testing.assert_close(out[row], alone(q[row][-1:], k[row], v[row]), rtol=0, atol=1e-13)
    assert int(buffer.isfinite().sum()) == 2 * sum(LENGTHS) * G * D


def test_sequences_of_several_new_tokens_share_a_call_padded_on_the_left() -> None:
    counts = (1, 16, 3)
    k_cache, v_cache = pools()
    k, v, q = tokens(40, G), tokens(50, G), tokens(60, H)
    fill(k_cache, v_cache, k, v)
    padded = torch.full((len(LENGTHS), max(counts), H, D), math.nan, dtype=torch.float64)
    for row, count in enumerate(counts):
        padded[row, max(counts) - count :] = q[row][-count:]
    out = decode_attention(padded, k_cache, v_cache, stack(), torch.tensor(LENGTHS), block_table=BLOCK_TABLE)
    for row, count in enumerate(counts):
        expected = alone(q[row][-count:], k[row], v[row])
        torch.testing.assert_close(out[row, max(counts) - count :], expected, rtol=0, atol=1e-13)


def test_chunks_of_several_prompts_are_one_packed_call_over_gathered_pages() -> None:
    chunks, prompts = (5, 17, 12), torch.tensor((40, 33, 20))
    k_cache, v_cache = pools()
    k, v, q = tokens(70, G), tokens(80, G), tokens(90, H)
    fill(k_cache, v_cache, k, v)
    gathered = [
        torch.cat([cache[BLOCK_TABLE[row]].flatten(0, 1)[:n] for row, n in enumerate(LENGTHS)])
        for cache in (k_cache, v_cache)
    ]
    packed = torch.cat([x[-chunk:] for x, chunk in zip(q, chunks, strict=True)])
    bounds = [torch.tensor((0, *x)).cumsum(0).to(torch.int32) for x in (chunks, LENGTHS)]
    options = {"is_causal": True, "cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}
    out = attention(packed, *gathered, stack(), lengths=prompts, **options)
    for row, (first, last) in enumerate(zip(bounds[0][:-1], bounds[0][1:], strict=True)):
        q_row, k_row, v_row = (x[None] for x in (q[row][-chunks[row] :], k[row], v[row]))
        expected = attention(q_row, k_row, v_row, stack(), is_causal=True, lengths=prompts[row : row + 1])[0]
        torch.testing.assert_close(out[first:last], expected, rtol=0, atol=1e-13)


def test_pages_of_one_slot_are_refused() -> None:
    cache = torch.zeros(4, 1, G, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="k_cache: expected pages of P slots, P a multiple of 16, got P=1"):
        decode_attention(draw(1, 1, H, D, seed=0), cache, cache.clone(), stack(), 2, block_table=torch.tensor([[0, 1]]))
