"""Compiles every shipped kernel configuration ahead of time, with no GPU, and counts what the compiler made of it.

A case calls the package's own launcher with meta tensors while launches are turned into compilation for a target, so
the signature and its specialisation (alignment, constants) are those of a real launch. Spills come from `ptxas -v`;
where they are, and how wide global memory is accessed, from the SASS. Counts change with Triton's version: the gate
holds for the version TRITON, which is the one to pin.

Compiled code is kept in build/compile_gate/triton (or TRITON_CACHE_DIR), and the counts, one JSON file a target, in
build/compile_gate; both are made again when absent or when a kernel or this file changes.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gate_cases
import triton
from gate_cases import CASES, Case
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TRITON = "3.7.1"
REPORTS = Path(__file__).parent.parent / "build" / "compile_gate"
SOURCE = "".join(Path(file).read_text() for file in (__file__, gate_cases.__file__))


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


@dataclass
class Loop:
    """An innermost loop: instructions, of these on tensor cores, accesses to global memory by width in bits, and the
    bytes they move per element.
    """

    instructions: int
    products: int
    spills: int
    reads: dict[str, int]
    writes: dict[str, int]
    bytes_read: float
    bytes_written: float


@dataclass
class Counts:
    """What one compiled configuration needs and does; the last three are None where no SASS could be read.

    Bytes are those of the accesses issued, in `outside_bytes_read` by one program outside its innermost loops.
    """

    name: str
    key: str
    kernel: str
    constants: dict[str, int | bool]
    warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    instructions: int | None = None
    outside_bytes_read: int | None = None
    loops: list[Loop] | None = None


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
def compiling(name: str, only: str | None = None) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    """Launches (of the kernel `only`) compile for the target instead, and are listed: compiled kernel and constants."""
    compiled = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if only not in (None, self.fn.__name__):
            return
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
        # reset_active() would look for a GPU.
        triton.runtime.driver._active = active


@functools.cache
def find_nvdisasm() -> str | None:
    """The disassembler of Triton's wheel, else of the CUDA toolkit."""
    roots = (Path(triton.backends.nvidia.__file__).parent, os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    bundled = (shutil.which("nvdisasm", path=str(Path(root) / "bin")) for root in roots if root)
    return next(filter(None, bundled), shutil.which("nvdisasm"))


def count_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes that ptxas reports for what Triton has it compile."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        command = [get_ptxas(arch).path, *options, str(source), "-o", f"{source}.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, spills))


def read_sass(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def innermost_loops(sass: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of the kernel, and those of each innermost loop."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line):
            instructions.append(found[1])
            jump = re.match(r"BRA.*\((\.L\w+)\)", found[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
    # a jump to itself pads the end of a kernel.
    loops = [(start, end) for start, end in loops if end - start > 1]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return instructions, [instructions[start:end] for start, end in inner]


def accesses(instructions: list[str], opcode: str) -> Counter[str]:
    """Accesses to global memory by width in bits."""
    operations = [text.split()[0] for text in instructions if re.match(rf"{opcode}\b", text)]
    widths = (re.findall(r"\.[US]?(8|16|64|128|256)\b", operation) for operation in operations)
    return Counter(width[-1] if width else "32" for width in widths)


def byte_count(widths: Counter[str], threads: int) -> int:
    return sum(int(bits) // 8 * n for bits, n in widths.items()) * threads


def count_loop(instructions: list[str], threads: int, elements: int) -> Loop:
    reads, writes = accesses(instructions, "LDG"), accesses(instructions, "STG")
    spills = sum(bool(re.match(r"LDL|STL", text)) for text in instructions)
    products = sum(bool(re.match(r"\w*MMA\b", text)) for text in instructions)
    bytes_read, bytes_written = (byte_count(widths, threads) / elements for widths in (reads, writes))
    return Loop(len(instructions), products, spills, dict(reads), dict(writes), bytes_read, bytes_written)


def count(case: Case, target: str, known: dict[str, Counts]) -> Counts:
    """Compile one case for the target and count, or take the counts of the same code from `known`."""
    with compiling(target, case.kernel) as compiled:
        case.launch()
    kernel, constants = compiled[0]
    nvdisasm = find_nvdisasm()
    key = hashlib.sha256(f"{kernel.hash} {nvdisasm} {SOURCE}".encode()).hexdigest()
    if case.name in known and known[case.name].key == key:
        return known[case.name]
    is_nvidia = TARGETS[target].gpu.backend == "cuda"
    if is_nvidia:
        registers, spill_bytes = count_ptxas(kernel.asm["ptx"], TARGETS[target].gpu.arch)
    else:
        found = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s*(\d+)", kernel.asm["amdgcn"])}
        registers, spill_bytes = found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    warps = kernel.metadata.num_warps
    shared = kernel.metadata.shared
    counts = Counts(case.name, key, kernel.metadata.name, constants, warps, shared, registers, spill_bytes)
    if is_nvidia and nvdisasm:
        instructions, loops = innermost_loops(read_sass(kernel.asm["cubin"], nvdisasm))
        outside = accesses(instructions, "LDG") - accesses([text for loop in loops for text in loop], "LDG")
        counts.instructions, counts.outside_bytes_read = len(instructions), byte_count(outside, 32 * warps)
        counts.loops = [count_loop(loop, 32 * warps, case.elements(constants)) for loop in loops]
    return counts


def gate(target: str) -> list[Counts]:
    """Counts of every case for the target, read from and written to its report."""
    report = REPORTS / f"{target}.json"
    rows = json.loads(report.read_text())["configurations"] if report.exists() else []
    known = {row["name"]: load_counts(row) for row in rows}
    found = [count(case, target, known) for case in CASES.values()]
    REPORTS.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=REPORTS, delete=False) as file:
        json.dump({"target": target, "triton": triton.__version__, "configurations": list(map(asdict, found))}, file)
    # another worker may be writing the same report.
    os.replace(file.name, report)
    return found


def load_counts(row: dict[str, Any]) -> Counts:
    loops = row["loops"]
    return Counts(**{**row, "loops": None if loops is None else [Loop(**loop) for loop in loops]})


def problems(case: Case, counts: Counts, target: str) -> list[str]:
    """What the gate does not let pass."""
    found = []
    if counts.shared_bytes > TARGETS[target].shared_bytes:
        found.append(
            f"{case.name}: {counts.shared_bytes} bytes of shared memory, {target} has {TARGETS[target].shared_bytes}"
        )
    for loop in counts.loops or ():
        # beside products, the only loops are searches and waits.
        if loop.spills and (loop.products or not case.is_product):
            found.append(f"{case.name}: {loop.spills} spills in a loop of {loop.instructions} instructions")
        if not case.is_streaming:
            continue
        if any(int(bits) < 128 for bits in (*loop.reads, *loop.writes)):
            found.append(f"{case.name}: expected accesses of 128 bits, got reads {loop.reads}, writes {loop.writes}")
        moved, expected = (loop.bytes_read, loop.bytes_written), (case.reads * case.itemsize, case.itemsize)
        if moved != expected:
            found.append(f"{case.name}: expected {expected} bytes read and written per element, got {moved}")
    if case.has_loop and counts.loops == []:
        found.append(f"{case.name}: no loop found in its SASS")
    if case.is_product and counts.loops is not None and not any(loop.products for loop in counts.loops):
        found.append(f"{case.name}: no tensor-core instruction in its loops")
    return found
