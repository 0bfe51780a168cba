"""clex::qkv_rotary on the CPU against plain torch: the kernel for few tokens, and torch's product beyond them."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within_rule
from torch import Tensor

import clex_kernels.qkv_rotary  # noqa: F401 (defines the operator)
from clex_kernels import reference
from clex_kernels.qkv_rotary_checks import KEYS
from clex_kernels.tables import RotaryTable, RotaryTableStack

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# as csrc/bindings_qkv_rotary.cpp has it.
FEW_TOKENS = 32


class Shape(NamedTuple):
    """B sequences of L tokens, H and G heads of D channels, R pairs, C channels of x."""

    b: int
    length: int
    h: int
    g: int
    d: int
    r: int
    c: int

    def __str__(self) -> str:
        return f"B{self.b}-L{self.length}-H{self.h}-G{self.g}-D{self.d}-R{self.r}-C{self.c}"


# one token of whole vectors; odd D and R and a tail of C; Phi-2 in part; next to nothing; the most tokens, and more.
SHAPES = [
    Shape(1, 1, 4, 2, 128, 64, 256),
    Shape(2, 3, 4, 2, 27, 13, 65),
    Shape(1, 7, 2, 2, 80, 16, 100),
    Shape(2, 1, 3, 1, 3, 1, 1),
    Shape(2, FEW_TOKENS // 2, 2, 1, 16, 8, 47),
    Shape(1, FEW_TOKENS + 1, 2, 1, 27, 13, 65),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# few tokens and many.
lengths = pytest.mark.parametrize("length", [3, FEW_TOKENS + 3])


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor


def operands(shape: Shape, dtype: torch.dtype) -> Operands:
    generator = torch.Generator().manual_seed(0)
    rows = (shape.h + 2 * shape.g) * shape.d
    sizes = (shape.b, shape.length, shape.c), (rows, shape.c), (rows,)
    x, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Operands(x.to(dtype), (weight / shape.c**0.5).to(dtype), bias.to(dtype))


def frequencies(pairs: int) -> Tensor:
    return 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def table_of(shape: Shape, dtype: torch.dtype) -> RotaryTable:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return RotaryTable.from_frequencies(frequencies(shape.r), length=200, amplitude=1.2, dtype=wide)


def split(x: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """Rows of q, k and v."""
    return x.split([shape.h * shape.d, shape.g * shape.d, shape.g * shape.d])


def project(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    table: RotaryTable | RotaryTableStack,
    shape: Shape,
    bias: Tensor | tuple[Tensor, ...] | None = None,
    keys: str = "rotated",
    **where: Any,
) -> tuple[Tensor, Tensor]:
    """The operator's qkv [B, L, H + 2G, D] and k_rotated."""
    parts = [part if isinstance(part, tuple) else (part, None, None) for part in (weight, bias)]
    stacked = isinstance(table, RotaryTableStack)
    tables = [y if stacked else y[None] for y in (table.freq, table.coarse, table.fine)]
    index = where.get("index", table.index if stacked else None)
    positions = (None, index, where.get("position_ids"), where.get("offset", 0))
    with torch.no_grad():
        qkv, k_rotated = torch.ops.clex.qkv_rotary(
            x, *parts[0], *parts[1], *tables, *positions, shape.h, shape.g, *KEYS[keys], False
        )
    assert qkv.shape == (*x.shape[:2], shape.h + 2 * shape.g, shape.d)
    assert qkv.is_contiguous()
    return qkv, k_rotated


def formula(given: Operands, shape: Shape, positions: Tensor) -> Tensor:
    """qkv by plain torch in the dtype of what is given, with rotated keys."""
    qkv = F.linear(*given).view(*given.x.shape[:2], -1, shape.d)
    cosine_and_sine = reference.tables(frequencies(shape.r), positions.double(), 1.2)
    rotated = shape.h + shape.g
    return torch.cat([reference.rotary(qkv[:, :, :rotated], *cosine_and_sine), qkv[:, :, rotated:]], dim=2)


def assert_formula(actual: Tensor, given: Operands, shape: Shape, positions: Tensor) -> None:
    truth = formula(Operands(*(y.double() for y in given)), shape, positions)
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_within_rule(actual, formula(given, shape, positions), truth)


