"""clex::append on the CPU and by its Triton kernel: the new rows and nothing else, whatever bounds say."""

from collections.abc import Callable, Iterator

import pytest
import torch
from append_cases import CASES, Case, bits, make_step, views, written

from clex_kernels import append_kv


@pytest.fixture(params=["operator", "kernel"])
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[..., None], torch.device]]:
    """The operator for the CPU, and the kernel's launcher with a GPU or the interpreter; neither looks at values."""
    if request.param == "operator":
        yield torch.ops.clex.append, torch.device("cpu")
        return
    pytest.importorskip("triton")
    from interpreter import interpreted

    from clex_kernels.kernels.append import launch_append

    if torch.cuda.is_available():
        yield launch_append, torch.device("cuda")
    else:
        with interpreted():
            yield launch_append, torch.device("cpu")


@pytest.mark.parametrize("name", CASES)
def test_writes_the_new_rows_and_nothing_else(name: str, engine: tuple[Callable[..., None], torch.device]) -> None:
    append, device = engine
    case = CASES[name]
    if device.type == "cuda" and case.dtype == torch.float64:
        pytest.skip("fp64 is for the CPU")
    step = make_step(case, device)
    expected = written(step, case)
    append(*step.arguments)
    assert torch.equal(bits(step.memory), bits(expected))


@pytest.mark.parametrize("name", CASES)
def test_the_public_function_takes_the_same(name: str) -> None:
    case = CASES[name]
    step = make_step(case)
    expected = written(step, case)
    assert append_kv(*step.arguments, debug=True) is None
    assert torch.equal(bits(step.memory), bits(expected))


LIES = (162, -3, 2**62, 2**63 - 1, -(2**63), 1, 160)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("length", [5, 70])
def test_bounds_that_lie_write_nothing_outside(
    page: int | None, length: int, engine: tuple[Callable[..., None], torch.device]
) -> None:
    append, device = engine
    case = Case(kv_end=LIES, length=length, page=page)
    step = make_step(case, device)
    if page is not None:
        step.block_table.copy_(torch.arange(step.block_table.numel()).view_as(step.block_table))
    expected = written(step, case)
    append(*step.arguments)
    assert torch.equal(bits(step.memory), bits(expected))


@pytest.mark.parametrize("wrong", [-1, 23, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("length", [5, 70])
def test_pages_that_lie_write_nothing_outside(
    wrong: int, length: int, engine: tuple[Callable[..., None], torch.device]
) -> None:
    append, device = engine
    case = Case(kv_end=(160, 155), length=length, page=16)
    step = make_step(case, device)
    assert len(step.k_cache) == 23
    step.block_table[:, 9] = wrong
    expected = written(step, case)
    append(*step.arguments)
    assert torch.equal(bits(step.memory), bits(expected))


def test_every_tensor_has_strides_of_its_own(engine: tuple[Callable[..., None], torch.device]) -> None:
    append, device = engine
    case = Case(length=70, kv_end=(90, 150))
    step, other = make_step(case, device), make_step(case._replace(layout="head-major"), device)
    append(step.k, step.v.transpose(1, 2).contiguous().transpose(1, 2), step.k_cache, other.v_cache, step.kv_end, None)
    for cache, expected in zip((step.k_cache, other.v_cache), views(written(step, case), case), strict=True):
        for b, end in enumerate(case.kv_end):
            assert torch.equal(cache[b, end - 70 : end], expected[b, end - 70 : end])


@pytest.mark.parametrize("page", [None, 16])
def test_a_cache_without_room_takes_nothing(page: int | None, engine: tuple[Callable[..., None], torch.device]) -> None:
    append, device = engine
    step = make_step(Case(slots=0, page=page), device)
    before = step.memory.clone()
    append(*step.arguments)
    assert torch.equal(step.memory, before)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["sequences", "slots", "heads"])
def test_offsets_past_two_to_the_31_are_reached(dim: int, engine: tuple[Callable[..., None], torch.device]) -> None:
    append, device = engine
    # every stride fits 32 bits, the third offset does not; on the CPU pages in between are never touched, hence free.
    memory = [torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device) for _ in range(2)]
    sizes, strides = [1, 1, 1, 16], [16, 16, 16, 1]
    sizes[dim], strides[dim] = 3, 2**30
    k, v = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    k_cache, v_cache = (x.as_strided(sizes, strides) for x in memory)
    append(k, v, k_cache, v_cache, torch.full((sizes[0],), sizes[1], device=device), None)
    assert torch.equal(k_cache, k)
    assert torch.equal(v_cache, v)


def test_wide_heads_take_no_more_threads_than_a_block_has() -> None:
    pytest.importorskip("triton")
    from clex_kernels.kernels.append import launch_config

    for length in (1, 1000):
        assert launch_config(torch.empty(1, length, 1, 10000, device="meta"))["num_warps"] == 16
        assert launch_config(torch.empty(1, length, 1, 2, device="meta"))["num_warps"] in (1, 4)


def test_a_large_chunk_is_spread_over_threads() -> None:
    case = Case(kv_end=(1500, 2048), length=1000, slots=2048, g=4, d=64)
    step = make_step(case)
    expected = written(step, case)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        append_kv(*step.arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(step.memory, expected)
