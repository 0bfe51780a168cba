"""Attention over blocks merged by LSE: values and gradients against one call over all keys, and edges of the merge."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_calls import Call, Given, Table, assert_same, expected, make, outputs_and_gradients
from tolerance import assert_within_rule
from torch import Tensor

from clex_kernels import merge_attention
from clex_kernels.attention import attention

L = 37
CALLS = {
    "causal": Call(options={"is_causal": True}),
    "full": Call(),
    "one key head, softcap": Call(h=6, g=1, options={"is_causal": True, "softcap": 2.0}),
    "window shorter than a block": Call(options={"window": 5}),
    "sampled": Call(settings={"positions": 1}, options={"is_causal": True}),
    "sampled by each sequence": Call(tables=2, settings={"positions": 2}, options={"is_causal": True}),
    "left padding, mixed t": Call(b=3, tables=4, options={"is_causal": True, "kv_start": [5, 0, 36]}),
    "log-n, amplitude": Call(tables=4, settings={"log_scale": True, "amplitude": 1.3}, options={"is_causal": True}),
}


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, table: Table, queries: list[int], keys: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """A call for each block of queries and each of keys, merged over the keys, as ranks of a ring go about it."""
    kv_start = options.pop("kv_start", torch.zeros(q.shape[0], dtype=torch.int64))
    lengths = options.pop("lengths", k.shape[1] - kv_start)
    rows = []
    for first, last in pairwise(queries):
        parts = [
            attention(
                *(q[:, first:last], k[:, begin:end], v[:, begin:end], table),
                **options,
                kv_start=(kv_start - begin).clamp(0, end - begin),
                lengths=lengths,
                q_offset=first,
                k_offset=begin,
                return_lse=True,
            )
            for begin, end in pairwise(keys)
        ]
        rows.append(merge_attention(*zip(*parts, strict=True)))
    outs, lses = zip(*rows, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_blocks_merge_to_the_whole_with_all_gradients(call: Call) -> None:
    given = make(call)
    truth = outputs_and_gradients(attention, call, given, return_lse=True)
    merged = outputs_and_gradients(in_blocks, call, given, queries=[0, 10, 20, L], keys=[0, 7, 20, 21, L])
    assert_same(merged, truth, rtol=1e-10)
    assert all(x.abs().max() > 0 for x in truth.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_keep_the_tolerance_rule(dtype: torch.dtype) -> None:
    call = CALLS["causal"]
    given = make(call, dtype)
    cut = {"queries": [0, L], "keys": [0, 7, 20, 21, L]}
    merged = outputs_and_gradients(in_blocks, call, given, dtype, **cut)
    exact = Given(*(x.double() for x in given))
    truth, in_dtype = (
        outputs_and_gradients(expected, call, x, y, return_lse=True)
        for x, y in ((exact, torch.float64), (given, dtype))
    )
    assert [merged["out"].dtype, merged["lse"].dtype] == [dtype, torch.float32]
    for name in ("out", "lse", "dv"):
        assert_within_rule(merged[name], in_dtype[name].to(merged[name].dtype), truth[name])


def parts(*lses: float, size: tuple[int, ...] = (2, 3, 4, 5)) -> tuple[list[Tensor], list[Tensor]]:
    """Random outs, 0 where the lse says that nothing is seen, and lses of one value each."""
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(size, generator=generator, dtype=torch.float64) * (lse > -math.inf) for lse in lses]
    return outs, [torch.full((*size[:-3], size[-2], size[-3]), lse, dtype=torch.float64) for lse in lses]


def test_what_is_seen_nowhere_gives_nothing_and_no_nan_in_gradients() -> None:
    outs, lses = parts(-math.inf, -math.inf)
    # one query of one head sees something in the second block.
    outs[1][0, 0, 0], lses[1][0, 0, 0] = 2.0, 1.5
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = merge_attention(outs, lses)
    seen = torch.zeros(2, 4, 3, dtype=torch.bool)
    seen[0, 0, 0] = True
    assert torch.equal(lse.detach(), torch.where(seen, 1.5, -math.inf).double())
    assert torch.equal(out.detach(), seen.transpose(1, 2)[..., None].expand_as(out) * 2.0)
    loss = (out * 3.0).sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()
    gradients = torch.autograd.grad(loss, leaves)
    assert all(x.isfinite().all() for x in gradients)
    # a single block's out, lse and nothing else count for that query.
    assert torch.equal(gradients[1][0, 0, 0], torch.full((5,), 3.0).double())
    assert torch.equal(gradients[3], seen.double())
    assert not gradients[0].any()
    assert not gradients[2].any()


def test_an_empty_block_changes_no_bit() -> None:
    outs, lses = parts(0.3, -math.inf, -2.0)
    with_empty, without = merge_attention(outs, lses), merge_attention(outs[::2], lses[::2])
    for x, y in zip(with_empty, without, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_lses_far_from_0_neither_overflow_nor_vanish(shift: float) -> None:
    outs, lses = parts(shift, shift + 1)
    out, lse = merge_attention(outs, lses)
    share = 1 / (1 + math.exp(1))
    torch.testing.assert_close(out, share * outs[0] + (1 - share) * outs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, torch.full_like(lse, shift + 1 - math.log(1 - share)), rtol=1e-12, atol=0)


def test_one_block_is_itself_and_packed_shapes_do() -> None:
    outs, lses = parts(0.7, size=(6, 4, 5))
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out, outs[0])
    torch.testing.assert_close(lse, lses[0], rtol=1e-15, atol=0)


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in [(1, 2, 3, 2)] * 3 + [(1, 3, 2)] * 3
    ]
    assert torch.autograd.gradcheck(lambda *x: merge_attention(x[:3], x[3:]), leaves)


ONE = torch.zeros(2, 3, 4, 5)
LSE = torch.zeros(2, 4, 3)
WRONG = {
    "no list": ((ONE, [LSE]), TypeError, "outs: expected a list or tuple of tensors, got Tensor"),
    "no block": (([], []), ValueError, "outs: expected at least one block, got 0"),
    "counts": (([ONE, ONE], [LSE]), ValueError, "lses: expected as many as outs, 2, got 1"),
    "no tensor": (([ONE], [0.0]), TypeError, r"lses\[0\]: expected a tensor, got float"),
    "integers": (([ONE.int()], [LSE]), TypeError, r"outs\[0\]: expected float32, .* got torch.int32"),
    "dims": (([ONE[0, 0]], [LSE]), ValueError, r"outs\[0\]: expected shape \[B, L, H, D\] or .* got \[4, 5\]"),
    "dtypes": (([ONE, ONE.half()], [LSE, LSE]), TypeError, r"outs\[1\]: expected torch.float32, got torch.float16"),
    "lse of half": (([ONE.half()], [LSE.half()]), TypeError, r"lses\[0\]: expected torch.float32, got torch.float16"),
    "shapes": (([ONE, ONE[:1]], [LSE, LSE]), ValueError, r"outs\[1\]: expected shape \[2, 3, 4, 5\] on cpu, got \[1,"),
    "lse's order": (
        ([ONE], [LSE.transpose(1, 2)]),
        ValueError,
        r"lses\[0\]: expected shape \[2, 4, 3\] on cpu, got \[2, 3, 4\]",
    ),
}


@pytest.mark.parametrize(("given", "error", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="^" + text):
        merge_attention(*given)