@shapes
@dtypes
@pytest.mark.usefixtures("isa")
def test_projects_and_rotates_like_the_formula(shape: Shape, dtype: torch.dtype) -> None:
    given = operands(shape, dtype)
    qkv, k_rotated = project(given.x, given.weight, table_of(shape, dtype), shape, given.bias, offset=7)
    assert k_rotated.numel() == 0
    assert_formula(qkv, given, shape, 7 + torch.arange(shape.length))


@dtypes
def test_no_bias(dtype: torch.dtype) -> None:
    for shape in SHAPES[1], SHAPES[-1]:
        given = operands(shape, dtype)
        given.bias.zero_()
        qkv, _ = project(given.x, given.weight, table_of(shape, dtype), shape)
        assert_formula(qkv, given, shape, torch.arange(shape.length))


@lengths
@pytest.mark.usefixtures("isa")
def test_keys_come_rotated_raw_or_both(length: int) -> None:
    shape = Shape(1, length, 4, 2, 27, 11, 65)
    x, weight, bias = operands(shape, torch.bfloat16)
    table = table_of(shape, torch.bfloat16)
    results = {keys: project(x, weight, table, shape, bias, keys) for keys in ("rotated", "raw", "both")}
    k = slice(shape.h, shape.h + shape.g)
    raw, both = results["raw"][0], results["both"][0]
    plain = F.linear(x.double(), weight.double(), bias.double()).view(raw.shape)
    torch.testing.assert_close(raw[:, :, k].double(), plain[:, :, k], rtol=2**-8, atol=1e-2)
    assert torch.equal(both, raw)
    assert torch.equal(results["both"][1], results["rotated"][0][:, :, k])
    expected = raw.clone()
    expected[:, :, k] = results["both"][1]
    assert torch.equal(results["rotated"][0], expected)
    assert results["raw"][1].numel() == 0


@lengths
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_three_weights(length: int, biased: bool) -> None:
    shape = Shape(1, length, 4, 2, 16, 8, 40)
    given = operands(shape, torch.float32)
    if not biased:
        given.bias.zero_()
    weights = tuple(part.clone() for part in split(given.weight, shape))
    biases = tuple(part.clone() for part in split(given.bias, shape)) if biased else None
    qkv, _ = project(given.x, weights, table_of(shape, torch.float32), shape, biases)
    assert_formula(qkv, given, shape, torch.arange(length))


@dtypes
@lengths
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sparse-channels"])
def test_strided_x(dtype: torch.dtype, length: int, layout: str) -> None:
    shape = Shape(2, length, 2, 1, 16, 8, 37)
    x, *weights = operands(shape, dtype)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        x = x[:1, :1].expand_as(x)
    else:
        x = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    given = Operands(x, *weights)
    qkv, _ = project(x, given.weight, table_of(shape, dtype), shape, given.bias)
    assert_formula(qkv, given, shape, torch.arange(length))


@dtypes
@pytest.mark.parametrize("layout", ["wide-rows", "sparse-channels"])
@pytest.mark.usefixtures("isa")
def test_strided_weights(dtype: torch.dtype, layout: str) -> None:
    shape = Shape(1, 3, 4, 2, 16, 8, 37)
    given = operands(shape, dtype)
    dense, _ = project(given.x, given.weight, table_of(shape, dtype), shape, given.bias)
    if layout == "wide-rows":
        # nobody may look at what stands between the rows.
        holder = torch.full((given.weight.shape[0], 50), float("nan"), dtype=dtype)
        weight = holder[:, 5 : 5 + shape.c].copy_(given.weight)
    else:
        weight = given.weight.t().contiguous().t()
    bias = torch.stack([given.bias, torch.full_like(given.bias, float("nan"))], dim=1)[:, 0]
    qkv, _ = project(given.x, weight, table_of(shape, dtype), shape, bias)
    assert_formula(qkv, given, shape, torch.arange(shape.length))
    assert layout != "wide-rows" or torch.equal(qkv, dense)


