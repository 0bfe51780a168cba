"""append_kv as it is called: bad input, gradients, compiled code, and decoding after it."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from append_cases import CASES, Case, Step, make_step, written
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from clex_kernels import RotaryTable, append_kv, attention, decode_attention


def test_one_int_is_the_end_of_all() -> None:
    case = Case(kv_end=(90, 90))
    step = make_step(case)
    expected = written(step, case)
    append_kv(step.k, step.v, step.k_cache, step.v_cache, 90)
    assert torch.equal(step.memory, expected)


def test_strides_of_bounds_are_followed() -> None:
    case = Case(page=16)
    step = make_step(case)
    expected = written(step, case)
    kv_end = torch.stack((step.kv_end, step.kv_end - 9), dim=1)[:, 0]
    block_table = step.block_table.t().contiguous().t()
    append_kv(step.k, step.v, step.k_cache, step.v_cache, kv_end, block_table)
    assert torch.equal(step.memory, expected)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", ["five tokens", "pages of 16"])
def test_values_that_are_not_there_are_not_looked_at(name: str, kind: str) -> None:
    mode = FakeTensorMode()
    move = mode.from_tensor if kind == "fake" else lambda x: x.to("meta")
    k, v, k_cache, v_cache, kv_end, block_table = (
        x if x is None else move(x) for x in make_step(CASES[name]).arguments
    )
    with mode if kind == "fake" else contextlib.nullcontext():
        for end in (9, kv_end):
            append_kv(k, v, k_cache, v_cache, end, block_table)


@pytest.mark.parametrize("name", ["five tokens", "pages of 16"])
def test_nothing_is_allocated_but_by_the_checks(name: str) -> None:
    step = make_step(CASES[name])
    for function, limit in ((torch.ops.clex.append, 0), (append_kv, 1024)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function(*step.arguments)
        allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
        assert sum(allocated) <= limit
    # what would be seen.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step.k_cache.clone()
    assert sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0) > 1024


WRONG: dict[str, tuple[Callable[[Step], dict[str, Any]], type[Exception], str]] = {
    "k no tensor": (lambda step: {"k": 3}, TypeError, "k: expected a tensor"),
    "v no tensor": (lambda step: {"v": None}, TypeError, "v: expected a tensor"),
    "cache no tensor": (lambda step: {"v_cache": []}, TypeError, "v_cache: expected a tensor"),
    "integers": (lambda step: {"k": step.k.long()}, TypeError, "k: expected float32"),
    "k of another shape": (lambda step: {"k": step.k[0]}, ValueError, "k: expected shape"),
    "v of another length": (lambda step: {"v": step.v[:, 1:]}, ValueError, "v: expected k's"),
    "v of another dtype": (lambda step: {"v": step.v.float()}, ValueError, "v: expected k's"),
    "v elsewhere": (lambda step: {"v": step.v.to("meta")}, ValueError, "v: expected k's"),
    "v across": (lambda step: {"v": across(step.v)}, ValueError, "v: expected unit stride"),
    "k across": (lambda step: {"k": across(step.k)}, ValueError, "k: expected unit stride"),
    "cache across": (lambda step: {"k_cache": across(step.k_cache)}, ValueError, "k_cache: expected unit stride"),
    "cache of another dtype": (
        lambda step: {"k_cache": step.k_cache.float()},
        ValueError,
        "k_cache: expected k's dtype",
    ),
    "cache of fewer sequences": (lambda step: {"v_cache": step.v_cache[:1]}, ValueError, "v_cache: expected"),
    "caches that differ": (
        lambda step: {"v_cache": step.v_cache[:, 1:]},
        ValueError,
        "v_cache: expected shape k_cache's",
    ),
    "other heads": (
        lambda step: {"k": step.k[:, :, :1], "v": step.v[:, :, :1]},
        ValueError,
        "k: expected G=2 heads as k_cache's, got 1",
    ),
    "one cache twice": (lambda step: {"v_cache": step.k_cache}, ValueError, "k_cache, v_cache: expected tensors that"),
    "the same memory": (
        lambda step: {"v_cache": step.k_cache[:]},
        ValueError,
        "k_cache, v_cache: expected tensors that",
    ),
    "expanded cache": (
        lambda step: {"v_cache": step.v_cache[:1].expand(2, -1, -1, -1)},
        ValueError,
        "v_cache: can't be written to",
    ),
    "kv_end a bool": (lambda step: {"kv_end": True}, TypeError, "kv_end: expected"),
    "kv_end in fp32": (lambda step: {"kv_end": step.kv_end.float()}, TypeError, "kv_end: expected"),
    "kv_end for one": (lambda step: {"kv_end": step.kv_end[:1]}, ValueError, "kv_end: expected shape"),
    "kv_end past the end": (lambda step: {"kv_end": step.kv_end + 11}, ValueError, r"kv_end: .* within \[0, S\]"),
    "kv_end below 0": (lambda step: {"kv_end": step.kv_end - 38}, ValueError, r"kv_end: .* within \[0, S\]"),
    "an int past the end": (lambda step: {"kv_end": 161}, ValueError, "kv_end: expected within"),
    "an int below 0": (lambda step: {"kv_end": -1}, ValueError, "kv_end: expected within"),
}


def across(x: Tensor) -> Tensor:
    """The same shape and values, with D far from unit stride."""
    return x.transpose(1, 3).contiguous().transpose(1, 3)


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, error, message = WRONG[name]
    step = make_step(Case())
    before = step.memory.clone()
    given = {**dict(zip(("k", "v", "k_cache", "v_cache", "kv_end"), step.arguments, strict=False)), **change(step)}
    with pytest.raises(error, match=message):
        append_kv(**given)
    assert torch.equal(step.memory, before)


def test_pages_that_do_not_exist_are_refused_only_where_tokens_go() -> None:
    case = Case(page=16, kv_end=(37, 150))
    step = make_step(case)
    # slots 32 to 36 and 145 to 149.
    for b, column in ((0, 2), (1, 9)):
        for wrong in (-1, len(step.k_cache)):
            block_table = step.block_table.clone()
            block_table[b, column] = wrong
            with pytest.raises(ValueError, match=rf"block_table: .* got {wrong} at \[{b}, {column}\]"):
                append_kv(*step.arguments[:5], block_table)
    with pytest.raises(TypeError, match="block_table: expected"):
        append_kv(*step.arguments[:5], step.block_table.float())
    with pytest.raises(ValueError, match="block_table: expected shape"):
        append_kv(*step.arguments[:5], step.block_table[:1])
    with pytest.raises(ValueError, match="k_cache: expected pages of P slots"):
        append_kv(step.k, step.v, step.k_cache[:, :15], step.v_cache[:, :15], step.kv_end, step.block_table)


@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache"])
def test_gradients_are_refused_before_anything_is_written(name: str) -> None:
    case = Case(dtype=torch.float32)
    step = make_step(case)
    expected = written(step, case)
    before = step.memory.clone()
    given = dict(zip(("k", "v", "k_cache", "v_cache", "kv_end"), step.arguments, strict=False))
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name}: .* {name}.detach\(\) or torch.no_grad\(\)"):
        append_kv(**given)
    assert torch.equal(step.memory, before)
    with torch.no_grad():
        append_kv(**given)
    assert torch.equal(step.memory, expected)


def test_a_part_of_the_cache_is_refused() -> None:
    k_cache, v_cache = torch.zeros(1, 9, 2, 16), torch.zeros(1, 9, 2, 16)
    with pytest.raises(ValueError, match="k: expected memory apart"):
        append_kv(k_cache[:, 1:], torch.ones(1, 8, 2, 16), k_cache, v_cache, 8)
    with pytest.raises(ValueError, match="v: expected memory apart"):
        append_kv(torch.ones(1, 8, 2, 16), v_cache[:, 1:], k_cache, v_cache, 8)
    append_kv(k_cache[:, 1:].clone(), v_cache[:, 1:].clone(), k_cache, v_cache, 8)


def test_a_cache_that_autograd_would_write_to_is_refused() -> None:
    step = make_step(Case(dtype=torch.float32))
    # what copy_ of a key that requires grad leaves behind.
    k_cache = step.k_cache.clone()
    k_cache[:, 0] = step.k[:, 0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="k_cache: append_kv has no gradients"):
        append_kv(step.k, step.v, k_cache, step.v_cache, step.kv_end)


def test_forward_mode_is_refused() -> None:
    step = make_step(Case(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda k: append_kv(k, *step.arguments[1:]), (step.k,), (step.k,))


def test_autograd_notices_that_a_saved_cache_was_written() -> None:
    step = make_step(Case(dtype=torch.float32))
    weight = torch.ones(16, requires_grad=True)
    y = (step.k_cache * weight).sum()
    append_kv(*step.arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors_are_written() -> None:
    case = Case()
    with torch.inference_mode():
        step = make_step(case)
        expected = written(step, case)
        append_kv(*step.arguments)
    assert torch.equal(step.memory, expected)
    with torch.no_grad():
        append_kv(*step.arguments)
    assert torch.equal(step.memory, expected)


@pytest.mark.parametrize("name", ["five tokens", "pages of 16", "head-major", "keys and values in one tensor"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(torch.ops.clex.append.default, make_step(CASES[name]).arguments)


def write_and_read(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, kv_end: Tensor, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    append_kv(k, v, k_cache, v_cache, kv_end, block_table)
    # no views, which torch itself can't return where both caches are slices of one tensor.
    return 2 * k_cache[:, :, 0], 2 * v_cache[:, 1:]


COMPILED = ["five tokens", "pages of 16", "head-major", "keys and values in one tensor"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    torch._dynamo.reset()
    step, expected = make_step(CASES[name]), make_step(CASES[name])
    found = torch.compile(write_and_read, backend="aot_eager", fullgraph=True)(*step.arguments)
    for x, y in zip(found, write_and_read(*expected.arguments), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(step.memory, expected.memory)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_by_inductor(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    step = make_step(case)
    expected = written(step, case)
    torch.compile(append_kv, fullgraph=True)(*step.arguments)
    assert torch.equal(step.memory, expected)


def test_compiled_steps_of_many_lengths_compile_at_most_twice() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(write_and_read, backend=counter, fullgraph=True, dynamic=True)
    for length in range(2, 12):
        case = Case(length=length, kv_end=(9, 2 * length))
        step = make_step(case)
        expected = written(step, case)
        compiled(*step.arguments)
        assert torch.equal(step.memory, expected)
    assert counter.frame_count <= 2


def test_compiled_slices_of_a_tensor_that_comes_whole() -> None:
    torch._dynamo.reset()

    def write(k: Tensor, v: Tensor, packed: Tensor, kv_end: int) -> Tensor:
        append_kv(k, v, packed[:, :, 0], packed[:, :, 1], kv_end)
        return 2 * packed

    step = make_step(Case(kv_end=(8, 8)))
    packed = torch.zeros(2, 30, 2, 2, 16, dtype=torch.bfloat16)
    expected = packed.clone()
    write(step.k, step.v, expected, 8)
    assert expected[:, 3:8].any()
    doubled = torch.compile(write, backend="aot_eager", fullgraph=True)(step.k, step.v, packed, 8)
    assert torch.equal(packed, expected)
    assert torch.equal(doubled, 2 * expected)


@pytest.mark.parametrize("page", [None, 16])
def test_what_is_appended_is_attended_to(page: int | None) -> None:
    case = Case(kv_end=(40, 40), slots=48, page=page, dtype=torch.float64)
    step = make_step(case)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 40, 4, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 40, 2, 16, generator=generator, dtype=torch.float64)
    freq = 10 ** -torch.linspace(0, 4, 8, dtype=torch.float64)
    table = RotaryTable.from_frequencies(freq, length=64, dtype=torch.float64)
    block_table = None if page is None else torch.tensor([[5, 0, 3], [2, 7, 1]])
    caches, rows = step.arguments[2:4], []
    # a prefill, then several tokens, then one by one.
    for start, end in ((0, 16), (16, 28), *((i, i + 1) for i in range(28, 40))):
        append_kv(k[:, start:end], v[:, start:end], *caches, end, block_table)
        rows.append(decode_attention(q[:, start:end], *caches, table, end, block_table=block_table))
    expected = attention(q, k, v, table, is_causal=True)
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_its_inputs() -> None:
    case = Case(page=16)
    step = make_step(case, "cuda")
    append_kv(*step.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_kv(*step.arguments)
    step.kv_end.copy_(torch.tensor([16, 5]))
    step.block_table.copy_(torch.arange(20).reshape(2, 10).flip(1))
    step.k.neg_()
    expected = written(step, case)
    graph.replay()
    assert torch.equal(step.memory, expected)
