"""Chooses entries of the launch tables by the static model, and prints the tables that it would have instead.

    python -m benchmarks.compiled.choose [--architecture sm_90] [--kernel attention_fwd] [--kind half]

Each candidate is compiled ahead of time in the place of today's entry. Dropped are those that spill in a loop or ask
more shared or tensor memory than there is. To the pipes of the static model come two things that tiles decide: how
evenly few programs fill the multiprocessors, and whether enough is on its way to cover memory's latency. Other latency
is not modelled, so a move has to be worth 5 %, to leave a multiprocessor warps that hide it, and outside of loops to
spill little. Kernels that stream are as fast as memory whatever their tile, and on AMD no loop is counted:
these tables are for measurement to choose.
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.compiled import counts as counting
from benchmarks.compiled.candidates import CANDIDATES, TABLES, candidates, exchanged, render_table
from benchmarks.compiled.cases import CASES, Case
from benchmarks.compiled.counts import Counts
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.launches import AttentionLaunch, launch_decode
from benchmarks.compiled.model import model
from clex_kernels.kernels.launch_tables import ANY

__all__ = ["CANDIDATES", "TABLES", "candidates", "exchanged", "render_table"]

# clocks until memory answers: an assumption, like the figures of hardware.py.
LATENCY = 1000
# a smaller gain is no reason to move.
GAIN = 0.05
FEWEST_WARPS = 8
# registers moved to memory and back outside of loops, by instructions of a trip.
MOST_SPILLS = 0.1
MODELLED = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv", "decode", "qkv_rotary")
# the shape of the case that takes the entry of each size.
HEADS = {64: "D64-R32", 128: "D128-R64", 192: "D128-R16", 256: "D256-R128", 512: "D256-R32"}
ROWS = {rows: f"D128-R64-rows{min(rows, 8192)}" for rows in (16, 64, 512, ANY)}
DTYPES = {"half": "bfloat16", "float32": "float32"}


@dataclass(frozen=True)
class Trial:
    """An entry and what the compiler made of it: the modelled clocks of a thousand multiply-adds, the pipe that takes
    them, and the warps that share a multiprocessor; or why it is out.
    """

    entry: tuple[int, ...]
    counts: Counts | None = None
    clocks: float = float("inf")
    bound: str = ""
    warps: int = 0
    dropped: tuple[str, ...] = ()

    @property
    def spills(self) -> float:
        """Spills outside of loops, by instructions of a trip."""
        return self.counts.spill_bytes / 4 / self.counts.main_loop.instructions

    def __str__(self) -> str:
        if self.dropped:
            return f"{self.entry}: out, {'; '.join(self.dropped)}"
        counts = self.counts
        needs = f"{counts.registers} registers, {counts.spill_bytes} bytes spilled, {counts.shared_bytes} shared"
        return f"{self.entry}: {self.clocks:.3f} clocks ({self.bound}), {self.warps} warps, {needs}"


def case_of(name: str, kind: str, size: int) -> Case | None:
    """The case whose launch takes the entry of this size, if there is one."""
    sizes = ROWS if name == "qkv_rotary" else HEADS
    return CASES.get(f"{name}-{DTYPES[kind]}-{sizes[size]}")


def attempt(name: str, architecture: str, kind: str, size: int, entry: tuple[int, ...], case: Case) -> Trial:
    """The entry compiled in its place, counted and modelled."""
    with exchanged(TABLES[name], architecture, kind, size, entry):
        try:
            counts = counting.count(case, architecture, {})
        except Exception as error:
            # compilers raise all kinds.
            return Trial(entry, dropped=(f"does not compile: {error}".splitlines()[0],))
    return judge(entry, case, counts, architecture, program_count(name, size, counts))


def judge(entry: tuple[int, ...], case: Case, counts: Counts, architecture: str, programs: int = ANY) -> Trial:
    """The trial of a counted entry, in a launch of so many programs."""
    dropped = counting.problems(case, counts, architecture)
    if counts.tensor_columns > HARDWARE[architecture].tensor_columns:
        # Triton 3.7 compiles a kernel that traps.
        dropped.append(f"{case.name}: {counts.tensor_columns} columns of tensor memory")
    if dropped:
        return Trial(entry, counts, dropped=tuple(dropped))
    work = case.work(counts.constants)
    found = model(counts, work, case.itemsize, architecture)
    clocks = dict(found.clocks)
    fill = programs / HARDWARE[architecture].multiprocessors
    for pipe in clocks.keys() - {"memory"}:
        # multiprocessors with a program more than others decide, half a one on average; memory serves whoever asks.
        clocks[pipe] *= max(1, fill + 0.5) / fill
    if work.memory_bytes:
        clocks["latency"] = LATENCY / ((entry.num_stages - 1) * min(fill, found.occupancy.blocks))
    bound = max(clocks, key=clocks.__getitem__)
    return Trial(entry, counts, 1000 * clocks[bound] / work.macs, bound, found.occupancy.warps)


def program_count(name: str, size: int, counts: Counts) -> int:
    """Programs of a launch: projections of `size` rows, one sequence decoded, or more than enough.

    Projections have half the case's columns: what suits fewer has to suit smaller models too.
    """
    if name == "decode":
        return 128
    if name != "qkv_rotary":
        return ANY
    columns = (counts.constants["H"] + 2 * counts.constants["G"]) * counts.constants["D"]
    blocks = math.ceil(min(size, 8192) / counts.constants["BLOCK_M"])
    return blocks * math.ceil(columns / 2 / counts.constants["BLOCK_N"])


def widest(case: Case) -> Case:
    """The case with the head whose parts take the most columns, 128 and 256: D = 256 with 48 pairs."""
    head = {"dims": 256, "pairs": 48, "dtype": torch.bfloat16 if case.itemsize == 2 else torch.float32}
    is_decode = case.kernel == "decode_kernel"
    launch = partial(launch_decode, page=16, **head) if is_decode else AttentionLaunch(**head).backward
    return replace(case, name=f"{case.kernel} of D256-R48", launch=launch)


def faults(name: str, architecture: str, kind: str, size: int, entry: tuple[int, ...]) -> tuple[str, ...]:
    """What is wrong with the entry in other cases that may take it, such as a softcap or other parts of a head."""
    is_half = kind == "half"
    cases = [c for c in CASES.values() if c.kernel == f"{name}_kernel" and (c.itemsize == 2) == is_half]
    if size == max(HEADS):
        cases.append(widest(cases[0]))
    trials = [attempt(name, architecture, kind, size, entry, case) for case in cases]
    return tuple(fault for trial in trials for fault in trial.dropped)


def select(trials: list[Trial]) -> Trial:
    """The fastest if it is worth the move from the first, which is today's."""
    today, *others = trials
    able = [trial for trial in others if not trial.dropped]
    if not today.dropped:
        able = [
            trial for trial in able if trial.warps >= FEWEST_WARPS and trial.spills <= max(MOST_SPILLS, today.spills)
        ]
    best = min(able, key=lambda trial: trial.clocks, default=today)
    return best if best.clocks < (1 - GAIN) * today.clocks else today


