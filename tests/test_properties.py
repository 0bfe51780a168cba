"""What holds for any sizes, positions and frequencies: rotations are rotations, and attention adds up, in fp64."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch import Tensor
from torch.testing import assert_close

from clex_kernels import (
    RotaryTable,
    RotaryTableStack,
    apply_rotary,
    attention,
    decode_attention,
    merge_attention,
    qkv_rotary,
)

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
# the same examples in every run, and none kept from run to run.
few, some = (settings(max_examples=n, derandomize=True, database=None, deadline=None) for n in (25, 60))
seeds = st.integers(0, 2**32)


class Sizes(NamedTuple):
    batch: int
    heads: int
    groups: int
    dim: int
    pairs: int


@st.composite
def sizes(draw: st.DrawFn, batches: int = 3) -> Sizes:
    groups, dim = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    pairs = draw(st.integers(1, dim // 2))
    return Sizes(draw(st.integers(1, batches)), groups * draw(st.integers(1, 4)), groups, dim, pairs)


# rad/token: from slower than any model's to some turns per token.
frequency = st.floats(-8, 8).map(lambda x: math.copysign(10 ** (abs(x) - 7), x))
rules = st.fixed_dictionaries(
    {}, optional={"window": st.integers(1, 20), "softcap": st.floats(0.5, 50), "scale": st.floats(0.01, 2)}
)


def randn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def frequencies(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (-4 * torch.rand(shape, generator=generator, dtype=torch.float64))


def one_table(seed: int, size: Sizes, length: int, **options: Any) -> RotaryTable:
    return RotaryTable.from_frequencies(frequencies(seed, size.pairs), length, dtype=torch.float64, **options)


def stack_of(seed: int, size: Sizes, length: int, **options: Any) -> RotaryTableStack:
    """A table per sequence."""
    t = torch.arange(1, size.batch + 1).double()
    freq = frequencies(seed, size.batch, size.pairs)
    return RotaryTableStack.from_frequencies(freq, t, length, dtype=torch.float64, **options)


def qkv_of(seed: int, size: Sizes, queries: int, keys: int) -> list[Tensor]:
    shapes = [(size.batch, n, heads, size.dim) for n, heads in ((queries, size.heads), (keys, size.groups))]
    return randn(seed, shapes[0], shapes[1], shapes[1])


@some
@given(sizes(), seeds, st.integers(0, 40), st.integers(0, 2**20))
def test_rotation_keeps_the_length_of_every_pair(size, seed, length, offset):
    q, k, _ = qkv_of(seed, size, length, length)
    stands = torch.arange(length)[None] + offset
    table = RotaryTable.from_frequencies(
        frequencies(seed, size.pairs), positions=stands[0].double(), dtype=torch.float64
    )
    for x, y in zip((q, k), apply_rotary(q, k, table), strict=True):
        before, after = ((z[..., : size.pairs], z[..., size.pairs : 2 * size.pairs]) for z in (x, y))
        assert_close(torch.hypot(*after), torch.hypot(*before), **EXACT)
        assert_close(y.norm(dim=-1), x.norm(dim=-1), **EXACT)
        assert torch.equal(y[..., 2 * size.pairs :], x[..., 2 * size.pairs :])


@some
@given(sizes(), seeds, st.integers(0, 40), st.integers(0, 5000))
def test_rotation_inverts(size, seed, length, offset):
    q, k, _ = qkv_of(seed, size, length, length)
    table = stack_of(seed, size, offset + length)
    turned = apply_rotary(q, k, table, offset=offset)
    back = [x.clone() for x in turned]
    torch.ops.clex.rotary_(*back, table.coarse, table.fine, None, None, offset, True)
    for x, y in zip((q, k), back, strict=True):
        assert_close(y, x, **EXACT)
    # the way back is also that of gradients, and of frequencies below 0.
    leaf = turned[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(apply_rotary(leaf, None, table, offset=offset)[0], leaf, turned[0])
    assert_close(gradient, q, **EXACT)
    t, negative = torch.ones(size.batch).double(), -table.freq
    other = RotaryTableStack.from_frequencies(negative, t, offset + length, dtype=torch.float64)
    assert_close(apply_rotary(turned[0], None, other, offset=offset)[0], q, **EXACT)


@some
@given(sizes(), seeds, st.integers(0, 30), st.integers(0, 200), st.integers(0, 200))
def test_rotations_add_up(size, seed, length, first, second):
    (q,) = randn(seed, (size.batch, length, size.heads, size.dim))
    table = one_table(seed, size, first + second + length)
    once = apply_rotary(q, None, table, offset=first + second)[0]
    ids = torch.full((1, length), second)
    twice = apply_rotary(apply_rotary(q, None, table, offset=first)[0], None, table, position_ids=ids)[0]
    assert_close(twice, once, **EXACT)


@some
@given(sizes(), seeds, st.integers(1, 24), st.integers(1, 40), st.booleans(), rules, st.integers(0, 100_000), st.data())
def test_attention_is_unchanged_when_all_positions_shift(size, seed, queries, keys, is_causal, rule, shift, data):
    q, k, v = qkv_of(seed, size, queries, keys)
    first = data.draw(st.integers(0, keys))
    table = one_table(seed, size, shift + first + queries + keys)
    options = {"is_causal": is_causal, "return_lse": True, **rule}
    here = attention(q, k, v, table, q_offset=first, **options)
    there = attention(q, k, v, table, q_offset=first + shift, k_offset=shift, **options)
    for x, y in zip(there, here, strict=True):
        assert_close(x, y, **EXACT)


@few
@given(sizes(), seeds, st.integers(1, 12), st.booleans(), st.lists(st.integers(0, 2**40), min_size=3, max_size=3))
def test_attention_is_unchanged_far_out(size, seed, length, is_causal, shifts):
    """Positions near 2^40, each sequence's its own: angles of 10^12 rad, whose own rounding is 10^-4."""
    q, k, v = qkv_of(seed, size, length, length)
    freq = frequencies(seed, size.batch, size.pairs)
    t, index = torch.ones(size.batch).double(), torch.arange(size.batch)
    outs = []
    for shift in ([0] * 3, shifts):
        positions = torch.arange(float(length)).double() + torch.tensor(shift[: size.batch]).double()[:, None]
        table = RotaryTableStack.from_frequencies(freq, t, positions=positions, index=index, dtype=torch.float64)
        outs.append(attention(q, k, v, table, is_causal=is_causal))
    assert_close(outs[1], outs[0], **EXACT)


