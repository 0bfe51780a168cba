"""Offsets of the Triton kernels past 2^31 elements: in compiled code, and run by the interpreter over wide strides.

Triton passes a stride below 2^31 as 32 bits, so that a token times a stride overflows though each of them fits. Every
configuration is compiled to TTIR, ahead of the passes that need a target's tools, with tensors at the package's limits.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from offset_ranges import address_problems  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.compiled.cases import CASES  # noqa: E402
from benchmarks.compiled.compiling import TARGETS, FakeDriver  # noqa: E402
from clex_kernels.attention_checks import MAX_TOKENS  # noqa: E402
from clex_kernels.kernels import append, decode, rotary  # noqa: E402

LONG = pytest.mark.long
KERNELS = Path(append.__file__).parent

# the most that an argument may be; all arguments that are not named are strides, up to 2^31.
SIZES = dict.fromkeys(("L", "S", "M", "length", "capacity", "num_rows", "pages", "window", "offset"), MAX_TOKENS)
SIZES |= {"q_offset": MAX_TOKENS, "k_offset": MAX_TOKENS, "train_length": MAX_TOKENS, "C": 1 << 24}
SIZES |= {"H": 1 << 16, "G": 1 << 16, "group": 1 << 16, "batch": 1 << 20, "T": 1 << 20}
SIZES |= {"splits": 1 << 12, "ranges": 1 << 12}
GRID = {"x": (1 << 31) - 1, "y": (1 << 16) - 1}

# results in 32 bits that fit for a reason that intervals do not see, and their bounds; "" is a value without a name.
# attention: a row of the tile that find_tile finds, in the sequence or at its end
TILE_ROW = {"first": (-128, MAX_TOKENS + 256)}
# blocks seen whole begin at most one block after the first key or query seen, which is a maximum with this very sum.
WHOLE = {"whole_start": (1 - (1 << 31), 256), "whole_end": (1 - (1 << 31), MAX_TOKENS)}
KNOWN = {
    # tiles before a sequence: no more than the programs of the grid that stored them, and some of them a sequence's.
    "attention_bwd_dfreq_kernel": {"": (0, 1 << 30), "first": (0, 1 << 30)},
    "attention_bwd_dkv_kernel": TILE_ROW | WHOLE,
    "attention_bwd_dq_kernel": TILE_ROW | WHOLE,
    "attention_fwd_kernel": TILE_ROW | WHOLE,
    # rows of a key head: new tokens times the heads that share it, numbers that a tensor of queries has.
    "decode_combine_kernel": {"row": (0, MAX_TOKENS)},
    "decode_kernel": {
        "blocks": (0, MAX_TOKENS),
        # a tile of slots of a sequence, up to its last.
        "first": (0, MAX_TOKENS // 64),
        # of `fine`, which is 64 dense rows of a table, and of the table of pages of one sequence.
        "rows": (0, 1 << 25),
        "next_ptrs": (0, 1 << 25),
        "page": (0, (1 << 31) - 1),
    },
    # a row of x and a row of a weight: find_tile's block of rows is one there is.
    "qkv_rotary_kernel": {"offs_m": (0, MAX_TOKENS + 256), "rows_n": (0, 1 << 24)},
}


class ReadingDriver(FakeDriver):
    """Of a device by itself, so that no launch finds what a test before compiled."""

    def get_current_device(self) -> str:
        return f"{self.name}, read"


@contextlib.contextmanager
def reading(target: str) -> Iterator[list[tuple[str, str]]]:
    """Launches are listed instead, those of the same code once: the kernel's name and its TTIR."""
    listed, done = [], set()
    compile_function, run, active = JITFunction._do_compile, JITFunction.run, triton.runtime.driver._active

    def lower(
        self: JITFunction, key: str, signature: Any, device: str, constants: Any, options: Any, attrs: Any, *_: Any
    ):
        if (self.fn.__name__, key) in done:
            return
        done.add((self.fn.__name__, key))
        _, _, gpu, backend, _ = self.device_caches[device]
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = self.ASTSource(self, signature, constants, attrs)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = source.make_ir(gpu, options, functions, modules, context)
        module = backend.make_ttir(module, {}, options, *([gpu.arch] if gpu.backend == "cuda" else []))
        listed.append((self.fn.__name__, str(module)))

    def read(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(ReadingDriver(target))
    JITFunction._do_compile, JITFunction.run = lower, read
    try:
        yield listed
    finally:
        JITFunction._do_compile, JITFunction.run = compile_function, run
        # reset_active() would look for a GPU.
        triton.runtime.driver._active = active


# the two between them have heads in halves and in one part; others differ in their tiles.
IN_SHORT = ("sm_80", "sm_100")


@pytest.mark.parametrize("target", [name if name in IN_SHORT else pytest.param(name, marks=LONG) for name in TARGETS])
def test_no_address_of_a_kernel_overflows_32_bits_and_no_kernel_adds_atomically(target: str) -> None:
    with reading(target) as listed:
        for case in CASES.values():
            case.launch()
    problems, used = [], set()
    for name, ttir in listed:
        found, known = address_problems(ttir, SIZES, GRID, KNOWN.get(name, {}))
        problems += [(name, problem) for problem in found]
        used |= {(name, value) for value in known}
    assert not problems
    # every kernel was read, and no exception stands for nothing.
    sources = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert {name for name, _ in listed} == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
    assert {(name, value) for name, values in KNOWN.items() for value in values} == used


@triton.jit(do_not_specialize=["stride", "L"])
def token_by_token_kernel(x_ptr, stride, L, WIDE: tl.constexpr, ATOMIC: tl.constexpr):
    row = tl.program_id(0) % L
    for i in range(0, L):
        row += i
        offset = row.to(tl.int64) * stride if WIDE else (row * stride).to(tl.int64)
        if ATOMIC:
            tl.atomic_add(x_ptr + offset, 1.0)
        else:
            tl.store(x_ptr + offset, 1.0)
        row = tl.minimum(row, L - 1) if WIDE else row


@pytest.mark.parametrize(
    ("wide", "atomic", "expected"),
    [(True, False, []), (False, False, ["arith.muli", "arith.addi"]), (True, True, ["atomic"])],
    ids=["64-bits", "32-bits", "atomic"],
)
def test_the_reader_finds_what_overflows(wide: bool, atomic: bool, expected: list[str]) -> None:
    with reading("sm_90") as listed:
        token_by_token_kernel[1,](torch.empty(8, device="meta"), 4096, 8, WIDE=wide, ATOMIC=atomic)
    ((_, ttir),) = listed
    problems, _ = address_problems(ttir, {"L": MAX_TOKENS}, GRID, {})
    assert bool(problems) == bool(expected)
    assert all(any(word in problem for word in expected) for problem in problems)


def spread(x: torch.Tensor, stride: int, dim: int = 0) -> torch.Tensor:
    """x with one stride so wide, over memory that nothing else touches."""
    strides = list(x.stride())
    strides[dim] = stride
    size = sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True)) + 1
    y = torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides)
    return y.copy_(x)


