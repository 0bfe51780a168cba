"""How qkv_rotary may be called: compiled, under autocast, checkpointed, by either backend, and wrongly."""

import ctypes
import functools
from typing import Any

import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clex_kernels import reference
from clex_kernels.qkv_rotary import FEW_TOKENS, _qkv_rotary_cuda, _QkvRotary, choose_backend, qkv_rotary
from clex_kernels.qkv_rotary_checks import KEYS
from clex_kernels.tables import RotaryTable, RotaryTableStack

B, L, C, H, G, D, R = 2, 9, 20, 4, 2, 16, 8
ROWS = (H * D, G * D, G * D)
FREQ = 10000.0 ** (-torch.arange(R, dtype=torch.float64) / R)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_table(freq: Tensor = FREQ, dtype: torch.dtype = torch.float32) -> RotaryTable:
    return RotaryTable.from_frequencies(freq, length=128, dtype=dtype)


def leaves(length: int = L, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias and freq."""
    made = draw(B, length, C, dtype=dtype), draw(sum(ROWS), C, seed=1, dtype=dtype) / C**0.5, draw(sum(ROWS), seed=2)
    return *(part.to(dtype).requires_grad_() for part in made), FREQ.clone().requires_grad_()


def step(x: Tensor, weight: Tensor, bias: Tensor, table: RotaryTable, offset: int = 0, keys: str = "rotated") -> Tensor:
    q, k, v, *raw = qkv_rotary(x * 2, weight, table, H, G, bias, offset, keys)
    return sum((out * out.cos()).sum() for out in (q, k, v, *raw))


def gradients_of(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * max(its.abs().max().item(), 1))


@functools.cache
def make_table_once() -> RotaryTable:
    return make_table()


class Counters(ctypes.Structure):
    """What mallinfo2 returns; the eighth is the bytes in use."""

    _fields_ = (("values", ctypes.c_size_t * 10),)


def allocated() -> int:
    """Bytes that the C library has given out."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("the C library has no mallinfo2")
    library.mallinfo2.restype = Counters
    return library.mallinfo2().values[7]


@pytest.mark.parametrize("keys", ["rotated", "raw", "both"])
def test_compiled_steps_over_many_lengths_compile_at_most_twice(keys: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for length in range(5, 20):
        found = []
        for function in (compiled, step):
            x, weight, bias, freq = leaves(length)
            loss = function(x, weight, bias, make_table(freq), length - 5, keys)
            found.append(gradients_of(loss, (x, weight, bias, freq)))
        assert_close(*found)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keys", ["rotated", "both"])
def test_compiled_by_inductor(keys: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    found = []
    for function in (compiled, step):
        x, weight, bias, freq = leaves()
        found.append(gradients_of(function(x, weight, bias, make_table(freq), 3, keys), (x, weight, bias, freq)))
    assert_close(*found)
    with torch.no_grad():
        x, weight, bias, _ = leaves()
        assert_close((compiled(x, weight, bias, make_table()),), (step(x, weight, bias, make_table()),))


def test_three_weights_compiled() -> None:
    torch._dynamo.reset()

    def three(x: Tensor, weight: Tensor, bias: Tensor, freq: Tensor) -> Tensor:
        return step(x, weight.split(ROWS), bias.split(ROWS), make_table(freq))

    found = []
    for function in (torch.compile(three, fullgraph=True, backend="aot_eager"), three):
        inputs = leaves()
        found.append(gradients_of(function(*inputs), inputs))
    assert_close(*found)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_autocast_keeps_master_weights_in_fp32(activations: torch.dtype, parts: int) -> None:
    x, weight, bias, freq = leaves()
    x = x.detach().to(activations).requires_grad_()
    given = (weight, bias) if parts == 1 else (weight.split(ROWS), bias.split(ROWS))
    with torch.autocast("cpu", torch.bfloat16):
        outs = qkv_rotary(x, given[0], make_table(freq), H, G, given[1])
    assert {out.dtype for out in outs} == {torch.bfloat16}
    cast = [part.detach().bfloat16() for part in (x, weight, bias)]
    truth = written_out(*(part.double() for part in cast), torch.arange(L))
    for out, its, exact in zip(outs, written_out(*cast, torch.arange(L)), truth, strict=True):
        assert_within_rule(out, its, exact)
    # a rotation keeps lengths: a sum of squares would leave dfreq at 0.
    found = gradients_of(sum(out.float().cos().sum() for out in outs), (x, weight, bias, freq))
    assert [gradient.dtype for gradient in found] == [activations, torch.float32, torch.float32, torch.float64]
    assert all(gradient.abs().max() > 0 for gradient in found)


def written_out(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    heads = functional.linear(x, weight, bias).unflatten(-1, (-1, D))
    q, k, v = heads.split((H, G, G), dim=2)
    cos, sin = (table.to(x.dtype) for table in reference.tables(FREQ, positions))
    return reference.rotary(q, cos, sin), reference.rotary(k, cos, sin), v


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        inputs = leaves()

        def layer(x: Tensor, weight: Tensor, bias: Tensor, freq: Tensor) -> Tensor:
            return step(x, weight, bias, make_table(freq))

        loss = checkpoint(layer, *inputs, use_reentrant=reentrant) if checkpointed else layer(*inputs)
        loss.backward()
        found.append([leaf.grad for leaf in inputs])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_gradients_that_come_in_are_left_alone() -> None:
    x, weight, bias, freq = leaves()
    outs = qkv_rotary(x, weight, make_table(freq), H, G, bias)
    incoming = [torch.ones_like(out) for out in outs]
    torch.autograd.backward(outs, incoming)
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in incoming)


def test_second_and_forward_mode_derivatives_are_refused() -> None:
    x, weight, bias, freq = leaves()
    (gradient,) = torch.autograd.grad(step(x, weight, bias, make_table(freq)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="qkv_rotary: has no forward-mode derivatives"):
        torch.func.jvp(lambda x: qkv_rotary(x, weight, make_table(), H, G)[0], (x,), (x,))


def test_only_what_gradients_need_is_kept() -> None:
    x, weight, bias, _ = leaves()
    for needed, changed in ((x, x), (weight, weight), (bias, x)):
        operands = [part.detach().requires_grad_(part is needed) * 1 for part in (x, weight, bias)]
        outs = qkv_rotary(operands[0], operands[1], make_table(), H, G, operands[2])
        with torch.no_grad():
            operands[0 if changed is x else 1].add_(1)
        sum(out.sum() for out in outs).backward()


def test_calls_leak_no_memory() -> None:
    x, weight, bias, _ = (leaf.detach() for leaf in leaves())
    before = []
    for _ in range(2):
        for _ in range(2000):
            qkv_rotary(x, weight, make_table_once(), H, G, bias, keys="both")
        before.append(allocated())
    assert before[1] - before[0] < 16 * 2000


def test_inference_mode() -> None:
    x, weight, bias, _ = (leaf.detach() for leaf in leaves())
    expected = qkv_rotary(x, weight, make_table(), H, G, bias)
    with torch.inference_mode():
        for mine, its in zip(qkv_rotary(x, weight, make_table(), H, G, bias), expected, strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("keys", ["rotated", "raw", "both"])
def test_meta_and_fake_tensors(keys: str) -> None:
    x, weight, _, _ = (leaf.detach() for leaf in leaves())
    real = qkv_rotary(x, weight, make_table(), H, G, keys=keys)
    with FakeTensorMode() as mode:
        table = make_table(torch.rand(R, dtype=torch.float64))
        fake = qkv_rotary(mode.from_tensor(x), mode.from_tensor(weight), table, H, G, keys=keys)
    for mine, its in zip(fake, real, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (its.shape, its.stride(), its.dtype)


def operator_arguments(keys: str = "rotated", parts: int = 1) -> tuple[Any, ...]:
    x, weight, bias, _ = leaves()
    stack = RotaryTableStack.from_frequencies(
        FREQ / torch.tensor([[1.0], [2.0]]).double(), torch.tensor([1.0, 2.0]).double(), length=128
    )
    weights = (weight, None, None, bias, None, None)
    if parts == 3:
        weights = tuple(part.detach().clone().requires_grad_() for y in (weight, bias) for part in y.split(ROWS))
    positions, ids = torch.arange(128, dtype=torch.float64).expand(2, -1).contiguous(), torch.arange(L)[None]
    tables = (stack.freq.clone().requires_grad_(), stack.coarse, stack.fine, positions, torch.tensor([1, 0]), ids)
    return (x, *weights, *tables, 3, H, G, *KEYS[keys], False)


@pytest.mark.parametrize(("keys", "parts"), [("rotated", 1), ("raw", 3), ("both", 1)])
def test_opcheck(keys: str, parts: int) -> None:
    torch.library.opcheck(torch.ops.clex.qkv_rotary.default, operator_arguments(keys, parts))


def test_the_operator_has_the_gradients_of_the_function() -> None:
    arguments = operator_arguments("both")
    wanted = [y for y in arguments if isinstance(y, Tensor) and y.requires_grad]
    found = []
    for run in (torch.ops.clex.qkv_rotary, _QkvRotary.apply):
        outs = run(*arguments)
        if len(outs) == 2:
            qkv, k_rotated = outs
            q, k, v = qkv.split((H, G, G), dim=2)
            outs = (q, k_rotated, v, k)
        found.append(gradients_of(sum((out * out.cos()).sum() for out in outs), wanted))
    assert_close(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_on_gpu runs it for real")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("keys", ["rotated", "raw", "both"])
def test_both_backends_for_cuda_agree_with_the_cpu(keys: str, parts: int) -> None:
    pytest.importorskip("triton")
    from interpreter import interpreted

    *arguments, _ = operator_arguments(keys, parts)
    # no operand needs unit stride in C.
    arguments[:7] = (y if y is None else y.detach().repeat_interleave(2, -1)[..., ::2] for y in arguments[:7])
    with interpreted(), torch.no_grad():
        expected = torch.ops.clex.qkv_rotary(*arguments, False)
        for fused in (True, False):
            for mine, its in zip(_qkv_rotary_cuda(*arguments, fused), expected, strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


class Device:
    """Stands in for a tensor on a GPU of a compute capability, as far as the choice of a backend looks."""

    def __init__(self, dtype: torch.dtype, tokens: int):
        self.dtype, self.shape, self.device = dtype, (1, tokens, 4096), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "backend"),
    [
        ((9, 0), torch.bfloat16, 1, "triton"),
        ((9, 0), torch.float16, FEW_TOKENS, "triton"),
        ((9, 0), torch.bfloat16, FEW_TOKENS + 1, "linear"),
        ((10, 0), torch.bfloat16, 4096, "linear"),
        ((8, 0), torch.bfloat16, 4096, "triton"),
        ((12, 0), torch.bfloat16, 4096, "triton"),
        ((8, 0), torch.float32, 1, "linear"),
    ],
)
def test_the_backend_is_chosen_by_device_dtype_and_tokens(
    capability: tuple[int, int], dtype: torch.dtype, tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_backend(Device(dtype, tokens)) == backend


def test_the_cpu_and_amd_multiply_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(draw(1, 1, C).bfloat16()) == "linear"
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert choose_backend(Device(torch.bfloat16, 1)) == "linear"


X, WEIGHT, BIAS, TABLE = draw(B, L, C), draw(sum(ROWS), C), draw(sum(ROWS)), make_table()
PARTS = WEIGHT.split(ROWS)
WIDE = RotaryTable.from_frequencies(torch.ones(D, dtype=torch.float64), length=128)


def call(
    x: Any = X, weight: Any = WEIGHT, table: Any = TABLE, heads: Any = H, groups: Any = G, bias: Any = None, **rest: Any
) -> None:
    qkv_rotary(x, weight, table, heads, groups, bias, **rest)


BAD = {
    "x-type": (TypeError, "x: expected a tensor, got list", {"x": [1.0]}),
    "x-dims": (ValueError, r"x: expected shape \[B, L, C\], C at least 1, got \[9, 20\]", {"x": X[0]}),
    "x-empty": (
        ValueError,
        r"x: expected shape \[B, L, C\], C at least 1, got \[2, 9, 0\]",
        {"x": X[..., :0], "weight": WEIGHT[:, :0]},
    ),
    "x-width": (
        ValueError,
        r"x: expected shape \[B, L, C\] with C = 20 as weight's, got \[2, 9, 19\]",
        {"x": X[..., 1:]},
    ),
    "x-dtype": (TypeError, "x: expected float32.*got torch.int64", {"x": X.long()}),
    "weight-type": (TypeError, "weight: expected a tensor, got Linear", {"weight": nn.Linear(C, sum(ROWS))}),
    "weight-rows": (
        ValueError,
        r"weight: expected shape \[\(H \+ 2G\) D, C\], \(H \+ 2G\) D = 8 D rows, got \[127, 20\]",
        {"weight": WEIGHT[1:]},
    ),
    "weight-dims": (ValueError, r"weight: expected shape .*got \[8, 16, 20\]", {"weight": WEIGHT.view(8, 16, C)}),
    "weight-dtype": (
        ValueError,
        "weight: expected x's dtype torch.float32, got torch.bfloat16",
        {"weight": WEIGHT.bfloat16()},
    ),
    "weight-count": (ValueError, r"weight: expected one tensor or those of \(q, k, v\), got 2", {"weight": PARTS[:2]}),
    "weight-k-rows": (
        ValueError,
        r"weight\[1\] \(k\): expected shape \[G D, C\] = \[32, 20\], got \[64, 20\]",
        {"weight": (PARTS[0], PARTS[0], PARTS[2])},
    ),
    "weight-q-rows": (
        ValueError,
        r"weight\[0\] \(q\): expected .*H D = 4 D rows, got \[63, 20\]",
        {"weight": (PARTS[0][1:], *PARTS[1:])},
    ),
    "weight-v-width": (ValueError, r"weight\[2\] \(v\)", {"weight": (*PARTS[:2], PARTS[2][:, 1:])}),
    "bias-length": (ValueError, r"bias: expected shape \[\(H \+ 2G\) D\] = \[128\], got \[64\]", {"bias": BIAS[:64]}),
    "bias-part": (
        TypeError,
        r"bias\[0\] \(q\): expected a tensor, got NoneType",
        {"weight": PARTS, "bias": (None, *PARTS[1:])},
    ),
    "weight-part": (TypeError, r"weight\[1\] \(k\): expected a tensor, got NoneType", {"weight": (WEIGHT, None, None)}),
    "bias-form": (ValueError, "bias: expected one tensor where weight is one", {"bias": BIAS.split(ROWS)}),
    "bias-type": (TypeError, "bias: expected a tensor, got float", {"bias": 1.0}),
    "bias-dtype": (ValueError, "bias: expected x's dtype torch.float32, got torch.float64", {"bias": BIAS.double()}),
    "bias-device": (ValueError, "bias: expected on x's device cpu, got meta", {"bias": BIAS.to("meta")}),
    "heads-type": (TypeError, "num_heads: expected an int, got float", {"heads": 4.0}),
    "heads": (ValueError, "num_heads: expected at least 1, got 0", {"heads": 0}),
    "groups": (ValueError, "num_kv_heads: expected G to divide H = 4, got 3", {"groups": 3}),
    "table-type": (TypeError, "table: expected a RotaryTable", {"table": TABLE.coarse}),
    "table-dim": (ValueError, "table: expected a rotary dimension 2R of at most D=16, got 32", {"table": WIDE}),
    "table-dtype": (TypeError, "table: expected dtype torch.float32", {"table": make_table(dtype=torch.float64)}),
    "offset": (
        ValueError,
        "offset: expected offset . L to stay within the table's 128 positions, got 120 . 9",
        {"offset": 120},
    ),
    "keys": (ValueError, "keys: expected one of 'rotated', 'raw', 'both', got 'none'", {"keys": "none"}),
    "backend": (ValueError, "backend: expected one of 'auto', 'triton', 'linear', got 'cublas'", {"backend": "cublas"}),
    "backend-cpu": (ValueError, "backend: expected 'auto' or 'linear' on the CPU, got 'triton'", {"backend": "triton"}),
    "ids": (ValueError, r"position_ids: expected positions in \[0, 128\)", {"position_ids": torch.full((1, L), 128)}),
}


@pytest.mark.parametrize(("error", "match", "arguments"), BAD.values(), ids=BAD)
def test_bad_input_is_named(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        call(**arguments)
