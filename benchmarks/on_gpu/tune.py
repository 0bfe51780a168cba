"""Measures the candidates of every launch table on this device, and writes the tables that it would have instead.

A candidate that does not compile, raises or is wrong is out. Another entry replaces today's where it is faster by more
than GAIN: less is noise. Of each table the entries of this device's architecture are tried, the most used first.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.compiled.candidates import TABLES, candidates, exchanged, render_table
from benchmarks.measure import Way
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.timing import Plan, medians, ready, time_ways
from benchmarks.on_gpu.tune_subjects import SUBJECTS, Subject, TuneSizes
from benchmarks.on_gpu.work import Result, Task
from benchmarks.summary import duration, markdown_table, number
from clex_kernels.kernels.launch_tables import ANY, architecture_of

GAIN = 0.03
SECONDS, ROUNDS = 3.0, (10, 40)
# the sizes that most models have; the others come after all kernels have had these.
USUAL = (128, 16, ANY)


@dataclass(frozen=True)
class Slot:
    """A place in a table."""

    table: str
    kind: str
    size: int

    @property
    def name(self) -> str:
        size = "any size" if self.size == ANY else f"up to {self.size}"
        return f"{self.table}, {self.kind}, {size}"


def slots_of(architecture: str) -> list[Slot]:
    """All places of an architecture: 16 bits and usual sizes first."""
    slots = [
        Slot(table, kind, size)
        for table in SUBJECTS
        for kind, rows in TABLES[table][architecture].items()
        for size in rows
    ]
    return sorted(slots, key=lambda slot: (slot.kind != "half" and slot.size != ANY, slot.size not in USUAL))


def candidate_way(slot: Slot, architecture: str, entry: tuple[int, ...], subject: Subject) -> Way:
    def run() -> Any:
        with exchanged(TABLES[slot.table], architecture, slot.kind, slot.size, entry):
            return subject.run()

    return Way(
        repr(entry), run, prepare=lambda turn: subject.spoil(), errors=lambda turn, result: subject.errors(result)
    )


def try_slot(
    gpu: Gpu,
    architecture: str,
    slot: Slot,
    sizes: TuneSizes,
    until: float,
    without: Mapping[str, str],
    trying: Callable[[str], None],
    only_compiles: bool = False,
) -> Result:
    """Medians of all candidates of a place, today's entry first; or only their first calls, which compile them."""
    gpu.forget()
    subject = SUBJECTS[slot.table](gpu, slot.kind, slot.size, sizes)
    entries = candidates(slot.table, architecture, slot.kind, slot.size)
    ways = [ready(candidate_way(slot, architecture, entry, subject)) for entry in entries]
    plan = Plan(0.0 if only_compiles else SECONDS, until, (0, 0) if only_compiles else ROUNDS)
    with torch.no_grad():
        times = time_ways(gpu, ways, plan, without, trying)
    return {
        **vars(slot),
        "architecture": architecture,
        "entries": {repr(entry): list(entry) for entry in entries},
        "today": repr(entries[0]),
        "seconds": medians(times.seconds),
        "spreads": times.spreads(),
        "reasons": times.reasons,
    }


def tune_tasks(gpu: Gpu, sizes: TuneSizes, until: float, only_compiles: bool = False) -> dict[str, Task]:
    architecture = architecture_of(torch.empty(1, device=gpu.device))
    return {
        slot.name: partial(try_slot, gpu, architecture, slot, sizes, until, only_compiles=only_compiles)
        for slot in slots_of(architecture)
    }


def chosen(record: Result) -> str:
    """The entry that the place should have, by name."""
    seconds, today = record["seconds"], record["today"]
    if not seconds:
        return today
    fastest = min(seconds, key=seconds.__getitem__)
    is_worth_it = today not in seconds or seconds[fastest] < (1 - GAIN) * seconds[today]
    return fastest if is_worth_it else today


def replacement(records: Iterable[Result]) -> str:
    """The tables in which something changes, as Python source for launch_tables.py."""
    tables: dict[str, Any] = {}
    for record in records:
        if "seconds" in record and chosen(record) != record["today"]:
            name = record["table"]
            table = tables.setdefault(name, copy.deepcopy(TABLES[name]))
            rows = table[record["architecture"]][record["kind"]]
            rows[record["size"]] = type(rows[record["size"]])(*record["entries"][chosen(record)])
    if not tables:
        return "# every entry of today's tables is the fastest, or within what is noise of it.\n"
    return "\n\n".join(render_table(name, table) for name, table in tables.items()) + "\n"


def tuning_text(records: Iterable[Result]) -> str:
    """Times of all candidates, and what was left out, in Markdown."""
    parts = ["# Launch tables, measured", f"Another entry is taken where it is more than {GAIN:.0%} faster."]
    for record in records:
        if "seconds" not in record:
            parts.append(f"## {record['name']}\n\n{record.get('not_run') or record.get('failed')}")
            continue
        today = record["seconds"].get(record["today"])
        rows = []
        for entry in record["entries"]:
            seconds = record["seconds"].get(entry)
            marks = [("today's", record["today"]), ("chosen", chosen(record))]
            rows.append(
                [
                    entry,
                    duration(seconds) if seconds else record["reasons"].get(entry, "-"),
                    number(seconds / today, "x") if seconds and today else "-",
                    ", ".join(mark for mark, which in marks if which == entry),
                ]
            )
        parts.append(f"## {record['name']}\n\n{markdown_table(['entry', 'median time', 'over todays', ''], rows)}")
    return "\n\n".join(parts) + "\n"
