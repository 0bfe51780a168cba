"""How attention may be called: compiled, checkpointed, under autocast, by its operators, and wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from clex_kernels.attention import _attention_bwd_cuda, _attention_cuda, attention
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.tables import RotaryTable, RotaryTableStack

B, L, H, G, D, R = 2, 9, 4, 2, 24, 8
FREQ = 10000.0 ** (-torch.arange(R, dtype=torch.float64) / R)


def inputs(dtype: torch.dtype = torch.float32, queries: int = L, keys: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries, H), (keys or queries, G), (keys or queries, G))
    return [torch.randn(B, tokens, heads, D, generator=generator).to(dtype) for tokens, heads in sizes]


def make_table(freq: Tensor = FREQ, length: int = 128, **settings: Any) -> RotaryTable:
    return RotaryTable.from_frequencies(freq, length=length, **settings)


def make_stack(factors: int = 4, **settings: Any) -> RotaryTableStack:
    t = torch.arange(1, factors + 1, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(FREQ / t[:, None], t, length=128, **settings)


def backward(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "freq", "v and freq"])
def test_only_what_requires_grad_gets_one(wanted: str) -> None:
    found = []
    for names in (wanted.split(" and "), ["q", "k", "v", "freq"]):
        leaves = dict(zip("qkv", inputs(), strict=True)) | {"freq": FREQ.clone()}
        for name in names:
            leaves[name].requires_grad_()
        *q_k_v, freq = leaves.values()
        attention(*q_k_v, make_table(freq), is_causal=True).square().sum().backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [x for x in leaves if x in names]
        found.append([leaves[name].grad for name in wanted.split(" and ")])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_a_table_that_turns_nothing_here_learns_nothing() -> None:
    q, k, v = inputs()
    assert not attention(q, k, v, make_table(FREQ.clone().requires_grad_()), rotated="qk").requires_grad


@pytest.mark.parametrize("parts", ["out", "lse", "both"])
def test_gradients_may_be_expanded_scalars_or_missing(parts: str) -> None:
    found = []
    for ones in (torch.ones_like, lambda x: torch.ones((), dtype=x.dtype).expand_as(x)):
        leaves = [*(x.requires_grad_() for x in inputs()), FREQ.clone().requires_grad_()]
        outputs = attention(*leaves[:3], make_table(leaves[3]), is_causal=True, return_lse=True)
        outputs = {"out": outputs[:1], "lse": outputs[1:], "both": outputs}[parts]
        found.append(
            torch.autograd.grad(outputs, leaves, [ones(x) for x in outputs], allow_unused=True, materialize_grads=True)
        )
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
    # the lse does not know of v.
    assert found[0][2].any() == (parts != "lse")


def test_backward_leaves_incoming_gradients_alone() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    outputs = attention(q, k, v, make_table(FREQ.clone().requires_grad_()), return_lse=True)
    incoming = [torch.ones_like(x) for x in outputs]
    torch.autograd.backward(outputs, incoming)
    assert all(torch.equal(x, torch.ones_like(x)) for x in incoming)


@pytest.mark.parametrize("written", ["out", "v", "k", "q"])
def test_writing_to_what_backward_needs_is_noticed(written: str) -> None:
    q, k, v = (x.requires_grad_() * 1 for x in inputs())
    out = attention(q, k, v, make_table(), rotated="k")
    loss = out.sum()
    with torch.no_grad():
        {"out": out, "v": v, "k": k, "q": q}[written].zero_()
    if written == "q":
        # it was rotated here, and that is what is kept.
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivative_is_refused(compiled: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(attention, backend="eager") if compiled else attention
    q, k, v = (x.requires_grad_() for x in inputs())
    (gradient,) = torch.autograd.grad(function(q, k, v, make_table()).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
        out, lse = attention(q * 2, k * 2, v, make_table(freq), is_causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    found = []
    for checkpointed in (False, True):
        leaves = [*(x.requires_grad_() for x in inputs()), FREQ.clone().requires_grad_()]
        loss = checkpoint(layer, *leaves, use_reentrant=reentrant) if checkpointed else layer(*leaves)
        found.append(backward(loss, leaves))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_without_gradients_nothing_is_kept() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    table = make_table(FREQ.clone().requires_grad_())
    expected = attention(q, k, v, table)
    with torch.no_grad():
        out = attention(q, k, v, table)
        assert torch.equal(out, expected)
        assert not out.requires_grad
    with torch.inference_mode():
        q, k, v = (x.clone() for x in (q, k, v))
        assert torch.equal(attention(q, k, v, make_table()), expected)


@pytest.mark.parametrize(("dtype", "saves"), [(torch.float32, False), (torch.bfloat16, False), (torch.float64, True)])
def test_autocast_is_as_for_torch_s_attention(dtype: torch.dtype, saves: bool) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(dtype))
    table = make_table(dtype=torch.promote_types(dtype, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, table, is_causal=True)
        theirs = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    assert out.dtype == theirs.dtype == (dtype if saves else torch.bfloat16)
    rounded = (q, k, v) if saves else [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, attention(*rounded, table, is_causal=True))
    assert {x.dtype for x in torch.autograd.grad(out.sum(), (q, k, v))} == {dtype}


def operator_arguments(name: str, requires_grad: bool = False) -> tuple[Any, ...]:
    """Of clex::attention, with no tensor that could be missing, with all of them, or packed."""
    q, k, v = inputs(queries=L, keys=2 * L)
    if name == "bare":
        stack, tokens, rule = make_stack(1), Tokens(q_offset=12, k_offset=3), Rule(0.2)
    elif name == "full":
        stack = make_stack(index=torch.tensor([2, 0]))
        starts, ends = torch.tensor([0, 4]), torch.tensor([18, 15])
        offsets = torch.tensor([12, 9]), torch.tensor([3, 0])
        tokens = Tokens(None, None, starts, ends, torch.tensor([40, 7]), *offsets)
        rule = Rule(0.2, True, 5, 3.0, 2.5, True)
    else:
        q, k, v = (x[:1] for x in (q, k, v))
        stack = make_stack(index=torch.tensor([1, 1, 3]))
        tokens, rule = Tokens(torch.tensor([0, 2, 2, 9]), torch.tensor([0, 5, 6, 17])), Rule(0.2, True)
    freq, positions = stack.freq.clone(), torch.arange(128.0).double().expand(len(stack.freq), -1).contiguous()
    if requires_grad:
        q, k, v, freq = (x.requires_grad_() for x in (q, k, v, freq))
    tables = Tables(stack.coarse, stack.fine, positions if name == "full" else None, stack.index)
    if name == "bare":
        tables = tables._replace(index=None)
    return q, k, v, freq, *tables, *tokens, *rule, True, name != "packed", True


def backward_arguments(name: str) -> tuple[Any, ...]:
    q, k, v, freq, *rest = operator_arguments(name)
    out, lse, q_rotated, k_rotated = torch.ops.clex.attention(q, k, v, freq, *rest)
    dlse = torch.ones_like(lse) if name == "full" else None
    return torch.ones_like(out), dlse, q_rotated, k_rotated if k_rotated.numel() else k, v, out, lse, *rest


names = pytest.mark.parametrize("name", ["bare", "full", "packed"])


@names
def test_opcheck(name: str) -> None:
    forward, gradient = torch.ops.clex.attention.default, torch.ops.clex.attention_bwd.default
    torch.library.opcheck(forward, operator_arguments(name, requires_grad=True))
    torch.library.opcheck(forward, (*operator_arguments(name)[:-1], False))
    torch.library.opcheck(gradient, backward_arguments(name))
    torch.library.opcheck(gradient, (*backward_arguments(name)[:-1], False))


def test_the_operator_alone_must_be_told_to_save() -> None:
    with pytest.raises(RuntimeError, match="save=True where gradients are wanted"):
        torch.ops.clex.attention(*operator_arguments("bare", requires_grad=True)[:-1], False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_attention_kernel launches these for real")
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@names
def test_operators_for_cuda_agree_with_those_for_the_cpu(name: str) -> None:
    pytest.importorskip("triton")
    from interpreter import interpreted

    with interpreted(), torch.no_grad():
        for last in (True, False):
            arguments = (*operator_arguments(name)[:-1], last)
            for x, y in zip(_attention_cuda(*arguments), torch.ops.clex.attention(*arguments), strict=True):
                assert x.shape == y.shape
                assert x.stride() == y.stride()
            assert_close(_attention_cuda(*arguments)[:2], torch.ops.clex.attention(*arguments)[:2])
            arguments = (*backward_arguments(name)[:-1], last)
            assert_close(_attention_bwd_cuda(*arguments), torch.ops.clex.attention_bwd(*arguments))


def test_forward_mode_is_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: attention(x, k, v, make_table()), (q,), (q,))


def test_meta_and_fake_tensors() -> None:
    with FakeTensorMode():
        q, k, v = inputs(torch.bfloat16)
        stack = stack_of(torch.rand(R, dtype=torch.float64), 128)
        bounds = torch.tensor([0, 4, 9])
        out, lse = attention(q[0], k[0], v[0], stack, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True)
        assert (out.shape, out.dtype) == ((L, H, D), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((H, L), torch.float32)
    q, k, v, table = tree_map_only(Tensor, lambda x: x.to("meta"), (*inputs(), make_table()))
    out, lse = attention(q, k, v, table, return_lse=True)
    assert out.shape == (B, L, H, D)
    assert lse.shape == (B, H, L)


def step(q: Tensor, k: Tensor, v: Tensor, table: RotaryTable, **options: Any) -> Tensor:
    outputs = attention(q * 2, k * 2, v, table, **options)
    return sum(x.masked_fill(x == -torch.inf, 0.0).square().sum() for x in outputs)


def stack_of(freq: Tensor, length: int) -> RotaryTableStack:
    t = torch.arange(1.0, 5.0).double()
    return RotaryTableStack.from_frequencies(freq / t[:, None], t, length=128, train_length=8)


MANY = {
    "causal": lambda length: {"is_causal": True},
    "offsets": lambda length: {"is_causal": True, "q_offset": length + 4, "k_offset": length - 5},
    "left padding": lambda length: {"window": 5, "kv_start": torch.tensor([0, length - 4]), "return_lse": True},
    "by sdpa": lambda length: {"is_causal": True, "backend": "sdpa"},
}


@pytest.mark.parametrize("options", MANY.values(), ids=MANY.keys())
def test_compiled_step_over_many_lengths_compiles_at_most_twice(options: Callable[[int], dict[str, Any]]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for length in range(7, 24):
        found = []
        for function in (compiled, step):
            leaves = [*(x.requires_grad_() for x in inputs(queries=length)), FREQ.clone().requires_grad_()]
            table = (stack_of if "kv_start" in options(length) else make_table)(leaves[3], length=128)
            found.append(backward(function(*leaves[:3], table, **options(length)), leaves))
        assert_close(*found)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("keys", [L, 2 * L])
def test_compiled_by_inductor(keys: int) -> None:
    torch._dynamo.reset()
    found = []
    for function in (torch.compile(step, fullgraph=True), step):
        leaves = [*(x.requires_grad_() for x in inputs(keys=keys)), FREQ.clone().requires_grad_()]
        found.append(backward(function(*leaves[:3], make_table(leaves[3]), is_causal=True, return_lse=True), leaves))
    assert_close(*found)


Q, K, V = inputs()
INTS = torch.tensor([3, 9])


def call(q: Tensor = Q, k: Tensor = K, v: Tensor = V, table: Any = None, **options: Any) -> Any:
    return attention(q, k, v, make_table() if table is None else table, **options)


def packed(queries: Any, keys: Any, **options: Any) -> Any:
    queries, keys = (torch.tensor(x) if isinstance(x, list) else x for x in (queries, keys))
    return attention(Q[:1], K[:1], V[:1], make_table(), cu_seqlens_q=queries, cu_seqlens_k=keys, **options)


ODD = torch.randn(B, L, G, 2 * D)[..., ::2]
BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "q-list": (TypeError, "q: expected a tensor, got list", lambda: call([1.0])),
    "v-none": (TypeError, "v: expected a tensor, got NoneType", lambda: call(v=None)),
    "q-integer": (TypeError, "q: .*got torch.int64", lambda: call(Q.long(), K.long(), V.long())),
    "q-2d": (ValueError, r"q: expected shape \[B, L, H, D\], got \[9, 24\]", lambda: call(Q[0, :, 0])),
    "q-flat": (ValueError, r"q: expected shape \[B, L, H, D\], got \[9, 4, 24\]", lambda: call(Q[0])),
    "q-empty": (ValueError, "q: expected D of at least 1", lambda: call(Q[..., :0], K[..., :0], V[..., :0])),
    "k-dtype": (ValueError, "k: expected q's dtype torch.float32, got torch.float64", lambda: call(k=K.double())),
    "v-dtype": (ValueError, "v: .*must not mix dtypes", lambda: call(v=V.bfloat16())),
    "k-device": (ValueError, "k: expected on q's device cpu, got meta", lambda: call(k=K.to("meta"))),
    "k-batch": (ValueError, r"k: expected shape \[B=2, S, G, D=24\], got \[1, 9", lambda: call(k=K[:1])),
    "k-dim": (ValueError, r"k: expected shape \[B=2, S, G, D=24\]", lambda: call(k=K[..., :8])),
    "v-tokens": (ValueError, r"v: expected shape k's \[2, 9, 2, 24\], got \[2, 8", lambda: call(v=V[:, :8])),
    "v-heads": (ValueError, "v: expected shape k's", lambda: call(v=V[:, :, :1])),
    "heads": (ValueError, "H to be a multiple of G=2, got H=3", lambda: call(Q[:, :, :3])),
    "no-heads": (ValueError, "H to be a multiple of G=0", lambda: call(k=K[:, :, :0], v=V[:, :, :0])),
    "q-strided": (ValueError, "q: expected unit stride in D", lambda: call(ODD)),
    "k-strided": (ValueError, "k: expected unit stride in D", lambda: call(k=ODD)),
    "v-strided": (ValueError, "v: expected unit stride in D", lambda: call(v=ODD)),
    "mask": (ValueError, "attn_mask: not supported", lambda: call(attn_mask=torch.ones(L, L))),
    "dropout": (ValueError, "dropout_p: not supported, expected 0, got 0.1", lambda: call(dropout_p=0.1)),
    "interleaved": (ValueError, "interleaved: not supported", lambda: call(interleaved=True)),
    "cu-alone": (ValueError, "expected both or neither", lambda: call(cu_seqlens_q=INTS)),
    "cu-type": (TypeError, "cu_seqlens_k: .* got torch.float32", lambda: packed([0, 9], torch.tensor([0.0, 9.0]))),
    "cu-int": (TypeError, "cu_seqlens_q: .* got int", lambda: packed(9, 9)),
    "cu-0d": (ValueError, r"cu_seqlens_q: expected shape \[B \+ 1\]", lambda: packed(INTS[1], INTS[1])),
    "cu-lengths": (ValueError, r"cu_seqlens_k: expected shape \[2\]", lambda: packed([0, 9], [0, 4, 9])),
    "cu-start": (ValueError, "cu_seqlens_q: expected bounds that start at 0", lambda: packed([1, 9], [0, 9])),
    "cu-order": (ValueError, r"cu_seqlens_k: .*got \[0, 6, 5\]", lambda: packed([0, 4, 9], [0, 6, 5])),
    "cu-past": (ValueError, r"cu_seqlens_k: expected bounds up to N = 9 .*got 10", lambda: packed([0, 9], [0, 10])),
    "cu-batch": (ValueError, r"q: expected \[N, H, D\]", lambda: call(cu_seqlens_q=INTS, cu_seqlens_k=INTS)),
    "cu-kv-end": (ValueError, "kv_end: expected None with", lambda: packed([0, 9], [0, 9], kv_end=INTS[:1])),
    "window": (ValueError, "window: expected at least 1 token", lambda: call(window=0)),
    "window-type": (TypeError, "window: expected an int, got tuple", lambda: call(window=(3, 0))),
    "causal-type": (TypeError, "is_causal: expected a bool, got int", lambda: call(is_causal=1)),
    "scale": (ValueError, "scale: expected a finite number > 0, got 0", lambda: call(scale=0.0)),
    "scale-nan": (ValueError, "scale: expected a finite number > 0, got nan", lambda: call(scale=float("nan"))),
    "softcap": (ValueError, "softcap: expected a finite number > 0, got -1", lambda: call(softcap=-1.0)),
    "softcap-type": (TypeError, "softcap: expected a number, got bool", lambda: call(softcap=True)),
    "table-type": (TypeError, "table: expected a RotaryTable", lambda: call(table=FREQ)),
    "table-short": (
        ValueError,
        r"k_offset \+ S = 67, got one of 64",
        lambda: call(table=make_table(length=60), k_offset=58),
    ),
    "table-packed": (ValueError, r"all keys, k_offset \+ S = 129", lambda: packed([0, 2, 9], [0, 4, 9], k_offset=124)),
    "table-dtype": (TypeError, "table: expected dtype torch.float64", lambda: call(*(x.double() for x in (Q, K, V)))),
    "no-index": (ValueError, r"needs an index \[B=2\]", lambda: call(table=make_stack())),
    "q-offset-past": (ValueError, r"q_offset \+ L = 129, got one of 128", lambda: call(q_offset=120)),
    "q-offset-past-tensor": (ValueError, r"q_offset \+ L = 134", lambda: call(q_offset=torch.tensor([0, 125]))),
    "q-offset-needed": (ValueError, "q_offset: expected where .*default is -4", lambda: call(k=K[:, :5], v=V[:, :5])),
    "q-offset-negative": (ValueError, "q_offset: expected a position from 0 to", lambda: call(q_offset=-1)),
    "q-offset-bool": (TypeError, "q_offset: expected an int or .*got bool", lambda: call(q_offset=True)),
    "k-offset-none": (TypeError, "k_offset: expected an int or .*got NoneType", lambda: call(k_offset=None)),
    "k-offset-shape": (ValueError, r"k_offset: expected shape \[B=2\]", lambda: call(k_offset=INTS[:1])),
    "kv-start-past": (ValueError, "kv_start: expected at most kv_end", lambda: call(kv_start=INTS, kv_end=INTS - 1)),
    "kv-end-past": (ValueError, r"kv_end: .*\[0, S\] = \[0, 9\], got 4 to 10", lambda: call(kv_end=INTS + 1)),
    "kv-end-int": (TypeError, "kv_end: expected a torch.int32 or .*got int", lambda: call(kv_end=9)),
    "kv-start-shape": (ValueError, r"kv_start: .*\[B=2\] on cpu, got \[2, 1\]", lambda: call(kv_start=INTS[:, None])),
    "lengths-type": (TypeError, "lengths: .*got torch.float32", lambda: call(lengths=INTS.float())),
    "lengths-negative": (ValueError, "lengths: expected numbers >= 0, got -18 to -6", lambda: call(lengths=-2 * INTS)),
    "rotated": (
        ValueError,
        "rotated: expected one of 'none', 'q', 'k', 'qk', got 'both'",
        lambda: call(rotated="both"),
    ),
    "rotated-list": (ValueError, r"rotated: .*got \['q'\]", lambda: call(rotated=["q"])),
    "backend": (ValueError, "backend: expected .*got 'flash'", lambda: call(backend="flash")),
    "backend-triton": (ValueError, "backend: .*on the CPU, got 'triton'", lambda: call(backend="triton")),
    "sdpa-softcap": (ValueError, "backend: .*can't serve softcap", lambda: call(backend="sdpa", softcap=2.0)),
    "sdpa-window": (ValueError, "backend: .*can't serve window", lambda: call(backend="sdpa", window=2)),
    "sdpa-lse": (ValueError, "backend: .*can't serve return_lse", lambda: call(backend="sdpa", return_lse=True)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    error, message, function = BAD[case]
    with pytest.raises(error, match=message):
        function()