def choose(name: str, architecture: str, kind: str) -> None:
    """Put the chosen entries into the table, and print what was found of each."""
    for size in list(TABLES[name][architecture][kind]):
        print(f"{name} {architecture} {kind}, up to {size}", flush=True)
        case = case_of(name, kind, size)
        if case is None:
            print("  no case takes this entry", flush=True)
            continue
        trials = []
        for entry in candidates(name, architecture, kind, size):
            trials.append(attempt(name, architecture, kind, size, entry, case))
            print(f"  {trials[-1]}", flush=True)
        chosen = select(trials)
        while chosen is not trials[0] and (found := faults(name, architecture, kind, size, chosen.entry)):
            at = trials.index(chosen)
            trials[at] = replace(chosen, dropped=found)
            print(f"  {trials[at]}", flush=True)
            chosen = select(trials)
        TABLES[name][architecture][kind][size] = chosen.entry
        gain = 1 - chosen.clocks / trials[0].clocks
        print(f"  -> {chosen.entry}" + (f", modelled {gain:.0%} faster" if chosen is not trials[0] else ", as it is"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Chooses launch tables by the static model (no GPU needed).")
    parser.add_argument("--architecture", action="append", choices=list(HARDWARE))
    parser.add_argument("--kernel", action="append", choices=MODELLED)
    parser.add_argument("--kind", action="append", choices=list(DTYPES))
    settings = parser.parse_args()
    names = settings.kernel or MODELLED
    for name in names:
        for architecture in settings.architecture or HARDWARE:
            for kind in settings.kind or DTYPES:
                choose(name, architecture, kind)
    for name in names:
        print(f"\n{render_table(name, TABLES[name])}")


if __name__ == "__main__":
    main()
