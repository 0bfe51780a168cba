"""Tensors of 2^31 elements and more, on the CPU: their last elements are read and written where they are.

Memory that nobody touches is never there, so that a cache of 4 GiB costs what its last rows do; what must be all read
is expanded. Results are compared with the same rows by themselves.
"""

import mpmath
import numpy as np
import pytest
import torch
from ropes import make_rope, seeded
from torch import Tensor

from clex_kernels import RotaryTable, append_kv, apply_rotary, attention, decode_attention, qkv_rotary

BEYOND = 1 << 31
DIMS = 64
# rows of one head that begin past 2^31 elements.
FAR = BEYOND // DIMS + 128
FREQ = torch.logspace(0, -6, DIMS // 2, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)).bfloat16()


def sparse(*shape: int) -> Tensor:
    """Zeros that take no memory until they are written."""
    return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(torch.bfloat16)


@pytest.fixture(scope="module")
def table() -> RotaryTable:
    return RotaryTable.from_frequencies(FREQ, length=FAR)


@pytest.fixture(scope="module")
def near() -> RotaryTable:
    return RotaryTable.from_frequencies(FREQ, length=256)


def test_decoding_and_appending_reach_the_end_of_a_cache(table: RotaryTable) -> None:
    keys, values = sparse(1, FAR, 1, DIMS), sparse(1, FAR, 1, DIMS)
    q, k, v = normal(1, 3, 4, DIMS, seed=1), normal(1, 96, 1, DIMS, seed=2), normal(1, 96, 1, DIMS, seed=3)
    append_kv(k, v, keys, values, FAR)
    assert torch.equal(keys[:, -96:], k)
    assert torch.equal(values[:, -96:], v)
    assert not keys[:, -200:-96].any()
    start = torch.tensor([FAR - 96])
    out, lse = decode_attention(q, keys, values, table, FAR, kv_start=start, return_lse=True)
    near = RotaryTable.from_frequencies(FREQ, length=128)
    expected, expected_lse = decode_attention(q, k, v, near, 96, return_lse=True)
    # only distances count; the two are cut into blocks at other keys.
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.02)
    torch.testing.assert_close(lse, expected_lse, rtol=0.0, atol=2e-3)
    whole = attention(q, keys, values, table, is_causal=True, kv_start=start, kv_end=torch.tensor([FAR]))
    torch.testing.assert_close(whole, expected, rtol=0.0, atol=0.02)


def test_decoding_reads_the_last_page_of_a_pool(near: RotaryTable) -> None:
    pages = BEYOND // (16 * DIMS) + 8
    keys, values = sparse(pages, 16, 1, DIMS), sparse(pages, 16, 1, DIMS)
    block_table = torch.tensor([[pages - 1, 5, pages - 3], [pages - 2, pages - 5, 0]], dtype=torch.int32)
    q, k, v = normal(2, 1, 2, DIMS, seed=1), normal(2, 40, 1, DIMS, seed=2), normal(2, 40, 1, DIMS, seed=3)
    append_kv(k, v, keys, values, 40, block_table)
    assert torch.equal(keys[pages - 1], k[0, :16])
    assert torch.equal(values[pages - 5], v[1, 16:32])
    out = decode_attention(q, keys, values, near, 40, block_table=block_table)
    assert torch.equal(out, decode_attention(q, k, v, near, 40))


@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_reaches_sequences_that_far_apart(inplace: bool, near: RotaryTable) -> None:
    memory = sparse(BEYOND + 4096 * DIMS)
    # two sequences, the second of which begins past 2^31 elements.
    q = memory.as_strided((2, 32, 2, DIMS), (BEYOND + 64, 2 * DIMS, DIMS, 1))
    x = normal(2, 32, 2, DIMS, seed=4)
    q.copy_(x)
    found, _ = apply_rotary(q, None, near, offset=7, inplace=inplace)
    expected, _ = apply_rotary(x, None, near, offset=7)
    assert torch.equal(found, expected)
    assert torch.equal(q, expected if inplace else x)


def test_attention_and_its_gradients_reach_sequences_that_far_apart(near: RotaryTable) -> None:
    memory, found = sparse(2 * BEYOND), []
    dense = [normal(2, 40, heads, DIMS, seed=heads + n) for n, heads in enumerate((4, 2, 2))]
    for is_far in (False, True):
        tensors = []
        for n, x in enumerate(dense):
            strides = (BEYOND + 64, x.shape[2] * DIMS, DIMS, 1)
            far = memory[n << 20 :].as_strided(x.shape, strides).copy_(x)
            tensors.append((far if is_far else x).detach().requires_grad_())
        out = attention(*tensors, near, is_causal=True, softcap=3.0)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_projections_by_a_weight_of_more_than_2_31_elements(near: RotaryTable) -> None:
    # rows of the weight lie so far apart.
    dims, channels = 3 * DIMS, 32
    stride = BEYOND // (dims - 1) + 64
    weight = sparse(dims * stride).as_strided((dims, channels), (stride, 1))
    dense = normal(dims, channels, seed=6)
    weight.copy_(dense)
    x = normal(1, 2, channels, seed=7)
    found = qkv_rotary(x, weight, near, num_heads=1, num_kv_heads=1, offset=9)
    expected = qkv_rotary(x, dense, near, num_heads=1, num_kv_heads=1, offset=9)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_positions_past_2_31_have_exact_tables() -> None:
    rope = make_rope()
    freq = rope(256).freq.detach()
    positions = torch.tensor([0, BEYOND - 1, BEYOND, BEYOND + 12345], dtype=torch.int64)
    table = RotaryTable.from_frequencies(freq, positions=positions)
    with mpmath.workprec(200):
        angles = [[mpmath.mpf(p) * mpmath.mpf(f) for f in freq.tolist()] for p in positions.tolist()]
        exact = torch.tensor([[[float(turn(x)) for x in row] for turn in (mpmath.cos, mpmath.sin)] for row in angles])
    # fp64 itself rounds an angle of 2^31 by up to 2.4e-7; tables don't, and their numbers are fp32's.
    torch.testing.assert_close(table.coarse, exact, rtol=0.0, atol=6e-8)
