"""attention as users call it: values and gradients against autograd through the reference in fp64."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_calls import (
    Call,
    Given,
    Table,
    assert_same,
    expected,
    make,
    make_table,
    options_of,
    outputs_and_gradients,
    weights,
)
from ropes import make_rope
from tolerance import assert_within_rule
from torch import Tensor
from torch.nn import functional

from clex_kernels.attention import attention
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable

BOUNDS = {"cu_seqlens_q": [0, 20, 20, 33, 50], "cu_seqlens_k": [0, 20, 25, 45, 80]}
SAME = {"cu_seqlens_q": [0, 18, 19, 50], "cu_seqlens_k": [0, 18, 19, 50]}
CALLS = {
    "full": Call(),
    "causal": Call(options={"is_causal": True}),
    "scale": Call(options={"is_causal": True, "scale": 0.4}),
    "one key head": Call(h=6, g=1, queries=5, options={"is_causal": True}),
    "a head for each query head": Call(g=4, options={"is_causal": True}),
    "windowed": Call(queries=150, keys=150, b=1, options={"window": 40}),
    "amplitude": Call(settings={"amplitude": 1.3}, options={"is_causal": True}),
    "partial rotary, softcap": Call(d=24, r=4, settings={"amplitude": 1.3}, options={"is_causal": True, "softcap": 2}),
    "sampled": Call(settings={"positions": 1}, options={"is_causal": True}),
    "sampled by each sequence": Call(tables=2, settings={"positions": 2}, options={"window": 9}),
    "offsets": Call(queries=9, options={"is_causal": True, "q_offset": 30, "k_offset": 7}),
    "offsets of each sequence": Call(queries=9, options={"window": 20, "q_offset": [30, 8], "k_offset": [7, 0]}),
    "an offset of q alone": Call(options={"q_offset": [3, 100], "softcap": 3.0}),
    "queries that come first": Call(queries=45, options={"k_offset": 100}),
    "queries that come first, without keys": Call(queries=45, options={"is_causal": True}),
    "queries before the end of their keys": Call(
        queries=20, options={"kv_end": [25, 4], "k_offset": [100, 16], "return_lse": True}
    ),
    "left padding": Call(b=3, options={"is_causal": True, "kv_start": [5, 0, 36]}),
    "left padding, mixed t": Call(b=3, tables=4, options={"is_causal": True, "kv_start": [5, 0, 30]}),
    "right padding, mixed t": Call(
        b=3, queries=3, tables=4, options={"is_causal": True, "kv_start": [0, 9, 2], "kv_end": [12, 37, 20]}
    ),
    "lengths, mixed t": Call(b=3, tables=4, options={"window": 8, "lengths": [64, 3, 20]}),
    "one length": Call(tables=4, options={"is_causal": True}),
    "packed": Call(queries=50, keys=80, options={**BOUNDS, "is_causal": True}),
    "packed, flat": Call(queries=50, keys=80, is_flat=True, options={**BOUNDS, "is_causal": True, "return_lse": True}),
    "packed, mixed t": Call(queries=53, keys=53, tables=4, options={**SAME, "is_causal": True}),
    "packed, mixed t, one key head, window": Call(
        queries=53, keys=53, g=1, tables=4, is_flat=True, options={**SAME, "window": 7, "return_lse": True}
    ),
    "packed, without order": Call(queries=50, keys=50, options=SAME),
    "log-n": Call(settings={"log_scale": True}, options={"is_causal": True}),
    "log-n of each sequence": Call(
        tables=4, settings={"log_scale": True}, options={"is_causal": True, "kv_start": [3, 33]}
    ),
    "log-n clamped, by lengths": Call(settings={"log_scale": "clamped"}, options={"lengths": [5, 900], "window": 30}),
    "log-n, packed": Call(queries=53, keys=53, settings={"log_scale": True}, options={**SAME, "is_causal": True}),
    "lse": Call(options={"is_causal": True, "return_lse": True}),
    "lse of padding": Call(queries=45, options={"is_causal": True, "kv_start": [3, 30], "return_lse": True}),
    "lse under a softcap": Call(options={"softcap": 1.5, "return_lse": True}),
    "q rotated before": Call(queries=9, options={"is_causal": True, "rotated": "q"}),
    "k rotated before": Call(queries=9, options={"is_causal": True, "rotated": "k"}),
    "both rotated before": Call(options={"window": 11, "rotated": "qk"}),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
FEW = ["causal", "partial rotary, softcap", "left padding, mixed t", "packed, mixed t, one key head, window"]
FEW += ["sampled by each sequence", "log-n of each sequence", "lse of padding", "k rotated before"]


def assert_rule(actual: Mapping[str, Tensor], call: Call, given: Given, dtype: torch.dtype) -> None:
    exact = Given(*(x.double() for x in given))
    truth, in_dtype = (outputs_and_gradients(expected, call, x, y) for x, y in ((exact, torch.float64), (given, dtype)))
    for name, x in actual.items():
        if name == "dfreq":
            assert (x - truth[name]).abs().max() <= 30 * torch.finfo(dtype).eps * truth[name].abs().max()
        else:
            assert_within_rule(x, in_dtype[name].to(x.dtype), truth[name])


@calls
def test_values_and_gradients_are_the_references_in_fp64(call: Call) -> None:
    given = make(call)
    truth = outputs_and_gradients(expected, call, given)
    assert_same(outputs_and_gradients(attention, call, given), truth)
    moved = call.options.get("rotated", "none") != "qk"
    assert all((x.abs().max() > 0) == (moved or name != "dfreq") for name, x in truth.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_values_and_gradients_keep_the_tolerance_rule(name: str, dtype: torch.dtype) -> None:
    given = make(CALLS[name], dtype)
    assert_rule(outputs_and_gradients(attention, CALLS[name], given, dtype), CALLS[name], given, dtype)


def test_any_strides_do() -> None:
    call = CALLS["causal"]
    given = make(call)
    packed = torch.cat(given[:3], dim=2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:3]]
    for views in (packed.split((call.h, call.g, call.g), dim=2), heads_first):
        table = make_table(call, given.freq)
        assert_same({"": attention(*views, table, is_causal=True)}, {"": expected(*given[:3], table, is_causal=True)})
    # gradients through the views, too.
    found = []
    for function in (attention, expected):
        leaf = packed.clone().requires_grad_()
        out = function(*leaf.split((call.h, call.g, call.g), dim=2), table, is_causal=True)
        found.append(torch.autograd.grad(out.sum(), leaf)[0])
    assert_same({"": found[0]}, {"": found[1]})


def test_expanded_inputs_gather_their_gradients() -> None:
    call = CALLS["windowed"]._replace(b=3)
    given = make(call)
    found = []
    for function in (attention, expected):
        q, k, v = (x[:1, :, :1].clone().requires_grad_() for x in given[:3])
        shared = q.expand(3, -1, 4, -1), k.expand(3, -1, 2, -1), v.expand(3, -1, 2, -1)
        out = function(*shared, make_table(call, given.freq), window=40)
        found.append(torch.autograd.grad((out * weights(out)).sum(), (q, k, v)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def heads(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q [.., 4, 16], then k and v [.., 2, 16], where sizes have what comes before the heads."""
    generator = torch.Generator().manual_seed(2)
    count = (4, 2, 2)
    return [torch.randn(*size, n, 16, generator=generator).to(dtype) for size, n in zip(sizes, count, strict=True)]


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_sequences_of_mixed_t_are_as_each_alone(way: str) -> None:
    rope = make_rope().double()
    sizes = [70, 1, 32, 33]
    alone = [heads(*[(1, size)] * 3) for size in sizes]
    separate = [attention(*x, rope(x[0].shape[1]), is_causal=True)[0] for x in alone]
    if way == "packed":
        bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
        q, k, v = (torch.cat(x, dim=1) for x in zip(*alone, strict=True))
        out = attention(q, k, v, rope.stack(), is_causal=True, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        together = [out[0, first:last] for first, last in pairwise(bounds.tolist())]
    else:
        # 80 slots each, filled from the left.
        q, k, v = (
            torch.cat([functional.pad(x, (0, 0, 0, 0, 80 - x.shape[1], 0)) for x in xs])
            for xs in zip(*alone, strict=True)
        )
        starts = 80 - torch.tensor(sizes)
        out = attention(q, k, v, rope.stack(), is_causal=True, kv_start=starts)
        together = [x[start:] for x, start in zip(out, starts, strict=True)]
    for x, y in zip(together, separate, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_weights_of_the_ode_learn_from_mixed_t() -> None:
    rope = make_rope().double().train()
    alone = [heads(*[(1, size)] * 3) for size in (20, 50)]
    bounds = torch.tensor([0, 20, 70])
    q, k, v = (torch.cat(x, dim=1) for x in zip(*alone, strict=True))
    packed = attention(q, k, v, rope.stack(), is_causal=True, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    separate = torch.cat([attention(*x, rope(x[0].shape[1]), is_causal=True) for x in alone], dim=1)
    found = [torch.autograd.grad((out * weights(out)).sum(), list(rope.parameters())) for out in (packed, separate)]
    assert all(x.abs().max() > 0 for x in found[1])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_chunks_of_a_prefill_are_the_whole() -> None:
    call = Call(queries=50, keys=50)
    q, k, v, freq = make(call)
    table = make_table(call, freq)
    for options in ({"is_causal": True}, {"window": 13}):
        whole = attention(q, k, v, table, **options)
        chunks = [
            attention(q[:, first:last], k[:, :last], v[:, :last], table, **options)
            for first, last in pairwise([0, 20, 21, 50])
        ]
        assert_same({"": torch.cat(chunks, dim=1)}, {"": whole})
        # the same chunks over a cache that has room for all.
        chunks = [
            attention(q[:, first:last], k, v, table, kv_end=torch.tensor([last, last]), **options)
            for first, last in pairwise([0, 20, 21, 50])
        ]
        assert_same({"": torch.cat(chunks, dim=1)}, {"": whole})


def in_two_blocks(q: Tensor, k: Tensor, v: Tensor, table: Table, far: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Each half of the keys by itself, as a ring of devices goes about it, merged by their lse."""
    half = k.shape[1] // 2
    options |= {"q_offset": far, "return_lse": True}
    parts = [
        attention(q, x, y, table, k_offset=far + first, **options)
        for x, y, first in ((k[:, :half], v[:, :half], 0), (k[:, half:], v[:, half:], half))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shares = [(part - lse).exp().transpose(1, 2)[..., None] for _, part in parts]
    return sum(share * out for share, (out, _) in zip(shares, parts, strict=True)), lse


@pytest.mark.parametrize(("is_causal", "far"), [(True, 0), (False, 0), (True, 100)])
def test_blocks_of_keys_merged_by_lse_are_the_whole(is_causal: bool, far: int) -> None:
    call = Call(options={"is_causal": is_causal})
    given = make(call)
    merged = outputs_and_gradients(in_two_blocks, call, given, far=far)
    assert_same(merged, outputs_and_gradients(attention, call, given, return_lse=True), rtol=1e-10)


@pytest.mark.parametrize("rotated", ["q", "k", "qk"])
@pytest.mark.parametrize("positions", [{}, {"positions": 1}], ids=["whole", "sampled"])
def test_rotating_before_or_inside_is_the_same(rotated: str, positions: dict[str, int]) -> None:
    call = Call(settings={"amplitude": 1.2, **positions}, options={"is_causal": True})

    def before(q: Tensor, k: Tensor, v: Tensor, table: Table, **options: Any) -> Tensor:
        q = apply_rotary(q, None, table)[0] if "q" in rotated else q
        k = apply_rotary(k, None, table)[0] if "k" in rotated else k
        return attention(q, k, v, table, rotated=rotated, **options)

    given = make(call)
    # where one is rotated elsewhere, each sum over positions is whole, and they cancel here.
    assert_same(outputs_and_gradients(before, call, given), outputs_and_gradients(attention, call, given), rtol=1e-10)


@pytest.mark.parametrize("rotated", ["none", "q", "k"])
@pytest.mark.parametrize("kind", ["int", "tensor", "sampled"])
def test_dfreq_is_as_exact_far_out_as_at_the_start(rotated: str, kind: str) -> None:
    errors = []
    for far in (0, 100_000):
        offset = [far, far] if kind == "tensor" else far
        options = {"is_causal": True, "rotated": rotated}
        settings = {"length": far + 64}
        if kind == "sampled":
            settings = {"length": None, "positions": torch.arange(37.0).double() + far}
        else:
            options |= {"q_offset": offset, "k_offset": offset}
        found = []
        for function, dtype in ((attention, torch.float32), (expected, torch.float64)):
            q, k, v, freq = make(Call(), torch.float32)
            freq.requires_grad_()
            table = RotaryTable.from_frequencies(freq, dtype=dtype, **settings)
            out = function(*(x.to(dtype) for x in (q, k, v)), table, **options_of(Call(options=options)))
            found.append(torch.autograd.grad((out * weights(out)).sum(), freq)[0])
        errors.append((found[0] - found[1]).abs().max() / found[1].abs().max())
    assert errors[1] <= 2 * errors[0] + 1e-6


def test_no_queries_or_no_keys() -> None:
    for sizes in (((2, 0), (2, 5), (2, 5)), ((2, 5), (2, 0), (2, 0)), ((0, 5), (0, 5), (0, 5))):
        leaves = [x.requires_grad_() for x in heads(*sizes, dtype=torch.float32)]
        freq = make(Call()).freq.requires_grad_()
        out, lse = attention(*leaves, make_table(Call(), freq, torch.float32), is_causal=True, return_lse=True)
        assert out.shape == leaves[0].shape
        assert not out.any()
        assert (lse == -math.inf).all()
        for gradient in torch.autograd.grad(out.sum(), (*leaves, freq)):
            assert not gradient.any()


def test_causality_is_from_the_bottom_right_as_in_flash_attn() -> None:
    q, k, v = heads((1, 3), (1, 7), (1, 7))
    table = make_table(Call(), make(Call()).freq)
    actual = attention(q, k, v, table, is_causal=True, rotated="qk").transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bottom_right = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    torch.testing.assert_close(
        actual, functional.scaled_dot_product_attention(q, k, v, attn_mask=bottom_right, enable_gqa=True)
    )
    top_left = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (actual - top_left).abs().max() > 0.1


SMALL = {
    "causal": Call(1, 4, 4, 2, 1, 6, 2, options={"is_causal": True}),
    "window, softcap": Call(1, 3, 5, 2, 1, 6, 3, options={"window": 3, "softcap": 1.5}),
    "packed": Call(
        1, 4, 5, 1, 1, 4, 2, options={"cu_seqlens_q": [0, 2, 4], "cu_seqlens_k": [0, 2, 5], "is_causal": True}
    ),
    "lse": Call(2, 2, 3, 1, 1, 4, 2, 2, options={"return_lse": True, "lengths": [20, 3]}),
    "q rotated before": Call(1, 3, 4, 1, 1, 4, 2, options={"is_causal": True, "rotated": "q"}),
}


@pytest.mark.parametrize("call", SMALL.values(), ids=SMALL.keys())
def test_gradcheck(call: Call) -> None:
    given = [x.requires_grad_() for x in make(call)]

    def function(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Any:
        return attention(q, k, v, make_table(call, freq), **options_of(call))

    assert torch.autograd.gradcheck(function, given)