@lengths
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-sequence"])
def test_position_ids(length: int, rows: int) -> None:
    shape = Shape(2, length, 4, 2, 16, 8, 40)
    given = operands(shape, torch.float32)
    ids = torch.randint(0, 150, (rows, 2 * length), generator=torch.Generator().manual_seed(1))[:, ::2]
    table = table_of(shape, torch.float32)
    qkv, _ = project(given.x, given.weight, table, shape, given.bias, position_ids=ids, offset=50)
    assert_formula(qkv, given, shape, ids.expand(2, -1) + 50)


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "one-per-sequence"])
@pytest.mark.parametrize("length", [2, FEW_TOKENS])
def test_stack_rotates_each_sequence_by_its_own_table(length: int, indexed: bool) -> None:
    shape = Shape(3, length, 4, 2, 16, 8, 40)
    x, weight, bias = operands(shape, torch.float64)
    factors = torch.arange(1, 6 if indexed else 4, dtype=torch.float64)
    freq = frequencies(shape.r) / factors[:, None]
    index = torch.tensor([4, 0, 2]) if indexed else None
    stack = RotaryTableStack.from_frequencies(freq, factors, length=100, index=index, dtype=torch.float64)
    actual, _ = project(x, weight, stack, shape, bias, offset=9)
    for b, t in enumerate([4, 0, 2] if indexed else [0, 1, 2]):
        table = RotaryTable.from_frequencies(freq[t], length=100, dtype=torch.float64)
        alone, _ = project(x[b : b + 1], weight, table, shape, bias, offset=9)
        torch.testing.assert_close(actual[b : b + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [5, FEW_TOKENS + 1])
def test_rows_outside_the_table_are_nan(length: int, dtype: torch.dtype) -> None:
    shape = Shape(2, length, 2, 1, 10, 3, 16)
    x, weight, bias = operands(shape, dtype)
    freq = frequencies(shape.r)[None]
    stack = RotaryTableStack.from_frequencies(freq, torch.ones(1, dtype=torch.float64), length=64)
    ids = torch.zeros(1, length, dtype=torch.int64)
    ids[0, :4] = torch.tensor([0, -1, 64, 2**62])
    rotated, rest = slice(0, 2 * shape.r), slice(2 * shape.r, None)
    bad = torch.zeros(2, length, dtype=torch.bool)
    bad[:, 1:4] = True
    qkv, k_rotated = project(x, weight, stack, shape, bias, "both", position_ids=ids)
    for part in (qkv[:, :, : shape.h], k_rotated):
        assert torch.equal(part[..., rotated].isnan(), bad[:, :, None, None].expand_as(part[..., rotated]))
        assert part[..., rest].isfinite().all()
    assert qkv[:, :, shape.h :].isfinite().all()
    qkv, _ = project(x, weight, stack, shape, bias, index=torch.tensor([0, 1]))
    assert qkv[0].isfinite().all()
    assert qkv[1, :, : shape.h + shape.g, rotated].isnan().all()
    assert qkv[1, :, :, rest].isfinite().all()
    assert qkv[1, :, shape.h + shape.g :].isfinite().all()


@dtypes
@pytest.mark.usefixtures("isa")
def test_bits_depend_neither_on_the_batch_nor_on_threads(dtype: torch.dtype) -> None:
    # enough weights that threads share them.
    shape = Shape(1, 7, 4, 2, 64, 32, 200)
    x, weight, bias = operands(shape, dtype)
    table = table_of(shape, dtype)
    alone = [project(x[:, i : i + 1], weight, table, shape, bias, offset=i)[0] for i in range(shape.length)]
    expected = torch.cat(alone, dim=1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for length in range(1, shape.length + 1):
                together, _ = project(x[:, :length], weight, table, shape, bias)
                assert torch.equal(together, expected[:, :length]), f"{length} tokens, {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [Shape(0, 3, 2, 1, 8, 4, 16), Shape(2, 0, 2, 1, 8, 4, 16)], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "three"])
def test_no_tokens(shape: Shape, packed: bool) -> None:
    x, weight, bias = operands(shape, torch.float32)
    weights, biases = (weight, bias) if packed else (split(weight, shape), split(bias, shape))
    qkv, k_rotated = project(x, weights, table_of(shape, torch.float32), shape, biases, "both")
    assert qkv.numel() == 0
    assert k_rotated.shape == (shape.b, shape.length, shape.g, shape.d)
