"""How apply_rotary may be called: in place, into given memory, compiled, and wrongly."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from clex_kernels import rotary
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack

B, L, H, G, D, R = 2, 9, 4, 2, 24, 8
FREQ = 10000.0 ** (-torch.arange(R, dtype=torch.float64) / R)


def inputs(dtype: torch.dtype = torch.float32, length: int = L) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, length, heads, D, generator=generator).to(dtype) for heads in (H, G))


def make_table(freq: Tensor = FREQ, length: int = 128, dtype: torch.dtype = torch.float32) -> RotaryTable:
    return RotaryTable.from_frequencies(freq, length=length, dtype=dtype)


def make_stack(factors: int = 4, **settings: Any) -> RotaryTableStack:
    t = torch.arange(1, factors + 1, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(FREQ / t[:, None], t, length=128, **settings)


def packed(freq: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """q and k in place, as views of one buffer [B, L, H + G, D]."""
    return apply_rotary(buffer[:, :, :H], buffer[:, :, H:], make_table(freq), inplace=True)


def test_in_place_writes_to_the_tensors_themselves() -> None:
    q, k = inputs()
    expected = apply_rotary(q, k, make_table(), offset=3)
    q_out, k_out = apply_rotary(q, k, make_table(), offset=3, inplace=True)
    assert q_out is q
    assert k_out is k
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_memory_is_filled_completely(dtype: torch.dtype) -> None:
    q, k = inputs(dtype)
    expected = apply_rotary(q, k, make_table())
    # memory of another layout than the inputs'.
    out = tuple(torch.full((B, x.shape[2], L, D), torch.nan, dtype=dtype).transpose(1, 2) for x in (q, k))
    q_out, k_out = apply_rotary(q, k, make_table(), out=out)
    assert q_out is out[0]
    assert k_out is out[1]
    assert torch.equal(q_out, expected[0])
    assert torch.equal(k_out, expected[1])


def test_the_backward_in_place_gives_the_same_bits() -> None:
    arguments = opcheck_arguments()["rotary_bwd"]
    *expected, dfreq = torch.ops.clex.rotary_bwd(*arguments)
    gradients = [x.clone() for x in arguments[:2]]
    assert torch.equal(torch.ops.clex.rotary_bwd_(*gradients, *arguments[2:]), dfreq)
    for x, y in zip(gradients, expected, strict=True):
        assert torch.equal(x, y)


def test_the_backward_into_given_memory_gives_the_same_bits() -> None:
    arguments = opcheck_arguments()["rotary_bwd"]
    *expected, dfreq = torch.ops.clex.rotary_bwd(*arguments)
    # parts of one buffer, with other things between and behind them.
    buffer = torch.full((B, L, H + G + 1, D + 3), torch.nan)
    into = [part[..., :D] for part in buffer.split((H, G, 1), dim=2)][:2]
    found = torch.ops.clex.rotary_bwd_out(*arguments[:2], *into, *arguments[2:])
    assert torch.equal(found, dfreq)
    for x, y in zip(into, expected, strict=True):
        assert torch.equal(x, y)
    assert buffer[..., D:].isnan().all()
    assert buffer[:, :, -1].isnan().all()


def test_the_operator_undoes_itself_by_the_conjugate() -> None:
    q, k = inputs(torch.float64)
    table = make_table(dtype=torch.float64)
    tables = (table.coarse[None], table.fine[None], None, None, 5)
    rotated = apply_rotary(q, k, table, offset=5)
    torch.ops.clex.rotary_(*rotated, *tables, True)
    torch.testing.assert_close(rotated, (q, k), rtol=1e-13, atol=1e-13)


def test_views_of_one_buffer_rotate_in_place_with_all_gradients() -> None:
    buffer = torch.cat(inputs(), dim=2)
    seeds = inputs(length=L)
    gradients = []
    for inplace in (False, True):
        leaf, freq = buffer.clone().requires_grad_(), FREQ.clone().requires_grad_()
        copy = leaf * 1
        q, k = packed(freq, copy) if inplace else apply_rotary(copy[:, :, :H], copy[:, :, H:], make_table(freq))
        gradients.append(torch.autograd.grad((q, k), (leaf, freq), seeds))
    for out_of_place, in_place in zip(*gradients, strict=True):
        torch.testing.assert_close(in_place, out_of_place, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_the_buffer_too() -> None:
    freq = FREQ.clone().requires_grad_()
    leaf = torch.cat(inputs(), dim=2).requires_grad_()
    copy = leaf * 1
    packed(freq, copy)
    copy.square().sum().backward()
    # a rotation keeps lengths.
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach(), rtol=1e-5, atol=1e-5)
    assert freq.grad.abs().max() < 1e-3


def test_writing_to_what_dfreq_needs_is_noticed() -> None:
    for inplace in (True, False):
        freq = FREQ.clone().requires_grad_()
        q, k = (x.requires_grad_() * 1 for x in inputs())
        q_out, k_out = apply_rotary(q, k, make_table(freq), inplace=inplace)
        loss = q_out.sum() + k_out.sum()
        with torch.no_grad():
            k_out.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_writing_is_free_where_dfreq_is_not_wanted() -> None:
    for inplace in (True, False):
        q, k = (x.requires_grad_() * 1 for x in inputs())
        q_out, k_out = apply_rotary(q, k, make_table(), inplace=inplace)
        loss = q_out.sum() + k_out.sum()
        with torch.no_grad():
            k_out.zero_()
        loss.backward()


def test_in_place_notices_that_its_input_was_needed() -> None:
    x = inputs()[0].requires_grad_()
    q = x * 1
    loss = q.square()
    apply_rotary(q, None, make_table(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("way", ["inplace", "out"])
def test_what_others_saved_is_seen_to_be_overwritten(way: str) -> None:
    weight = torch.ones(D, requires_grad=True)
    for overwritten in (0, 1):
        tensors = [x.clone() for x in inputs()]
        loss = (weight * tensors[overwritten]).sum()
        # nothing here requires grad, so that no autograd function of ours is involved.
        if way == "inplace":
            apply_rotary(*tensors, make_table(), inplace=True)
        else:
            apply_rotary(*inputs(), make_table(), out=tuple(tensors))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_outputs_have_unit_stride_also_where_inputs_overlap() -> None:
    # every token's window begins one number further on: empty_like puts the tokens innermost.
    buffer = torch.randn(64, generator=torch.Generator().manual_seed(3))
    q = buffer.as_strided((1, 5, 3, D), (0, 1, 8, 1))
    assert torch.empty_like(q).stride(-1) != 1
    expected = apply_rotary(q.contiguous(), None, make_table())[0]
    actual = apply_rotary(q, None, make_table())[0]
    assert torch.equal(actual, expected)
    with FakeTensorMode() as mode:
        like = rotary._empty_outputs(mode.from_tensor(q), None)[0]
    assert like.stride() == actual.stride()


def test_backward_leaves_incoming_gradients_alone() -> None:
    for inplace in (False, True):
        freq = FREQ.clone().requires_grad_()
        q, k = (x.requires_grad_() * 1 for x in inputs())
        outputs = apply_rotary(q, k, make_table(freq), inplace=inplace)
        incoming = [torch.ones_like(x) for x in outputs]
        torch.autograd.backward(outputs, incoming)
        assert all(torch.equal(x, torch.ones_like(x)) for x in incoming)


def test_leaf_that_requires_grad_is_left_alone() -> None:
    q, k = inputs()
    for leaf in (q.clone().requires_grad_(), q.clone().requires_grad_()[:, :]):
        with pytest.raises(RuntimeError, match="leaf"):
            apply_rotary(k.repeat(1, 1, 2, 1), leaf, make_table(), inplace=True)
        assert torch.equal(leaf, q)
    with torch.no_grad():
        apply_rotary(q.requires_grad_(), k, make_table(), inplace=True)


def test_second_derivative_is_refused() -> None:
    q, k = (x.requires_grad_() for x in inputs())
    (gradient,) = torch.autograd.grad(apply_rotary(q, k, make_table())[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        q, k = (x.requires_grad_() for x in inputs())
        freq = FREQ.clone().requires_grad_()

        def layer(q: Tensor, k: Tensor, freq: Tensor) -> Tensor:
            q, k = apply_rotary(q * 2, k * 2, make_table(freq), inplace=True)
            return (q[:, :, :G] * k).square().sum()

        loss = checkpoint(layer, q, k, freq, use_reentrant=reentrant) if checkpointed else layer(q, k, freq)
        gradients.append(torch.autograd.grad(loss, (q, k, freq)) if not reentrant else backward(loss, (q, k, freq)))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def backward(loss: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


def test_inference_mode() -> None:
    q, k = inputs()
    expected = apply_rotary(q, k, make_table())
    with torch.inference_mode():
        x, y = q.clone(), k.clone()
        assert torch.equal(apply_rotary(x, y, make_table())[0], expected[0])
        assert torch.equal(apply_rotary(x, y, make_table(), inplace=True)[1], expected[1])


def opcheck_arguments() -> dict[str, tuple[Any, ...]]:
    q, k = inputs()
    stack = make_stack(index=torch.tensor([2, 0]))
    positions = torch.arange(128, dtype=torch.float64)[None]
    ids = torch.arange(L)[None]
    tables = (stack.coarse, stack.fine)
    where = (stack.index, ids, 3)
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_(), stack.freq.clone().requires_grad_())
    return {
        "rotary": (*leaves, *tables, positions, *where),
        "rotary_": (q, k, *tables, *where, True),
        "rotary_out": (q, k, *tables, *where, False, torch.empty_like(q), torch.empty_like(k)),
        "rotary_bwd": (q, k, q, k, *tables, positions, *where),
        "rotary_bwd_": (q.clone(), k.clone(), q, k, *tables, positions, *where),
        "rotary_bwd_out": (q, k, torch.empty_like(q), torch.empty_like(k), q, k, *tables, positions, *where),
    }


# and which of its arguments go with k and with dfreq.
OPERATORS = {
    "rotary": [1],
    "rotary_": [1],
    "rotary_out": [1, 9],
    "rotary_bwd": [1, 2, 3],
    "rotary_bwd_": [1, 2, 3],
    "rotary_bwd_out": [1, 3, 4, 5],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.clex, name).default
    arguments = opcheck_arguments()[name]
    torch.library.opcheck(operator, arguments)
    # without k, and for the backward without dfreq.
    absent = OPERATORS[name]
    torch.library.opcheck(operator, tuple(None if i in absent else x for i, x in enumerate(arguments)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_rotary_kernel launches these for real")
def test_operators_for_cuda_agree_with_those_for_the_cpu() -> None:
    pytest.importorskip("triton")
    from interpreter import interpreted

    arguments = opcheck_arguments()
    with interpreted(), torch.no_grad():
        for name in ("rotary", "rotary_bwd"):
            for absent in ((), (1, 3)) if name == "rotary_bwd" else ((), (1,)):
                given = [None if i in absent else x for i, x in enumerate(arguments[name])]
                expected = getattr(torch.ops.clex, name)(*given)
                actual = getattr(rotary, f"_{name}_cuda")(*given)
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        q, k = inputs()
        expected = q.clone(), k.clone()
        rotary._rotary_in_place_cuda(q, k, *arguments["rotary_"][2:])
        torch.ops.clex.rotary_(*expected, *arguments["rotary_"][2:])
        torch.testing.assert_close((q, k), expected, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_refused() -> None:
    q, k = inputs()
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: apply_rotary(x, k, make_table())[0], (q,), (q,))


def test_meta_and_fake_tensors() -> None:
    with FakeTensorMode():
        q, k = torch.empty(B, L, H, D, dtype=torch.bfloat16), torch.empty(B, L, G, D, dtype=torch.bfloat16)
        q_out, k_out = apply_rotary(q, k, make_table(torch.rand(R, dtype=torch.float64)))
        assert q_out.shape == q.shape
        assert k_out.dtype == torch.bfloat16
    table = make_table()
    tables = [x.to("meta")[None] for x in (table.freq, table.coarse, table.fine)]
    q_out, k_out = torch.ops.clex.rotary(inputs()[0].to("meta"), None, *tables, None, None, None, 0)
    assert q_out.shape == (B, L, H, D)
    assert k_out.shape == (0,)


def step(q: Tensor, k: Tensor, table: RotaryTable, offset: int, inplace: bool) -> Tensor:
    q, k = apply_rotary(q * 2, k * 2, table, offset=offset, inplace=inplace)
    return (q[:, :, :G] * k).square().sum()


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_step_over_many_lengths_compiles_at_most_twice(inplace: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for length in range(7, 39):
        gradients = []
        for function in (compiled, step):
            q, k = (x.requires_grad_() for x in inputs(length=length))
            freq = FREQ.clone().requires_grad_()
            table = RotaryTable.from_frequencies(freq, length=128, t=1.0 + length)
            gradients.append(backward(function(q, k, table, length - 7, inplace), (q, k, freq)))
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert counter.frame_count <= 2


def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    gradients = []
    for function in (torch.compile(step, fullgraph=True), step):
        q, k = (x.requires_grad_() for x in inputs())
        freq = FREQ.clone().requires_grad_()
        gradients.append(backward(function(q, k, make_table(freq), 2, False), (q, k, freq)))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_compiled_in_place_on_a_packed_input() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True)
    buffer = torch.cat(inputs(), dim=2)
    expected = buffer.clone()
    packed(FREQ, expected)
    with torch.no_grad():
        q, _ = compiled(FREQ, buffer)
    assert torch.equal(buffer, expected)
    assert torch.equal(q, expected[:, :, :H])
