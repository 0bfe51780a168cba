import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from interpreter import interpreted  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

SIZE = 256


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, a + b)
    tl.store(out_ptr + SIZE + offs, a - b)
    tl.store(out_ptr + 2 * SIZE + offs, a * b)
    tl.store(out_ptr + 3 * SIZE + offs, a / b)
    tl.store(out_ptr + 4 * SIZE + offs, -a)
    tl.store(out_ptr + 5 * SIZE + offs, tl.where(a < b, a, b))
    tl.store(out_ptr + 6 * SIZE + offs, a * 1.1)
    tl.store(out_ptr + 7 * SIZE + offs, tl.fma(a, b, a))
    tl.store(out_ptr + 8 * SIZE + offs, tl.abs(a))


@triton.jit
def cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def double(x):
    return x + x


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tile = offs[:, None] * SIZE + offs[None, :]
    a = tl.load(a_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(double(a), tl.load(b_ptr + tile)))


@triton.jit
def sum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, SIZE))))


@pytest.fixture(autouse=True)
def interpreting():
    with interpreted():
        yield


def edge_values() -> Tensor:
    """fp32 numbers of many magnitudes, ties between two bf16 among them, and what is not a number."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (SIZE - 8,), generator=generator).int()
    bits[::4] = bits[::4] & -65536 | 0x8000
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3.39e38, -3.4e38])
    return torch.cat((bits.view(torch.float32), special))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    # a NaN's payload is nobody's promise.
    actual, expected = (torch.where(x.isnan(), torch.nan, x) for x in (actual, expected))
    words = torch.int16 if actual.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(actual.view(words), expected.view(words))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_bf16_casts_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    values = edge_values()
    x = values.view(torch.int32) if source == torch.int32 else values.to(source)
    y = torch.full((SIZE,), torch.nan, dtype=target)
    cast_kernel[1,](x, y, SIZE)
    assert_same_bits(y, x.to(target))


def test_bf16_arithmetic_as_torch_does() -> None:
    a, b = edge_values().bfloat16(), edge_values().flip(0).roll(5).bfloat16()
    out = torch.full((9, SIZE), torch.nan, dtype=torch.bfloat16)
    arithmetic_kernel[1,](a, b, out, SIZE)
    fused = (a.float() * b.float() + a.float()).bfloat16()
    scaled = a * torch.tensor(1.1).bfloat16()
    # Triton 3.8 negates zeros too, before it was 0 - a.
    out[4] += 0
    expected = [a + b, a - b, a * b, a / b, 0 - a, torch.where(a < b, a, b), scaled, fused, a.abs()]
    for actual, row in zip(out, expected, strict=True):
        assert_same_bits(actual, row)


def test_bf16_dot_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    # whole numbers, whose sums are exact in any order.
    a, b = (torch.randint(-9, 10, (16, 16), generator=generator).bfloat16() for _ in range(2))
    out = torch.full((16, 16), torch.nan)
    dot_kernel[1,](a, b, out, 16)
    assert torch.equal(out, 2 * a.float() @ b.float())


def test_a_sum_in_bf16_is_refused() -> None:
    x, y = torch.ones(SIZE, dtype=torch.bfloat16), torch.full((1,), torch.nan, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="expected fp32, got bf16"):
        sum_kernel[1,](x, y, SIZE)
    wide = torch.full((1,), torch.nan)
    sum_kernel[1,](x.float(), wide, SIZE)
    assert wide.item() == SIZE


def test_language_is_left_as_it_was() -> None:
    before = [dict(vars(scope)) for scope in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
    x, y = torch.ones(SIZE), torch.zeros(SIZE, dtype=torch.bfloat16)
    cast_kernel[1,](x, y, SIZE)
    assert [dict(vars(scope)) for scope in (tl, tl.core, tl.math, tl.tensor, tl.dtype)] == before
