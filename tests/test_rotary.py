"""Values and gradients of apply_rotary against plain torch in fp64."""

from typing import NamedTuple

import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor

from clex_kernels import reference
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack


class Shape(NamedTuple):
    """B sequences of L tokens, H and G heads of D channels, R pairs."""

    b: int
    length: int
    h: int
    g: int
    d: int
    r: int

    def __str__(self) -> str:
        return f"B{self.b}-L{self.length}-H{self.h}-G{self.g}-D{self.d}-R{self.r}"


# a tail tile, GQA, one token, Phi-2, NeoX-20B, odd R, pairs fewer than any vector, more heads of k than of q.
SHAPES = [
    Shape(2, 129, 8, 2, 128, 64),
    Shape(3, 1, 4, 4, 64, 32),
    Shape(1, 70, 4, 4, 80, 16),
    Shape(2, 65, 3, 3, 96, 12),
    Shape(1, 33, 2, 1, 27, 13),
    Shape(2, 5, 1, 3, 3, 1),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# nothing to rotate at all: no sequence, no token, no head of q, none of k.
EMPTY = [Shape(0, 5, 2, 2, 8, 4), Shape(2, 0, 2, 2, 8, 4), Shape(2, 5, 0, 2, 8, 4), Shape(2, 5, 2, 0, 8, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def frequencies(pairs: int) -> Tensor:
    return 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((shape.b, shape.length, heads, shape.d) for heads in (shape.h, shape.g))
    q, k = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k


def rotate(x: Tensor, freq: Tensor, positions: Tensor, amplitude: float = 1.0) -> Tensor:
    """The formula in x's dtype, by angles in fp64; freq [R] or [B, R], positions [L] or [B, L]."""
    return reference.rotary(x, *reference.tables(freq, positions.double(), amplitude))


def assert_rotated(actual: Tensor, x: Tensor, freq: Tensor, positions: Tensor, amplitude: float = 1.0) -> None:
    truth = rotate(x.double(), freq, positions, amplitude)
    assert_close(actual, rotate(x, freq, positions, amplitude), truth)


def assert_close(actual: Tensor, in_dtype: Tensor, truth: Tensor) -> None:
    """The rule; fp64 can't be its own judge."""
    if in_dtype.dtype == truth.dtype and torch.equal(in_dtype, truth):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_within_rule(actual, in_dtype, truth)


@shapes
@dtypes
@pytest.mark.usefixtures("isa")
def test_rotates_like_the_formula(shape: Shape, dtype: torch.dtype) -> None:
    q, k = inputs(shape, dtype)
    freq = frequencies(shape.r)
    table = RotaryTable.from_frequencies(freq, length=200, amplitude=1.2, dtype=table_dtype(dtype))
    positions = 7 + torch.arange(shape.length)
    for actual, x in zip(apply_rotary(q, k, table, offset=7), (q, k), strict=True):
        assert_rotated(actual, x, freq, positions, amplitude=1.2)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("isa")
def test_result_is_the_truth_rounded_once(dtype: torch.dtype) -> None:
    q = inputs(Shape(1, 64, 4, 2, 64, 32), dtype)[0]
    # from subnormal in fp16 to beyond its range.
    scale = 10.0 ** torch.linspace(-7.5, 5.5, 64, dtype=torch.float64)[:, None, None]
    q = (q.double() * scale).to(dtype)
    freq = frequencies(32)
    table = RotaryTable.from_frequencies(freq, length=64, dtype=table_dtype(dtype))
    actual = apply_rotary(q, None, table)[0]
    truth = rotate(q.double(), freq, torch.arange(64))
    finite = truth.isfinite() & (truth.abs() < torch.finfo(dtype).max)
    info = torch.finfo(dtype)
    # an fp32 sum that cancels is not good to its own last digit: allow fp32 rounding of the pair.
    pair = torch.cat([torch.hypot(*truth.chunk(2, -1))] * 2, -1)
    spacing = (truth.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    slack = 4 * torch.finfo(table_dtype(dtype)).eps * pair
    assert ((actual.double() - truth).abs() <= spacing / 2 * 1.001 + slack)[finite].all()
    infinite = truth.abs() >= torch.finfo(dtype).max * (1 + info.eps)
    assert torch.equal(actual.double()[infinite & ~truth.isnan()].isinf(), torch.ones_like(truth[infinite]).bool())


@dtypes
@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_come_through(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 1, 32, dtype=dtype)
    x[..., 3], x[..., 5] = float("nan"), float("inf")
    table = RotaryTable.from_frequencies(frequencies(16), length=1, dtype=table_dtype(dtype))
    y = apply_rotary(x, None, table)[0].flatten()
    assert y[3].isnan()
    assert y[5] == float("inf")
    assert not y[[0, 1, 2, 4, 6, 15]].any()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_inputs(shape: Shape) -> None:
    q, k = (x.requires_grad_() for x in inputs(shape, torch.float32))
    freq = frequencies(shape.r).requires_grad_()
    table = RotaryTable.from_frequencies(freq, length=64)
    q_out, k_out = apply_rotary(q, k, table)
    assert q_out.shape == q.shape
    assert k_out.shape == k.shape
    (q_out.sum() + k_out.sum()).backward()
    assert q.grad.shape == q.shape
    assert freq.grad.isfinite().all()


def test_k_may_be_absent() -> None:
    shape = SHAPES[0]
    q, k = inputs(shape, torch.float32)
    table = RotaryTable.from_frequencies(frequencies(shape.r), length=200)
    q_out, none = apply_rotary(q, None, table)
    assert none is None
    assert torch.equal(q_out, apply_rotary(q, k, table)[0])


def test_head_first_layout_enters_as_a_view() -> None:
    shape = Shape(2, 65, 4, 2, 64, 32)
    q, k = inputs(shape, torch.float32)
    table = RotaryTable.from_frequencies(frequencies(shape.r), length=200)
    expected = apply_rotary(q, k, table)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    actual = apply_rotary(*views, table)
    for x, y, view in zip(actual, expected, views, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == view.stride()


def test_expanded_and_sliced_inputs() -> None:
    shape = Shape(2, 65, 4, 4, 64, 32)
    q, k = inputs(shape, torch.float32)
    table = RotaryTable.from_frequencies(frequencies(shape.r), length=200)
    packed = torch.cat((q, k), dim=-1)
    q_view, k_view = packed[..., : shape.d], packed[:, :, :1, shape.d :].expand(-1, -1, 4, -1)
    actual = apply_rotary(q_view, k_view, table)
    expected = apply_rotary(q, k[:, :, :1].expand(-1, -1, 4, -1).contiguous(), table)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_one_head_of_odd_stride() -> None:
    # a dimension of size 1 may have any stride.
    x = torch.randn(2, 3, 8)[:, :, None].as_strided((2, 3, 1, 8), (24, 8, 1, 1))
    table = RotaryTable.from_frequencies(frequencies(4), length=64)
    assert torch.equal(apply_rotary(x, None, table)[0], apply_rotary(x.contiguous().clone(), None, table)[0])


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-sequence"])
def test_position_ids(rows: int) -> None:
    shape = Shape(2, 65, 4, 2, 64, 32)
    q, k = inputs(shape, torch.float32)
    freq = frequencies(shape.r)
    table = RotaryTable.from_frequencies(freq, length=1000)
    ids = torch.randint(0, 900, (rows, 2 * shape.length), generator=torch.Generator().manual_seed(1))[:, ::2]
    for actual, x in zip(apply_rotary(q, k, table, position_ids=ids, offset=50), (q, k), strict=True):
        assert_rotated(actual, x, freq, ids.expand(2, -1) + 50)


def test_sampled_positions() -> None:
    shape = Shape(2, 33, 4, 2, 64, 32)
    q, k = inputs(shape, torch.float32)
    freq = frequencies(shape.r)
    positions = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).cumsum(0) * 100
    table = RotaryTable.from_frequencies(freq, positions=positions, amplitude=0.9)
    for actual, x in zip(apply_rotary(q, k, table, offset=4), (q, k), strict=True):
        assert_rotated(actual, x, freq, positions[4:37], amplitude=0.9)


@pytest.mark.parametrize("indexed", [True, False], ids=["index", "one-per-sequence"])
def test_stack_rotates_each_sequence_by_its_own_table(indexed: bool) -> None:
    shape = Shape(3, 70, 4, 2, 64, 32)
    q, k = inputs(shape, torch.bfloat16)
    factors = torch.arange(1, 6 if indexed else 4, dtype=torch.float64)
    freq = frequencies(shape.r) / factors[:, None]
    index = torch.tensor([4, 0, 2]) if indexed else None
    stack = RotaryTableStack.from_frequencies(freq, factors, length=200, index=index)
    actual = apply_rotary(q, k, stack, offset=9)
    for b, t in enumerate([4, 0, 2] if indexed else [0, 1, 2]):
        alone = apply_rotary(q[b : b + 1], k[b : b + 1], RotaryTable.from_frequencies(freq[t], length=200), offset=9)
        assert torch.equal(actual[0][b : b + 1], alone[0])
        assert torch.equal(actual[1][b : b + 1], alone[1])


def test_rows_outside_the_table_are_nan_in_the_operator() -> None:
    q = torch.randn(2, 4, 1, 8)
    stack = RotaryTableStack.from_frequencies(frequencies(4)[None], torch.ones(1, dtype=torch.float64), length=64)
    tables = (stack.freq, stack.coarse, stack.fine, None)
    ids = torch.tensor([[0, -1, 64, 2**62]])
    y, _ = torch.ops.clex.rotary(q, None, *tables, None, ids, 0)
    assert torch.equal(y.isnan().flatten(2).any(-1), torch.tensor([[False, True, True, True]] * 2))
    y, _ = torch.ops.clex.rotary(q, None, *tables, torch.tensor([0, 1]), None, 0)
    assert torch.equal(y.isnan().flatten(1).any(-1), torch.tensor([False, True]))
    dq, _, dfreq = torch.ops.clex.rotary_bwd(q, None, q, None, *tables[1:], torch.tensor([0, -1]), None, 0)
    assert torch.equal(dq.isnan().flatten(1).any(-1), torch.tensor([False, True]))
    assert dfreq.isfinite().all()


def seeds(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients that come in for the rotated q and k."""
    return inputs(shape, dtype, seed=1)


def dfreq_noise(rotated: list[Tensor], incoming: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """Root of the sum of squares of what dfreq [R] adds up: its error in units of eps, were each term rounded alone."""
    total = torch.zeros((), dtype=torch.float64)
    for y, dy in zip(rotated, incoming, strict=True):
        pairs = [torch.hypot(*x.detach().double().chunk(2, dim=-1)) for x in (y, dy)]
        total = total + (positions[:, None, None] * pairs[0] * pairs[1]).square().sum(dim=(0, 1, 2))
    return total.sqrt()


@shapes
@dtypes
@pytest.mark.usefixtures("isa")
def test_gradients(shape: Shape, dtype: torch.dtype) -> None:
    positions = 7 + torch.arange(shape.length)
    q, k = (x.requires_grad_() for x in inputs(shape, dtype))
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    incoming = seeds(shape, dtype)
    freq = frequencies(shape.r).requires_grad_()
    table = RotaryTable.from_frequencies(freq, length=200, amplitude=1.2, dtype=table_dtype(dtype))
    *actual, dfreq = torch.autograd.grad(apply_rotary(q, k, table, offset=7), (q, k, freq), incoming)
    in_dtype = torch.autograd.grad([rotate(x, freq, positions, 1.2) for x in (q, k)], (q, k), incoming)
    rotated = [rotate(x, freq, positions, 1.2) for x in wide]
    *truth, dfreq_truth = torch.autograd.grad(rotated, (*wide, freq), [dy.double() for dy in incoming])
    for arguments in zip(actual, in_dtype, truth, strict=True):
        assert_close(*arguments)
    pairs = [y[..., : 2 * shape.r] for y in rotated]
    noise = dfreq_noise(pairs, tuple(dy[..., : 2 * shape.r] for dy in incoming), positions)
    # heads share a token's row of the table, so their errors are not all independent; fp64 is no truth for itself.
    eps = max(torch.finfo(dtype).eps, 1e-13)
    assert ((dfreq - dfreq_truth).abs() <= 4 * eps * noise).all()


@pytest.mark.parametrize("offset", [0, 100_000])
def test_dfreq_is_as_exact_far_out_as_at_the_start(offset: int) -> None:
    shape = Shape(1, 1024, 4, 2, 64, 32)
    q, k = inputs(shape, torch.float32)
    freq = frequencies(shape.r).requires_grad_()
    table = RotaryTable.from_frequencies(freq, length=offset + shape.length)
    incoming = seeds(shape, torch.float32)
    (actual,) = torch.autograd.grad(apply_rotary(q, k, table, offset=offset), freq, incoming)
    positions = offset + torch.arange(shape.length)
    rotated = [rotate(x.double(), freq, positions) for x in (q, k)]
    (truth,) = torch.autograd.grad(rotated, freq, [dy.double() for dy in incoming])
    noise = dfreq_noise(rotated, incoming, positions)
    assert ((actual - truth).abs() <= 4 * torch.finfo(torch.float32).eps * noise).all()
    assert (actual - truth).abs().max() < 1e-6 * truth.abs().max()


def test_stack_gradients_go_to_the_tables_used() -> None:
    shape = Shape(3, 70, 4, 2, 64, 32)
    q, k = inputs(shape, torch.float64)
    factors = torch.arange(1, 5, dtype=torch.float64)
    freq = (frequencies(shape.r) / factors[:, None]).requires_grad_()
    positions = torch.rand(4, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).cumsum(1)
    index = torch.tensor([3, 0, 3])
    stack = RotaryTableStack.from_frequencies(freq, factors, positions=positions, index=index, dtype=torch.float64)
    incoming = seeds(shape, torch.float64)
    (actual,) = torch.autograd.grad(apply_rotary(q, k, stack), freq, incoming)
    (truth,) = torch.autograd.grad([rotate(x, freq[index], positions[index]) for x in (q, k)], freq, incoming)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-9)
    assert not actual[[1, 2]].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck(inplace: bool) -> None:
    shape = Shape(2, 3, 2, 1, 6, 2)
    q, k = (x.requires_grad_() for x in inputs(shape, torch.float64))
    ids = torch.tensor([[3, 66, 5]])

    def rotated(q: Tensor, k: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
        table = RotaryTable.from_frequencies(freq, length=128, amplitude=1.1, dtype=torch.float64)
        return apply_rotary(q * 1, k * 1, table, position_ids=ids, offset=2, inplace=inplace)

    assert torch.autograd.gradcheck(rotated, (q, k, frequencies(shape.r).requires_grad_()))


@pytest.mark.parametrize("wanted", ["q", "k", "freq"])
def test_one_gradient_alone(wanted: str) -> None:
    shape = Shape(1, 6, 2, 1, 8, 4)
    q, k = inputs(shape, torch.float64)
    tensors = {"q": q, "k": k, "freq": frequencies(shape.r)}
    tensors[wanted].requires_grad_()
    table = RotaryTable.from_frequencies(tensors["freq"], length=64, dtype=torch.float64)
    q_out, k_out = apply_rotary(q, k, table)
    outputs = {"q": [q_out], "k": [k_out], "freq": [q_out, k_out]}[wanted]
    incoming = [torch.randn_like(x) for x in outputs]
    (actual,) = torch.autograd.grad(outputs, tensors[wanted], incoming)
    sources = {"q": [q], "k": [k], "freq": [q, k]}[wanted]
    expected = [rotate(x, tensors["freq"], torch.arange(6)) for x in sources]
    (truth,) = torch.autograd.grad(expected, tensors[wanted], incoming)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


def test_gradient_of_k_alone_reaches_freq() -> None:
    shape = Shape(1, 6, 2, 1, 8, 4)
    q, k = inputs(shape, torch.float64)
    freq = frequencies(shape.r).requires_grad_()
    table = RotaryTable.from_frequencies(freq, length=64, dtype=torch.float64)
    _, k_out = apply_rotary(q, k, table)
    # the gradient of a sum has stride 0 in every dimension.
    k_out.sum().backward()
    (truth,) = torch.autograd.grad(rotate(k, freq, torch.arange(6)).sum(), freq)
    torch.testing.assert_close(freq.grad, truth, rtol=1e-12, atol=1e-12)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    shape = Shape(2, 700, 8, 2, 64, 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q, k = (x.requires_grad_() for x in inputs(shape, torch.bfloat16))
            freq = frequencies(shape.r).requires_grad_()
            table = RotaryTable.from_frequencies(freq, length=700)
            rotated = apply_rotary(q, k, table)
            results.append((*rotated, *torch.autograd.grad(rotated, (q, k, freq), seeds(shape, torch.bfloat16))))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            assert torch.equal(x, y)


def test_large_output_written_around_the_cache_is_complete() -> None:
    # 20 MB, over the size from which stores bypass the cache; D of 66 bf16 is no multiple of 16 bytes.
    for shape in (Shape(1, 1300, 32, 32, 66, 33), Shape(1, 1300, 32, 8, 128, 64)):
        q, k = inputs(shape, torch.bfloat16)
        table = RotaryTable.from_frequencies(frequencies(shape.r), length=shape.length)
        poisoned = torch.full_like(q, float("nan")), torch.full_like(k, float("nan"))
        apply_rotary(q, k, table, out=poisoned)
        halves = [apply_rotary(q[:, :, i::4], None, table)[0] for i in range(4)]
        for i, half in enumerate(halves):
            assert torch.equal(poisoned[0][:, :, i::4], half)
        assert torch.equal(poisoned[1], apply_rotary(k, None, table)[0])
