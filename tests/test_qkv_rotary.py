"""qkv_rotary: values and every gradient against the projection and the reference's rotary in fp64."""

from typing import Any, NamedTuple

import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor
from torch.nn import functional

from clex_kernels import reference
from clex_kernels.attention import attention
from clex_kernels.qkv_rotary import qkv_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Shape(NamedTuple):
    B: int
    L: int
    C: int
    H: int
    G: int
    D: int
    R: int

    def __str__(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


SHAPES = [
    # decoding: one token of several sequences.
    Shape(3, 1, 40, 4, 1, 16, 8),
    Shape(2, 37, 48, 4, 2, 32, 16),
    # no groups, and a head of which a part is rotated.
    Shape(1, 19, 33, 3, 3, 20, 4),
    # odd dims.
    Shape(2, 5, 24, 2, 1, 13, 4),
]
GROUPED = SHAPES[1]
DFREQ_SHAPE = Shape(2, 37, 48, 4, 2, 32, 16)


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    freq: Tensor

    def cast(self, dtype: torch.dtype) -> "Operands":
        """All but freq, which is fp64 always, as leaves that require gradients."""
        return Operands(
            *(part.detach().to(dtype).requires_grad_() for part in self[:3]), self.freq.detach().requires_grad_()
        )


def make_operands(shape: Shape, tables: int | None = None, seed: int = 0) -> Operands:
    """In fp64: x [B, L, C], weight [(H + 2G) D, C], bias and freq [R], or [T, R]."""
    generator = torch.Generator().manual_seed(seed)
    B, L, C, H, G, D, R = shape
    x = torch.randn(B, L, C, generator=generator, dtype=torch.float64)
    weight = torch.randn((H + 2 * G) * D, C, generator=generator, dtype=torch.float64) / C**0.5
    bias = torch.randn((H + 2 * G) * D, generator=generator, dtype=torch.float64)
    decay = torch.linspace(0, -3, R, dtype=torch.float64)
    if tables is not None:
        decay = decay * (1 + torch.arange(tables, dtype=torch.float64)[:, None] / 8)
    return Operands(x, weight, bias, 10**decay)


def rows_of(shape: Shape) -> list[int]:
    return [heads * shape.D for heads in (shape.H, shape.G, shape.G)]


def written_out(
    shape: Shape, operands: Operands, positions: Tensor, keys: str = "rotated", has_bias: bool = True
) -> tuple[Tensor, ...]:
    """The same in plain torch, in the operands' dtype; positions [L] or [B, L], freq [R] or [B, R]."""
    x, weight, bias, freq = operands
    heads = functional.linear(x, weight, bias if has_bias else None).unflatten(-1, (-1, shape.D))
    q, k, v = heads.split((shape.H, shape.G, shape.G), dim=2)
    cos, sin = reference.tables(freq, positions)
    if x.dtype != torch.float64:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    q, rotated = (reference.rotary(y, cos, sin) for y in (q, k))
    return {"rotated": (q, rotated, v), "raw": (q, k, v), "both": (q, rotated, v, k)}[keys]


def table_of(freq: Tensor, dtype: torch.dtype, **settings: Any) -> RotaryTable:
    settings = settings or {"length": 64}
    return RotaryTable.from_frequencies(
        freq, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **settings
    )


def gradients(outs: tuple[Tensor, ...], operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a loss that weighs every element differently."""
    loss = 0.0
    for i, out in enumerate(outs):
        weights = torch.cos(torch.arange(out.numel(), dtype=torch.float64) * (1 + i)).view_as(out)
        loss = loss + (out * weights.to(out.dtype)).sum(dtype=torch.float64)
    return torch.autograd.grad(loss, operands, allow_unused=True)


def assert_close(actual: Tensor, in_dtype: Tensor, truth: Tensor) -> None:
    """fp64 to 1e-12 of the largest; otherwise the rule."""
    if actual.dtype == torch.float64 == in_dtype.dtype:
        torch.testing.assert_close(actual, truth, rtol=0, atol=1e-12 * truth.abs().max().item())
    else:
        assert_within_rule(actual, in_dtype, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype, poisoned_memory: None) -> None:
    exact = make_operands(shape)
    positions = torch.arange(shape.L) + 9
    operands = exact.cast(dtype)
    x, weight, bias, freq = operands
    outs = qkv_rotary(x, weight, table_of(freq, dtype), shape.H, shape.G, bias, offset=9)
    assert [tuple(out.shape) for out in outs] == [
        (shape.B, shape.L, heads, shape.D) for heads in (shape.H, shape.G, shape.G)
    ]
    # the oracles start from the same rounded numbers.
    rounded = Operands(*(part.detach() for part in operands))
    in_dtype, truth = rounded.cast(dtype), rounded.cast(torch.float64)
    expected, true = (written_out(shape, ops, positions) for ops in (in_dtype, truth))
    for out, plain, best in zip(outs, expected, true, strict=True):
        assert_close(out, plain, best)
    found, plain, best = (gradients(y, ops) for y, ops in ((outs, operands), (expected, in_dtype), (true, truth)))
    assert found[3].dtype == torch.float64
    for name, mine, its, exactly in zip(("dx", "dweight", "dbias"), found, plain, best, strict=False):
        assert mine.dtype == dtype, name
        assert_close(mine, its, exactly)
    # sums of numbers in the dtype: judged in it, not in fp64.
    assert_close(*(d if dtype == torch.float64 else d.to(dtype) for d in (found[3], plain[3])), best[3])


@pytest.mark.parametrize("keys", ["raw", "both"])
@pytest.mark.parametrize("parts", [1, 3])
def test_keys_as_asked_for_with_gradients(keys: str, parts: int) -> None:
    shape = GROUPED
    operands = make_operands(shape).cast(torch.float64)
    x, weight, bias, freq = operands
    given = (weight, bias) if parts == 1 else (weight.split(rows_of(shape)), bias.split(rows_of(shape)))
    outs = qkv_rotary(x, given[0], table_of(freq, torch.float64), shape.H, shape.G, given[1], keys=keys)
    expected = written_out(shape, operands, torch.arange(shape.L), keys)
    assert len(outs) == len(expected) == (4 if keys == "both" else 3)
    for out, truth in zip(outs, expected, strict=True):
        assert_close(out, truth, truth)
    for mine, truth in zip(gradients(outs, operands), gradients(expected, operands), strict=True):
        assert_close(mine, truth, truth)


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "raw_k"])
def test_an_output_that_nobody_uses_takes_part_in_no_gradient(which: int) -> None:
    shape = GROUPED
    operands = make_operands(shape).cast(torch.float64)
    x, weight, bias, freq = operands
    outs = qkv_rotary(x, weight, table_of(freq, torch.float64), shape.H, shape.G, bias, keys="both")
    expected = written_out(shape, operands, torch.arange(shape.L), "both")
    pairs = zip(
        gradients(outs[which : which + 1], operands), gradients(expected[which : which + 1], operands), strict=True
    )
    for mine, truth in pairs:
        truth = torch.zeros_like(mine) if truth is None else truth
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_without_a_bias_or_gradients() -> None:
    shape = GROUPED
    exact = make_operands(shape)
    expected = written_out(shape, exact, torch.arange(shape.L), has_bias=False)
    for out, truth in zip(
        qkv_rotary(exact.x, exact.weight, table_of(exact.freq, torch.float64), shape.H, shape.G), expected, strict=True
    ):
        assert not out.requires_grad
        assert_close(out, truth, truth)


def test_only_needed_gradients_are_made() -> None:
    shape = GROUPED
    for needed in range(4):
        operands = [part.detach().requires_grad_(i == needed) for i, part in enumerate(make_operands(shape))]
        x, weight, bias, freq = operands
        outs = qkv_rotary(x, weight, table_of(freq, torch.float64), shape.H, shape.G, bias)
        expected = written_out(shape, Operands(*operands), torch.arange(shape.L))
        (found,), (truth,) = (gradients(y, operands[needed : needed + 1]) for y in (outs, expected))
        assert_close(found, truth, truth)


def test_every_sequence_by_its_own_table_and_positions() -> None:
    shape = Shape(3, 11, 24, 4, 2, 16, 8)
    operands = make_operands(shape, tables=5).cast(torch.float64)
    x, weight, bias, freq = operands
    generator = torch.Generator().manual_seed(3)
    positions = (100 * torch.rand(5, 30, dtype=torch.float64, generator=generator)).sort().values
    index, ids = torch.tensor([4, 0, 4]), torch.randint(0, 27, (3, 11), generator=generator)
    stack = RotaryTableStack.from_frequencies(
        freq, torch.ones(5, dtype=torch.float64), positions=positions, index=index, dtype=torch.float64
    )
    outs = qkv_rotary(x, weight, stack, shape.H, shape.G, bias, offset=3, position_ids=ids)
    chosen = positions[index].gather(1, ids + 3)
    expected = written_out(shape, Operands(x, weight, bias, freq[index]), chosen)
    for out, truth in zip(outs, expected, strict=True):
        assert_close(out, truth, truth)
    found, truth = gradients(outs, operands), gradients(expected, operands)
    assert found[3][1:4].abs().max() == 0
    for mine, exactly in zip(found, truth, strict=True):
        assert_close(mine, exactly, exactly)


@pytest.mark.parametrize("far", [0, 100_000])
def test_dfreq_is_whole_where_q_and_k_are_rotated_in_two_places(far: int) -> None:
    # q here and k in attention, or both here, or both there: one sum.
    shape = GROUPED
    found = []
    for keys, rotated in (("raw", "q"), ("rotated", "qk"), (None, "none")):
        x, weight, bias, freq = make_operands(shape).cast(torch.float64)
        table = table_of(freq, torch.float64, length=far + 64)
        if keys is None:
            heads = functional.linear(x, weight, bias).unflatten(-1, (-1, shape.D))
            q, k, v = heads.split((shape.H, shape.G, shape.G), dim=2)
        else:
            q, k, v = qkv_rotary(x, weight, table, shape.H, shape.G, bias, offset=far, keys=keys)
        out = attention(q, k, v, table, is_causal=True, rotated=rotated, q_offset=far, k_offset=far)
        found.append((out, *gradients((out,), (x, weight, bias, freq))))
    for call in found[:2]:
        for mine, truth in zip(call, found[2], strict=True):
            # of the two sums far out one nearly cancels the other.
            torch.testing.assert_close(mine, truth, rtol=1e-7, atol=1e-9 * truth.abs().max().item())


def test_outputs_may_be_written_to_one_by_one() -> None:
    shape = GROUPED
    operands = make_operands(shape).cast(torch.float64)
    x, weight, bias, freq = operands
    table = table_of(freq.detach(), torch.float64)
    q, k, v = qkv_rotary(x, weight, table, shape.H, shape.G, bias)
    q.mul_(2)
    v.add_(1)
    expected = written_out(shape, operands, torch.arange(shape.L))
    changed = (2 * expected[0], expected[1], expected[2] + 1)
    for mine, truth in zip(gradients((q, k, v), operands[:3]), gradients(changed, operands[:3]), strict=True):
        assert_close(mine, truth, truth)


def test_a_write_to_what_dfreq_needs_is_noticed() -> None:
    shape = GROUPED
    x, weight, bias, freq = make_operands(shape).cast(torch.float64)
    q, k, v = qkv_rotary(x, weight, table_of(freq, torch.float64), shape.H, shape.G, bias)
    q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (q.sum() + k.sum() + v.sum()).backward()


def test_gradcheck() -> None:
    shape = Shape(2, 3, 5, 2, 1, 6, 2)
    x, weight, bias, freq = make_operands(shape).cast(torch.float64)

    def run(x: Tensor, weight: Tensor, bias: Tensor, freq: Tensor) -> tuple[Tensor, ...]:
        return qkv_rotary(x, weight, table_of(freq, torch.float64), 2, 1, bias, keys="both")

    # the frequencies enter through tables, which finite differences would have to rebuild: they do.
    assert torch.autograd.gradcheck(run, (x, weight, bias, freq))


@pytest.mark.parametrize("size", [(0, 5), (2, 0)], ids=["B0", "L0"])
def test_nothing_to_project(size: tuple[int, int]) -> None:
    shape = GROUPED
    _, weight, bias, freq = make_operands(shape).cast(torch.float64)
    x = torch.empty(*size, shape.C, dtype=torch.float64, requires_grad=True)
    for keys in ("rotated", "both"):
        outs = qkv_rotary(x, weight, table_of(freq, torch.float64), shape.H, shape.G, bias, keys=keys)
        assert [out.shape[:2] for out in outs] == [size] * len(outs)
        found = torch.autograd.grad(sum(out.sum() for out in outs), (x, weight, bias, freq))
        assert all(not gradient.any() for gradient in found)
