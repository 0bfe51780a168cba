from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from benchmarks.compiled.traffic import Bytes, Traffic, count_traffic, eager_bytes  # noqa: E402
from benchmarks.compiled.traffic_figures import (  # noqa: E402
    Figure,
    count_decode,
    decode_figure,
    goals,
    rotary_figure,
    split,
)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@triton.jit
def spread_kernel(x_ptr, out, N, BLOCK: tl.constexpr):
    """Elements of x, read twice, to every second one of out.first, and the sum with the first block to out.second."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    again = tl.load(x_ptr + offs, mask=offs < N)
    head = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out.first + 2 * offs, x, mask=offs < N)
    tl.store(out.second + offs, (again + head).to(tl.bfloat16), mask=offs < N)


@triton.jit
def add_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


@triton.jit
def reinterpret_kernel(x_ptr):
    tl.store(x_ptr.to(tl.pointer_type(tl.int16)), 1)


def spread(x: Tensor, out: Pair, size: int) -> Callable[[], None]:
    return lambda: spread_kernel[2,](x, out, size, BLOCK=64)


def test_a_byte_counts_once_a_program_as_requested_and_its_sector_once_a_launch_in_memory() -> None:
    out = Pair(torch.zeros(200), torch.zeros(100, dtype=torch.bfloat16))
    (found,) = count_traffic(spread(torch.zeros(100), out, 100))
    assert (found.kernel, found.programs) == ("spread_kernel", 2)
    # of the second program 36 elements and the first 64; 400 bytes are 12.5 sectors.
    assert found.reads == {"x_ptr": Bytes(4 * (64 + 36 + 64), 13 * 32)}
    # 4 of every 8 bytes, the last at 796; and 200 bytes in a row.
    assert found.writes == {"out.first": Bytes(400, 25 * 32), "out.second": Bytes(200, 7 * 32)}
    assert found.total("out.first", "out.second") == Bytes(600, 32 * 32)
    assert found.total() == Bytes(1256, 45 * 32)


def test_every_launch_is_listed_and_a_tensor_given_twice_has_its_first_name() -> None:
    x = torch.ones(128)
    y = torch.zeros(128, dtype=torch.bfloat16)

    def launch() -> None:
        spread(x, Pair(torch.zeros(256), y), 128)()
        spread(x, Pair(torch.zeros(256), y), 64)()
        x.mul_(2)

    first, second = count_traffic(launch)
    assert (first.writes["out.second"], second.writes["out.second"]) == (Bytes(256, 256), Bytes(128, 128))
    assert torch.equal(y, torch.full((128,), 2.0, dtype=torch.bfloat16)), "the launches ran"
    (found,) = count_traffic(spread(x, Pair(x, y), 64))
    assert list(found.writes) == ["x_ptr", "out.second"]


@pytest.mark.parametrize("short", ["x", "first"])
def test_an_access_outside_of_the_tensors_raises(short: str) -> None:
    x, first = torch.zeros(99 if short == "x" else 100), torch.zeros(198 if short == "first" else 200)
    out = Pair(first, torch.zeros(100, dtype=torch.bfloat16))
    with pytest.raises(InterpreterError, match=r"spread_kernel: 1 (reads|writes) outside of every tensor"):
        count_traffic(spread(x, out, 100))


def test_what_would_not_be_counted_is_refused() -> None:
    with pytest.raises(InterpreterError, match="no atomics"):
        count_traffic(lambda: add_kernel[1,](torch.zeros(1)))
    with pytest.raises(InterpreterError, match="2 bytes at a time of x_ptr"):
        count_traffic(lambda: reinterpret_kernel[1,](torch.zeros(1)))
    x = torch.zeros(300)
    out = Pair(x[50:250], torch.zeros(100, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"x_ptr and out\.first share some of their memory"):
        count_traffic(spread(x[:100], out, 100))


def test_counting_leaves_the_interpreter_as_it_was() -> None:
    before = dict(vars(InterpreterBuilder))
    with pytest.raises(InterpreterError):
        count_traffic(lambda: add_kernel[1,](torch.zeros(1)))
    assert dict(vars(InterpreterBuilder)) == before


A, B = torch.ones(4, 8), torch.ones(4, 8)
EAGER = {
    "sum": (lambda: A + B, 256, 128),
    "same operand twice": (lambda: A * A, 128, 128),
    "overlapping views of one tensor": (lambda: A[:3] * A[1:], 128, 96),
    "broadcast row": (lambda: A + B[:1], 160, 128),
    "expanded row": (lambda: A + B[:1].expand(4, 8), 160, 128),
    "every second column": (lambda: A[:, ::2].exp(), 64, 64),
    "views alone": (lambda: A.t().reshape(8, 2, 2)[1:].unsqueeze(0).expand(5, 7, 2, 2), 0, 0),
    "reshape that copies": (lambda: A.t().reshape(32), 128, 128),
    "in place": (lambda: A.clone().add_(B), 128 + 256, 128 + 128),
    "copy": (lambda: torch.empty_like(A).copy_(B), 128, 128),
    "into a given tensor": (lambda: torch.add(A, B, out=torch.empty_like(A)), 256, 128),
    "list": (lambda: torch.cat((A, B[:2])), 192, 192),
    "narrower": (lambda: A.bfloat16(), 128, 64),
    "reduction": (lambda: A.sum(dim=1), 128, 16),
}


@pytest.mark.parametrize(("function", "read", "written"), EAGER.values(), ids=EAGER)
def test_eager_operators_are_counted(function: Callable[[], Tensor], read: int, written: int) -> None:
    found = eager_bytes(function)
    assert (found.read, found.written) == (read, written)
    assert sum(found.by_operator.values()) == found.total == read + written


def test_what_no_part_names_is_in_the_last() -> None:
    launch = Traffic("kernel", 1, {"q": Bytes(3, 4), "index": Bytes(1, 32)}, {"q": Bytes(5, 6), "k": Bytes(7, 8)})
    parts = {"elements": ("q", "k"), "table": ("coarse",)}
    assert split([launch, launch], parts) == [Bytes(30, 36), Bytes(0, 0), Bytes(2, 64)]


def test_rotary_reads_and_writes_every_element_once() -> None:
    figure = rotary_figure("rotary", 128, 64, torch.bfloat16)
    assert figure.parts["elements"] == Bytes(4, 4)
    # the 64 fine rows of 512 bytes once a call, and a coarse one for 64 tokens; each program its own of both.
    elements = 40 * 128
    assert figure.parts["table"].memory == pytest.approx((512 / 64 + 64 * 512 / 4096) / elements)
    assert figure.parts["table"].requested > 30 * figure.parts["table"].memory
    assert all(goal.met for goal in goals([figure]))
    sampled = rotary_figure("rotary", 128, 64, torch.bfloat16, tile=1)
    assert sampled.parts["table"] == pytest.approx(Bytes(512 / elements, 512 / elements))


@pytest.mark.parametrize("page", [None, 16])
def test_small_calls_give_the_bytes_of_a_large_one(page: int | None) -> None:
    context, names = 1280, ("k.ptr", "v.ptr")
    launches = count_decode(context, groups=2, page=page)
    figure = decode_figure("small", context, groups=2, page=page)
    assert figure.parts["keys and values"] == Bytes(512, 512)
    assert split(launches, {"keys and values": names})[0] == Bytes(512 * 2 * context, 512 * 2 * context)
    for moved, scaled in zip(map(sum, zip(*split(launches, {}), strict=True)), figure.total, strict=True):
        assert scaled * 2 * context == pytest.approx(moved, rel=1e-3)


def test_goals_are_missed_above_their_bounds() -> None:
    def figure(name: str, **parts: float) -> Figure:
        return Figure(name, "element", 4.0, {part: Bytes(0, memory) for part, memory in parts.items()})

    met = goals([figure("rotary-x", elements=4.0, table=0.12, other=1.0), figure("decode-x", keys=4.0, ranges=0.07)])
    assert [goal.met for goal in met] == [True, True, True]
    missed = goals([figure("rotary-x", elements=4.01, table=0.13), figure("decode-x", keys=4.0, ranges=0.09)])
    assert [goal.met for goal in missed] == [False, False, False]
    assert {goal.label for goal in missed} == {"counted"}
    assert goals([figure("append-x", elements=9.0)]) == []
