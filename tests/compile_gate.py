"""Compiles every shipped kernel configuration ahead of time, with no GPU, and counts what the compiler made of it.

A case calls the package's own launcher with meta tensors while launches are turned into compilation for a target, so that
the signature and its specialisation (alignment, constants) are those of a real launch. Spills come from `ptxas -v`; where
they are, and how wide global memory is accessed, from the SASS. Counts depend on Triton's version: the gate is pinned to
TRITON, and skipped with another.

Compiled code is cached in build/compile_gate/triton (or TRITON_CACHE_DIR), and what was counted, one JSON file a target,
in build/compile_gate; both are made again when absent or when a kernel changes.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from clex_kernels.kernels import rotary

TRITON = "3.7.1"
REPORTS = Path(__file__).parent.parent / "build" / "compile_gate"


class Target(NamedTuple):
    gpu: GPUTarget
    shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Case:
    """One launch. `is_vectorised` asks for 128-bit accesses only; `elements` are those of one trip through a loop."""

    name: str
    launch: Callable[[], Any]
    is_vectorised: bool = False
    elements: Callable[[dict[str, int]], int] | None = None


@dataclass
class Counts:
    """What one compiled configuration needs and does; the counts from SASS are None where it could not be read."""

    name: str
    kernel: str
    key: str
    constants: dict[str, int]
    warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    loops: int | None = None
    spills_in_loops: int | None = None
    loop_instructions: int | None = None
    loop_accesses: dict[str, int] = field(default_factory=dict)
    other_accesses: dict[str, int] = field(default_factory=dict)
    loop_bytes_per_element: dict[str, float] = field(default_factory=dict)


def rotary_cases() -> list[Case]:
    """Both kernels, short and long sequences, the head shapes whose code differs, both kinds of table."""

    def elements(constants: dict[str, int]) -> int:
        return constants["BLOCK_L"] * constants["BLOCK_H"] * (2 * constants["R"] + constants["TAIL"])

    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def arguments(length: int, dims: int, pairs: int, dtype: torch.dtype, tile: int = 64, tables: int = 1):
        q, k = meta(2, length, 32, dims, dtype=dtype), meta(2, length, 8, dims, dtype=dtype)
        shapes = ((tables, 4096 // tile, 2, pairs), (tables, tile, 2, pairs))
        coarse, fine = (meta(*shape, dtype=torch.float32) for shape in shapes)
        index = meta(2, dtype=torch.int64) if tables > 1 else None
        positions = meta(tables, 4096, dtype=torch.float64) if tile == 1 else None
        ids = meta(2, length, dtype=torch.int64) if length == 1 else None
        return q, k, coarse, fine, positions, index, ids

    def forward(*shape: Any, in_place: bool = False, conjugate: bool = False) -> Callable[[], None]:
        q, k, coarse, fine, _, index, ids = arguments(*shape)
        out = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
        return lambda: rotary.launch_rotary(q, k, *out, coarse, fine, index, ids, 0, conjugate)

    def backward(*shape: Any) -> Callable[[], torch.Tensor]:
        q, k, *rest = arguments(*shape)
        given, out = [torch.empty_like(x) for x in (q, k, q, k)], (torch.empty_like(q), torch.empty_like(k))
        return lambda: rotary.launch_rotary_bwd(*given, *out, *rest, 0)

    half, single = torch.bfloat16, torch.float32
    lengths = {"short": 1, "long": 4096}
    cases = [
        Case(f"{stem}-{size}-bf16-D128", make(lengths[size], 128, 64, half), True, elements)
        for stem, make in (("rotary", forward), ("rotary_bwd", backward))
        for size in rotary.TOKENS[stem]._fields
    ]
    cases += [
        Case("rotary-long-bf16-D128-inplace", forward(4096, 128, 64, half, in_place=True), True, elements),
        Case("rotary-long-bf16-D128-conjugate", forward(4096, 128, 64, half, conjugate=True), True, elements),
        Case("rotary-long-bf16-D128-stack-positions", forward(4096, 128, 64, half, 1, 16), True, elements),
        Case("rotary-long-fp32-D128", forward(4096, 128, 64, single), True, elements),
        Case("rotary-long-bf16-D80-R16", forward(4096, 80, 16, half), False, elements),
        Case("rotary-long-bf16-D96-R12", forward(4096, 96, 12, half), False, elements),
        Case("rotary_bwd-long-bf16-D128-stack-positions", backward(4096, 128, 64, half, 1, 16), True, elements),
        Case("rotary_bwd-long-fp32-D80-R16", backward(4096, 80, 16, single), False, elements),
    ]
    return cases


CASES = {case.name: case for case in rotary_cases()}


class FakeDriver:
    """Stands in for a GPU of the target; its name as the device keeps Triton's caches of different targets apart."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling(name: str) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    """Launches compile for the target instead, and are listed: the compiled kernel and its constants."""
    compiled = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        constants = {key: value for key, value in kwargs.items() if key in self.arg_names}
        compiled.append((run(self, *args, grid=grid, warmup=True, **kwargs), constants))

    triton.runtime.driver.set_active(FakeDriver(name))
    JITFunction.run = compile_only
    try:
        with triton.knobs.cache.scope():
            if "TRITON_CACHE_DIR" not in os.environ:
                triton.knobs.cache.dir = str(REPORTS / "triton")
            yield compiled
    finally:
        JITFunction.run = run
        # reset_active() looks for a GPU.
        triton.runtime.driver._active = active
