"""Counts what the compiler made of every configuration.

Spills come from `ptxas -v`; where they are, and how wide global memory is accessed, from the SASS. Counts change with
Triton's version: they hold for the version TRITON, which is the one to pin. They are kept, one JSON file a target, in
build/compiled, and made again when absent or when a kernel or a file of this package changes.
"""

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.compiled import cases, compiling, sass
from benchmarks.compiled.cases import CASES, Case
from benchmarks.compiled.compiling import BUILD, TARGETS, count_ptxas, find_nvdisasm, read_sass
from benchmarks.compiled.compiling import compiling as compile_launches
from benchmarks.compiled.sass import accesses, byte_count, innermost_loops

TRITON = "3.7.1"
SOURCE = "".join(Path(module).read_text() for module in (__file__, cases.__file__, compiling.__file__, sass.__file__))


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


def count_loop(instructions: list[str], threads: int, elements: int) -> Loop:
    reads, writes = accesses(instructions, "LDG"), accesses(instructions, "STG")
    spills = sum(bool(re.match(r"LDL|STL", text)) for text in instructions)
    products = sum(bool(re.match(r"\w*MMA\b", text)) for text in instructions)
    bytes_read, bytes_written = (byte_count(widths, threads) / elements for widths in (reads, writes))
    return Loop(len(instructions), products, spills, dict(reads), dict(writes), bytes_read, bytes_written)


def count(case: Case, target: str, known: dict[str, Counts]) -> Counts:
    """Compile one case for the target and count, or take the counts of the same code from `known`."""
    with compile_launches(target, case.kernel) as compiled:
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
    report = BUILD / f"{target}.json"
    rows = json.loads(report.read_text())["configurations"] if report.exists() else []
    known = {row["name"]: load_counts(row) for row in rows}
    found = [count(case, target, known) for case in CASES.values()]
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=BUILD, delete=False) as file:
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