WIDE = (1 << 30) + 64


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (3, 2, 2, 16),
        "k": (3, 2, 1, 16),
        "v": (3, 2, 1, 16),
        "keys": (3, 96, 1, 16),
        "values": (3, 96, 1, 16),
    }
    return {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}


def table_of(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(rows)[:, None] * torch.linspace(0.1, 1.0, 8)
    coarse, fine = (torch.stack([(x * angles).cos(), (x * angles).sin()], 1)[None] for x in (64.0, 1.0))
    return coarse[:, : rows // 64 + 1], fine[:, :64]


@pytest.mark.usefixtures("device")
def test_rotary_and_append_reach_rows_past_2_31_elements_of_strided_memory(inputs: dict[str, torch.Tensor]) -> None:
    coarse, fine = table_of(128)
    results = []
    for wide in (False, True):
        q, k, keys, values = (
            spread(inputs[name], WIDE) if wide else inputs[name] for name in ("q", "k", "keys", "values")
        )
        q_out, k_out = (spread(torch.zeros_like(x), WIDE) if wide else torch.zeros_like(x) for x in (q, k))
        rotary.launch_rotary(q, k, q_out, k_out, coarse, fine, None, None, 5, False)
        append.launch_append(k, inputs["v"], keys, values, torch.tensor([96, 3, 50]), None)
        results.append([x.clone() for x in (q_out, k_out, keys, values)])
    for narrow, far in zip(*results, strict=True):
        assert torch.equal(narrow, far)


@pytest.mark.usefixtures("device")
def test_decode_reads_pages_and_slots_past_2_31_elements_of_strided_memory(inputs: dict[str, torch.Tensor]) -> None:
    from clex_kernels.attention_terms import Rule, Tables, Tokens

    coarse, fine = table_of(128)
    results = []
    for wide in (False, True):
        for paged in (False, True):
            keys, values = (
                inputs[name].reshape(18, 16, 1, 16) if paged else inputs[name] for name in ("keys", "values")
            )
            step = WIDE // 8 if paged else WIDE
            keys, values = (spread(x, step) if wide else x.clone() for x in (keys, values))
            pages = torch.arange(18, dtype=torch.int32).view(3, 6).flip(0).contiguous() if paged else None
            out, lse = torch.zeros(3, 1, 2, 16).half(), torch.zeros(3, 2, 1)
            terms = (Tables(coarse, fine), Tokens(kv_end=torch.tensor([96, 40, 77])), pages, None)
            rule = Rule(0.25, is_causal=True)
            decode.launch_decode(inputs["q"][:, :1].contiguous(), keys, values, *terms, rule, (True, True), out, lse)
            results.append((out, lse))
    for narrow, far in zip(results[:2], results[2:], strict=True):
        assert torch.equal(narrow[0], far[0])
        assert torch.equal(narrow[1], far[1])
