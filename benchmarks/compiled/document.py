"""The static figures of everything, as one JSON file that is kept with the sources, and what a change did to them."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton

from benchmarks.compiled.cases import CASES, Case
from benchmarks.compiled.compiling import BUILD, TARGETS
from benchmarks.compiled.counts import Counts, gate, load_counts
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.model import occupancy
from benchmarks.compiled.peers import PEERS, peer_figures
from benchmarks.compiled.traffic import Bytes
from benchmarks.compiled.traffic_figures import Figure, counted_figures
from clex_kernels import kernels

KEPT = Path(__file__).resolve().parent.parent / "gpu_static.json"
# what a figure of bytes may depend on.
SOURCES = [*sorted(Path(kernels.__path__[0]).glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
REPORTED = {case.name: case for case in CASES.values() if case.role != "variant"}
# the slowest to compile first, so that no process is left alone with one.
ORDER = ("sm_100", "gfx942", "sm_90", "sm_120", "sm_80")


@dataclass(frozen=True)
class Static:
    """Counts by target and name, ours and peers', with their main loops alone, and bytes per element."""

    triton: str
    counts: dict[str, dict[str, Counts]]
    traffic: list[Figure]

    def of(self, target: str, name: str) -> Counts:
        return self.counts[target][name]


def reported_cases(target: str) -> list[Case]:
    """What the report compiles for a target; where no loops can be read, nothing to compare them with."""
    peers = [peer.case for peer in PEERS.values()]
    if target not in HARDWARE:
        return [case for case in REPORTED.values() if case.role == "configuration"] + peers
    return [*REPORTED.values(), *peers]


def count_target(target: str) -> dict[str, Counts]:
    found = {}
    for counts in gate(target, reported_cases(target)):
        loops = None if counts.loops is None else [loop for loop in (counts.main_loop,) if loop]
        # the key tells one compilation from another, on one machine.
        found[counts.name] = replace(counts, key="", loops=loops)
    return found


def count_bytes() -> list[Figure]:
    """Bytes that calls move, ours and peers', or those of the last time if no source has changed since."""
    key = hashlib.sha256("".join(path.read_text() for path in SOURCES).encode()).hexdigest()
    cache = BUILD / "bytes.json"
    if cache.exists() and (known := json.loads(cache.read_text()))["key"] == key:
        return [load_figure(row) for row in known["figures"]]
    figures = [*counted_figures(), *peer_figures()]
    BUILD.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"key": key, "figures": list(map(figure_row, figures))}))
    return figures


def collect() -> Static:
    """Everything, compiled and counted where no cached counts are at hand."""
    with ProcessPoolExecutor(2) as pool:
        figures = pool.submit(count_bytes)
        counted = dict(zip(ORDER, pool.map(count_target, ORDER), strict=True))
        return Static(triton.__version__, {target: counted[target] for target in TARGETS}, figures.result())


def figure_row(figure: Figure) -> dict[str, Any]:
    return {**vars(figure), "parts": figure.parts}


def load_figure(row: dict[str, Any]) -> Figure:
    return Figure(**{**row, "parts": {part: Bytes(*moved) for part, moved in row["parts"].items()}})


def write(static: Static, path: Path = KEPT) -> None:
    """One configuration a line, so that a change shows which."""

    def lines(rows: Iterable[dict[str, Any]]) -> str:
        return ",\n".join(json.dumps(row) for row in rows)

    blocks = [f'"{target}": [\n{lines(map(asdict, rows.values()))}\n]' for target, rows in static.counts.items()]
    figures = lines(map(figure_row, static.traffic))
    head = f'{{\n"triton": "{static.triton}",\n"traffic": [\n{figures}\n],\n"counts": {{\n'
    path.write_text(head + ",\n".join(blocks) + "\n}}\n")


def read(path: Path = KEPT) -> Static:
    document = json.loads(path.read_text())
    counts = {target: {row["name"]: load_counts(row) for row in rows} for target, rows in document["counts"].items()}
    return Static(document["triton"], counts, [load_figure(row) for row in document["traffic"]])


def regressions(before: Counts, after: Counts, target: str) -> list[str]:
    """In what a configuration got worse: instructions of a loop, spills, or blocks that fit a multiprocessor.

    Where there are more loops or fewer than before, the main one is compared alone.
    """
    found = []
    loops = [counts.loop_instructions or [] for counts in (before, after)]
    if len(loops[0]) != len(loops[1]):
        loops = [[counts.main_loop.instructions] if counts.main_loop else [] for counts in (before, after)]
    for known, now in zip(*loops, strict=False):
        if now > known:
            found.append(f"{now} instructions in a loop, {known} before")
    if after.spill_bytes > before.spill_bytes:
        found.append(f"{after.spill_bytes} bytes spilled, {before.spill_bytes} before")
    if target in HARDWARE:
        held = [occupancy(counts, HARDWARE[target]) for counts in (before, after)]
        if held[1].blocks < held[0].blocks:
            found.append(
                f"{held[1].blocks} blocks a multiprocessor by {held[1].limit}, {held[0].blocks} before "
                f"(registers {before.registers} to {after.registers}, shared memory {before.shared_bytes} to "
                f"{after.shared_bytes} bytes)"
            )
    return [f"{target}, {after.name}: {what}" for what in found]


def compare(before: Static, after: Static) -> tuple[list[str], list[str]]:
    """What got worse, and all configurations whose figures are not the kept ones any more."""
    worse, changed = [], []
    for target, rows in after.counts.items():
        known = before.counts.get(target, {})
        for name, counts in rows.items():
            if name in known:
                worse += regressions(known[name], counts, target)
            if known.get(name) != counts:
                changed.append(f"{target}, {name}")
        changed += [f"{target}, {name}: gone" for name in known.keys() - rows.keys()]
    kept = {figure.name: figure for figure in before.traffic}
    changed += [figure.name for figure in after.traffic if kept.pop(figure.name, None) != figure]
    return worse, [*changed, *(f"{name}: gone" for name in kept)]
