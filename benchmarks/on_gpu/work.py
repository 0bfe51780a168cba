"""Tasks on the device in processes of their own: a kernel that breaks one leaves the others to go on.

A process writes lines of JSON: before a task tries a way, that way's name, and then the task's result. Where it ends
early, or the device is lost to it, the way that was being tried gets the blame, and the task runs again without it in
another process; with no such way, the task itself has failed.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.timing import OUT_OF_TIME, Poisoned, describe, is_lost

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]
Command = Callable[[Path, Path], Sequence[str]]
# how far a process may overrun its time before it counts as hanging.
GRACE_SECONDS = 45.0
LOST_STATUS = 3
HANGS = "hangs: its process had to be ended"


@dataclass
class Order:
    """A task by name, and the ways it leaves out, each with the reason."""

    name: str
    without: dict[str, str] = field(default_factory=dict)


# runs without these ways, and tells which one it tries next.
Task = Callable[[Mapping[str, str], Callable[[str], None]], Result]


def carry_out(
    tasks: Mapping[str, Task], orders: Iterable[Order], until: float, write: Callable[[Result], None]
) -> None:
    """Writes a result for every order, in order; raises Poisoned, and has written why, where the device is lost."""
    for order in orders:
        write({"begins": order.name})
        try:
            if time.time() > until:
                result: Result = {"not_run": OUT_OF_TIME}
            else:
                result = tasks[order.name](order.without, lambda way: write({"trying": way}))
        except Exception as error:
            # whatever a task raises is its result; the others still have their turn.
            result = {"failed": describe(error)}
            if isinstance(error, Poisoned) or is_lost(error):
                write({"lost": str(error)})
                raise Poisoned(str(error)) from error
        write({"name": order.name, **result})


def serve(tasks: Mapping[str, Task], orders: Path, lines: Path, until: float) -> None:
    """The life of a process: orders from one file, results to another as they come."""
    with lines.open("a") as file:

        def write(result: Result) -> None:
            file.write(json.dumps(result) + "\n")
            file.flush()
            if "name" in result:
                print(f"  {result['name']}", file=sys.stderr, flush=True)

        try:
            carry_out(tasks, [Order(**order) for order in json.loads(orders.read_text())], until, write)
        except Poisoned:
            sys.exit(LOST_STATUS)


def run_process(command: Command, orders: Sequence[Order], until: float) -> tuple[list[Result], str]:
    """The lines a process left, and how it ended, in words."""
    with tempfile.TemporaryDirectory() as folder:
        given, lines = Path(folder) / "orders.json", Path(folder) / "lines.jsonl"
        given.write_text(json.dumps([asdict(order) for order in orders]))
        lines.touch()
        with subprocess.Popen(command(given, lines), stdout=sys.stderr, cwd=ROOT) as process:
            try:
                end = f"its process ended with status {process.wait(max(until - time.time(), 0) + GRACE_SECONDS)}"
            except subprocess.TimeoutExpired:
                process.kill()
                end = HANGS
        # the last line may be half written.
        return [json.loads(line) for line in lines.read_text().split("\n")[:-1]], end


def supervise(orders: Sequence[Order], command: Command, until: float) -> list[Result]:
    """A result for every order, by as many processes as it takes."""
    left, results = list(orders), []
    while left and time.time() <= until:
        lines, end = run_process(command, left, until)
        done = [line for line in lines if "name" in line]
        results += done
        left = left[len(done) :]
        if not left:
            break
        if not any("begins" in line for line in lines):
            return [*results, *({"name": order.name, "failed": end} for order in left)]
        after = lines[1 + max((i for i, line in enumerate(lines) if "name" in line), default=-1) :]
        reason = next((f"lost the device: {line['lost']}" for line in after if "lost" in line), end)
        tried = [line["trying"] for line in after if "trying" in line]
        order = left[0]
        if tried and tried[-1] not in order.without and reason != HANGS:
            order.without[tried[-1]] = reason
        else:
            # what hangs has used up the time in which the task could run again.
            results.append({"name": order.name, "failed": ": ".join([*tried[-1:], reason])})
            left = left[1:]
    return [*results, *({"name": order.name, "not_run": OUT_OF_TIME} for order in left)]


def in_processes(names: Sequence[str], command: Command, until: float, count: int = 1) -> list[Result]:
    """Results of all tasks, in the order of their names, `count` processes at a time."""
    shares = [[Order(name) for name in names[start::count]] for start in range(min(count, len(names)))]
    with ThreadPoolExecutor(max(len(shares), 1)) as pool:
        results = [
            result for share in pool.map(partial(supervise, command=command, until=until), shares) for result in share
        ]
    return sorted(results, key=lambda result: names.index(result["name"]))


def in_place(tasks: Mapping[str, Task], until: float) -> list[Result]:
    """The same in this process, which ends with the first lost device."""
    lines: list[Result] = []
    carry_out(tasks, map(Order, tasks), until, lines.append)
    return [line for line in lines if "name" in line]