@some
@given(sizes(), seeds, st.integers(1, 16), st.integers(0, 300), rules, st.booleans(), st.data())
def test_decoding_equals_the_last_rows_of_prefill(size, seed, new, before, rule, by_sequence, data):
    slots = before + new
    q, k, v = qkv_of(seed, size, slots, slots)
    options = dict(rule)
    if data.draw(st.booleans()):
        # the new tokens themselves are no padding.
        starts = st.lists(st.integers(0, before), min_size=size.batch, max_size=size.batch)
        options["kv_start"] = torch.tensor(data.draw(starts))
    table = (stack_of if by_sequence else one_table)(
        seed, size, slots, amplitude=data.draw(st.sampled_from((1.0, 1.3)))
    )
    out, lse = attention(q, k, v, table, is_causal=True, return_lse=True, **options)
    step, step_lse = decode_attention(q[:, before:], k, v, table, slots, return_lse=True, **options)
    assert_close(step, out[:, before:], **EXACT)
    assert_close(step_lse, lse[..., before:], **EXACT)


@some
@given(sizes(), seeds, st.integers(1, 12), st.integers(1, 60), st.booleans(), rules, st.data())
def test_any_blocks_of_keys_merge_to_one(size, seed, queries, keys, is_causal, rule, data):
    q, k, v = qkv_of(seed, size, queries, keys)
    cuts = sorted(data.draw(st.sets(st.integers(0, keys), max_size=5)) | {0, keys})
    first = data.draw(st.integers(0, keys))
    table = stack_of(seed, size, keys + queries)
    options = {"is_causal": is_causal, "q_offset": first, "return_lse": True, **rule}
    whole = attention(q, k, v, table, **options)
    spans = list(pairwise(cuts))
    parts = [attention(q, k[:, a:b], v[:, a:b], table, k_offset=a, **options) for a, b in spans]
    data.draw(st.randoms(use_true_random=False)).shuffle(parts)
    for x, y in zip(merge_attention(*zip(*parts, strict=True)), whole, strict=True):
        assert_close(x, y, **EXACT)


@some
@given(sizes(batches=1), seeds, st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), max_size=4), rules)
def test_packed_sequences_get_what_they_get_alone(size, seed, lengths, rule):
    """Of each the queries are its last tokens, and all of them where nothing precedes."""
    queries, keys = [n for n, _ in lengths], [n + more for n, more in lengths]
    q, k, v = (x[0] for x in qkv_of(seed, size, sum(queries), sum(keys)))
    table = one_table(seed, size, 30)
    bounds = [torch.tensor([0, *counts]).cumsum(0) for counts in (queries, keys)]
    packed = attention(q, k, v, table, is_causal=True, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1], **rule)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True) if lengths else ()
    alone = [attention(*(x[None] for x in part), table, is_causal=True, **rule)[0] for part in parts]
    assert_close(packed, torch.cat(alone) if alone else q, **EXACT)


@some
@given(sizes(), seeds, st.integers(0, 40), st.integers(1, 20), st.sampled_from(("rotated", "raw", "both")), st.data())
def test_projection_with_rotary_equals_linear_then_rotary(size, seed, length, channels, keys, data):
    rows = [n * size.dim for n in (size.heads, size.groups, size.groups)]
    x, weight, bias = randn(seed, (size.batch, length, channels), (sum(rows), channels), (sum(rows),))
    bias = bias if data.draw(st.booleans()) else None
    offset, table = data.draw(st.integers(0, 9)), stack_of(seed, size, length + 9)
    is_split = data.draw(st.booleans())
    weights = weight.split(rows) if is_split else weight
    biases = bias.split(rows) if is_split and bias is not None else bias
    found = qkv_rotary(x, weights, table, size.heads, size.groups, biases, offset=offset, keys=keys)
    product = torch.nn.functional.linear(x, weight, bias).split(rows, dim=2)
    q, k, v = (part.unflatten(2, (-1, size.dim)) for part in product)
    turned_q, turned_k = apply_rotary(q, k, table, offset=offset)
    expected = {"rotated": (turned_q, turned_k, v), "raw": (turned_q, k, v), "both": (turned_q, turned_k, v, k)}
    assert len(found) == len(expected[keys])
    for y, truth in zip(found, expected[keys], strict=True):
        assert_close(y, truth, **EXACT)


