"""The stages of a run one after the other, each in processes of its own, and what is written of them."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.on_gpu.floors import Floors
from benchmarks.on_gpu.report import Document, failures, finish, index, summary_lines
from benchmarks.on_gpu.stages import Stage, names_of
from benchmarks.on_gpu.tune import replacement, tuning_text
from benchmarks.on_gpu.work import Result, in_processes

# of the time, what checks may take, and of tuning, compiling: both share processors and GPU among several processes.
CHECKS_SHARE, COMPILE_SHARE = 0.45, 0.4
MOST_PROCESSES = 8

# results of all tasks of a stage, begun before a time of time.time(); for tuning, the architecture of the tables.
Runner = Callable[[Stage, float, str], list[Result]]


def command(stage: Stage, until: float, threads: int, orders: Path, lines: Path) -> Sequence[str]:
    return [sys.executable, "-m", "benchmarks.on_gpu", *map(str, (stage, orders, lines, until, threads))]


def run_in_processes(stage: Stage, until: float, tables: str) -> list[Result]:
    """Stages that are timed have the GPU to themselves."""
    processors = len(os.sched_getaffinity(0))
    count = max(1, min(MOST_PROCESSES, processors // 2)) if stage in ("checks", "compile") else 1
    return in_processes(names_of(stage, tables), partial(command, stage, until, processors // count), until, count)


def measure_device(run: Runner, until: float) -> Result:
    (device,) = run("floors", until, "")
    if "floors" not in device:
        raise RuntimeError(f"the device could not be measured: {device}")
    print(", ".join(device["about"].values()), flush=True)
    return device


def measure(run: Runner, seconds: float) -> Document:
    """Floors, then checks, then benchmarks, which take what time is left."""
    began = time.time()
    device = measure_device(run, began + seconds)
    print("checking every kernel against fp64", flush=True)
    checks = run("checks", began + CHECKS_SHARE * seconds, device["tables"])
    print("timing", flush=True)
    cases = run("cases", began + seconds, device["tables"])
    floors = Floors(**device["floors"])
    finished = [finish(case, floors) for case in cases]
    return {"device": device, "checks": checks, "cases": finished, "seconds": time.time() - began}


def write_report(document: Document, out: Path) -> int:
    """Returns the exit status: 1 if a kernel is wrong, or a check did not run."""
    (out / "measured.json").write_text(json.dumps(document, indent=1))
    (out / "index.md").write_text(index(document))
    print("\n".join(summary_lines(document)))
    print(f"report: {out / 'index.md'}")
    return 1 if failures(document) else 0


def tune(run: Runner, out: Path, seconds: float) -> int:
    """Prints the replacement tables and writes them and all times; status 1 where nothing could be tried."""
    began = time.time()
    device = measure_device(run, began + seconds)
    print(f"compiling candidates for {device['tables']}", flush=True)
    run("compile", began + COMPILE_SHARE * seconds, device["tables"])
    print("timing them", flush=True)
    records = run("tune", began + seconds, device["tables"])
    text, source = tuning_text(records), replacement(records)
    (out / "launch_tables.json").write_text(json.dumps({"device": device, "places": records}, indent=1))
    (out / "launch_tables.md").write_text(text)
    (out / "launch_tables.py").write_text(source)
    print(text)
    print(source)
    left_out = [record["name"] for record in records if not record.get("seconds")]
    print(f"left out: {'; '.join(left_out) or 'nothing'}\ntimes and tables: {out}")
    return 1 if len(left_out) == len(records) else 0
