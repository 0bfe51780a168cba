"""Counts what the compiler made of every configuration.

Spills come from `ptxas -v`; where they are, and how wide global memory is accessed, from the SASS. Counts change with
Triton's version: they hold for the version TRITON, which is the one to pin. They are kept, one JSON file a target, in
build/compiled, and made again when absent or when a kernel or a file of this package changes.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.compiled import cases, compiling, sass
from benchmarks.compiled.cases import CASES, Case
from benchmarks.compiled.compiling import BUILD, TARGETS, count_ptxas, find_nvdisasm, read_sass
from benchmarks.compiled.compiling import compiling as compile_launches
from benchmarks.compiled.sass import accesses, byte_count, count_classes, innermost_loops, shared_bytes

TRITON = "3.7.1"
PACKED = ("FADD2", "FMUL2", "FFMA2")
SOURCE = "".join(Path(module).read_text() for module in (__file__, cases.__file__, compiling.__file__, sass.__file__))


@dataclass
class Loop:
    """An innermost loop: instructions in all, by class, and of these on tensor cores; packed fp32 ones; accesses of
    loads, copies to shared memory and stores by width in bits; the bytes that loads and stores move per element; and
    the bytes that a block asks of L2 and its warps each of shared memory.
    """

    instructions: int
    classes: dict[str, int]
    packed: int
    reads: dict[str, int]
    copies: dict[str, int]
    writes: dict[str, int]
    bytes_read: float
    bytes_written: float
    bytes_issued: int
    shared_bytes: int

    @property
    def products(self) -> int:
        return self.classes.get("tensor", 0)

    @property
    def spills(self) -> int:
        return self.classes.get("spill", 0)


@dataclass
class Counts:
    """What one compiled configuration needs and does; the last four are None where no SASS could be read.

    What stands outside belongs to no innermost loop; loop_instructions are of every one, in the order of the code.
    """

    name: str
    key: str
    kernel: str
    constants: dict[str, int | bool]
    warps: int
    shared_bytes: int
    tensor_columns: int
    registers: int
    spill_bytes: int
    instructions: int | None = None
    outside_instructions: int | None = None
    loop_instructions: list[int] | None = None
    loops: list[Loop] | None = None

    @property
    def main_loop(self) -> Loop | None:
        """The loop that does the work: of those with at least half of the most products, or else fp32 arithmetic, fp64
        arithmetic or accesses, the shortest, which is the one that needs no masks.
        """
        for kind in ("tensor", "fp32", "fp64", "global"):
            found = [(loop.classes.get(kind, 0), loop) for loop in self.loops or ()]
            most = max((n for n, _ in found), default=0)
            if most:
                return min((loop for n, loop in found if 2 * n >= most), key=lambda loop: loop.instructions)
        return None


def count_loop(instructions: list[str], threads: int, elements: int) -> Loop:
    reads, copies, writes = (accesses(instructions, opcode) for opcode in ("LDG", "LDGSTS", "STG"))
    issued = [byte_count(widths, threads) for widths in (reads, copies, writes)]
    return Loop(
        *(len(instructions), count_classes(instructions), sum(text.startswith(PACKED) for text in instructions)),
        *(dict(reads), dict(copies), dict(writes)),
        *((issued[0] + issued[1]) / elements, issued[2] / elements, sum(issued), shared_bytes(instructions)),
    )


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
    shared, tensor = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    counts = Counts(case.name, key, kernel.metadata.name, constants, warps, shared, tensor, registers, spill_bytes)
    if is_nvidia and nvdisasm:
        instructions, loops = innermost_loops(read_sass(kernel.asm["cubin"], nvdisasm))
        counts.instructions = len(instructions)
        counts.loop_instructions = list(map(len, loops))
        counts.outside_instructions = len(instructions) - sum(counts.loop_instructions)
        counts.loops = [count_loop(loop, 32 * warps, case.elements(constants)) for loop in loops]
    return counts


def gate(target: str, cases: Iterable[Case] = CASES.values()) -> list[Counts]:
    """Counts of the cases for the target, read from and written to its report."""
    BUILD.mkdir(parents=True, exist_ok=True)
    report = BUILD / f"{target}.json"
    with open(report.with_suffix(".lock"), "w") as lock:
        # who comes second finds everything compiled.
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(report.read_text())["configurations"] if report.exists() else []
        known = {row["name"]: load_counts(row) for row in rows}
        found = [count(case, target, known) for case in cases]
        known |= {counts.name: counts for counts in found}
        rows = [asdict(counts) for counts in known.values()]
        content = {"target": target, "triton": triton.__version__, "configurations": rows}
        # a run that is stopped here must not leave half a report.
        unfinished = report.with_suffix(".part")
        unfinished.write_text(json.dumps(content))
        unfinished.replace(report)
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