@some
@given(sizes(), seeds, st.integers(1, 20), rules, st.data())
def test_a_sequence_of_a_batch_gets_what_it_gets_alone(size, seed, length, rule, data):
    counts = st.lists(st.integers(1, length), min_size=size.batch, max_size=size.batch)
    starts = length - torch.tensor(data.draw(counts))
    q, k, v = qkv_of(seed, size, length, length)
    table = stack_of(seed, size, length)
    together = attention(q, k, v, table, is_causal=True, kv_start=starts, **rule)
    step = decode_attention(q[:, -1:], k, v, table, length, kv_start=starts, **rule)
    for b, start in enumerate(starts.tolist()):
        own = RotaryTable.from_frequencies(table.freq[b], length, dtype=torch.float64)
        # alone there is no padding, so its positions begin at 0: another shift.
        alone = attention(*(x[b : b + 1, start:] for x in (q, k, v)), own, is_causal=True, **rule)
        assert_close(together[b : b + 1, start:], alone, **EXACT)
        assert not together[b, :start].any()
        assert_close(step[b : b + 1], alone[:, -1:], **EXACT)


def truth(position: float, freq: float) -> tuple[float, float]:
    """cos and sin of their exact product."""
    angle = mpf(position) * mpf(freq)
    return float(mp.cos(angle)), float(mp.sin(angle))


def assert_true(row: Tensor, position: float, freq: Tensor, bound: float) -> None:
    """row [2, R]"""
    with mp.workprec(160):
        expected = torch.tensor([truth(position, f) for f in freq.tolist()], dtype=torch.float64).T
    assert (row.double() - expected).abs().max() <= bound


@some
@given(st.lists(frequency, min_size=1, max_size=4), st.lists(st.floats(-(2**31), 2**31), min_size=1, max_size=4))
@example(freq=[1.0, 1e-7, -10.0], positions=[2.0**31, 2.0**31 - 0.5, -(2.0**31), 0.0])
def test_rows_of_any_positions_are_true(freq, positions):
    freq, positions = torch.tensor(freq, dtype=torch.float64), torch.tensor(positions, dtype=torch.float64)
    for dtype, bound in ((torch.float32, 3e-7), (torch.float64, 2e-15)):
        table = RotaryTable.from_frequencies(freq, positions=positions, dtype=dtype)
        for row, position in zip(table.coarse, positions.tolist(), strict=True):
            assert_true(row, position, freq, bound)


def assert_factored_rows_are_true(table: RotaryTable, positions: list[int]) -> None:
    for position in positions:
        c, j = divmod(position, table.tile)
        coarse, fine = (torch.complex(*x.double()) for x in (table.coarse[c], table.fine[j]))
        row = coarse * fine
        assert_true(torch.stack((row.real, row.imag)), position, table.freq, 3e-7)


@few
@given(st.lists(frequency, min_size=1, max_size=2), st.data())
def test_factored_tables_are_true_at_any_position(freq, data):
    """To 2^24 here; a table of 2^31 positions takes 256 MiB a pair, and is looked at below."""
    bits = data.draw(st.integers(0, 24))
    drawn = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=6))
    table = RotaryTable.from_frequencies(torch.tensor(freq, dtype=torch.float64), 2**bits)
    assert table.freq.tolist() == freq
    assert_factored_rows_are_true(table, [*drawn, 2**bits - 1])


@pytest.mark.long
@pytest.mark.parametrize("freq", [1.0, 7.3, 2.718e-3, 1e-6, -0.5])
def test_factored_tables_are_true_to_2_31(freq):
    table = RotaryTable.from_frequencies(torch.tensor([freq], dtype=torch.float64), 2**31)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2**31, (500,), generator=generator).tolist()
    assert_factored_rows_are_true(table, [2**31 - 1, 2**31 - 64, 2**31 - 65, 2**30, 2**16, 4096, 4095, *drawn])


@few
@given(sizes(), seeds, st.lists(st.integers(0, 2**22 - 1), min_size=1, max_size=4))
def test_a_rotation_far_out_is_by_the_true_angle(size, seed, positions):
    freq = frequencies(seed, size.pairs)
    table = RotaryTable.from_frequencies(freq, 2**22)
    q = torch.zeros(1, len(positions), 1, size.dim)
    q[..., : size.pairs] = 1.0
    turned, _ = apply_rotary(q, None, table, position_ids=torch.tensor([positions]))
    for position, row in zip(positions, turned[0, :, 0, : 2 * size.pairs], strict=True):
        assert_true(row.unflatten(0, (2, -1)), position, freq, 4e-7)
