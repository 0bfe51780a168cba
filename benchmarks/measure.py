"""Checked timing of several ways to do one thing, alternating in one run, on top of pytest-benchmark.

pytest-benchmark times one function to its end and then the next, so a ratio of two of its figures holds every drift of
the machine between them. Here one round runs every way once: the rivals inside pytest-benchmark's untimed `setup`, each
under the same clock, then ours as the benchmarked call. Ratios are of medians over rounds. Before a timed call the
way's inputs are replaced by the next set; after it, untimed, what it returned is compared with fp64, and the largest
error is kept. A way that is wrong, and not just inexact, is no rival: it raises.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    # what is measured on a GPU does without it.
    from pytest_benchmark.fixture import BenchmarkFixture

Label = Literal["measured", "counted", "modelled"]


@dataclass(frozen=True)
class Way:
    """One formulation of an operation.

    Only `run` is timed. `prepare(turn)` puts input set `turn` in place before it, `errors(turn, result)` compares what
    it returned with fp64. A slow way may sit out: it runs in every `every`-th round.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[int], None]
    errors: Callable[[int, Any], dict[str, float]]
    every: int = 1


@dataclass(frozen=True)
class Goal:
    """A figure of the design with what was found; `sense` says on which side of `bound` it must lie."""

    what: str
    found: float
    sense: Literal["at most", "at least"]
    bound: float
    unit: str = "x"
    label: Label = "measured"

    @property
    def met(self) -> bool:
        # a comparison with NaN is false, so a figure that could not be found is a missed goal.
        return self.found <= self.bound if self.sense == "at most" else self.found >= self.bound


@dataclass(frozen=True)
class Comparison:
    """Median seconds and largest errors of every way, by name."""

    seconds: dict[str, float]
    errors: dict[str, dict[str, float]]
    rounds: dict[str, int]

    def ratio(self, slow: str, fast: str) -> float:
        return self.seconds[slow] / self.seconds[fast]

    def fastest(self, names: Sequence[str]) -> str:
        return min(names, key=self.seconds.__getitem__)


def run_plainly(way: Way) -> Any:
    return way.run()


def compare(
    benchmark: "BenchmarkFixture",
    ours: Way,
    others: Sequence[Way],
    rounds: int,
    wrong: float = 0.05,
    first: Callable[[Way], Any] = run_plainly,
) -> Comparison:
    """Times all ways in alternation; pytest-benchmark's own figures are those of `ours`.

    The very first, untimed call of a way is left to `first`, which returns its result.

    Raises:
        ArithmeticError: some error is NaN or above `wrong`.
    """
    ways = [*others, ours]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    errors: dict[str, dict[str, float]] = {way.name: {} for way in ways}

    def check(way: Way, turn: int, result: Any) -> None:
        for quantity, error in way.errors(turn, result).items():
            if not error <= wrong:
                raise ArithmeticError(f"{way.name}: expected an error of {quantity} of at most {wrong}, got {error}")
            errors[way.name][quantity] = max(error, errors[way.name].get(quantity, 0.0))

    def timed(way: Way) -> Any:
        start = time.perf_counter()
        result = way.run()
        seconds[way.name].append(time.perf_counter() - start)
        return result

    for way in ways:
        way.prepare(0)
        check(way, 0, first(way))

    turn = 0
    last: list[Any] = []

    def setup() -> None:
        nonlocal turn
        if last:
            check(ours, turn, last.pop())
        turn += 1
        # another order every round, so that no way always follows the same one.
        shift = turn % len(others) if others else 0
        for way in [*others[shift:], *others[:shift]]:
            if turn % way.every == 0:
                way.prepare(turn)
                check(way, turn, timed(way))
        ours.prepare(turn)

    benchmark.pedantic(lambda: last.append(timed(ours)), setup=setup, rounds=rounds, iterations=1)
    check(ours, turn, last.pop())
    medians = {name: statistics.median(values) if values else float("nan") for name, values in seconds.items()}
    return Comparison(medians, errors, {name: len(values) for name, values in seconds.items()})


def record(
    benchmark: "BenchmarkFixture",
    *,
    section: str,
    row: str,
    case: str,
    memory: str,
    weights: str,
    error_unit: str,
    comparison: Comparison,
    ours: str,
    rivals: Sequence[str] = (),
    floor: str | None = None,
    overhead: tuple[str, str] | None = None,
    goals: Sequence[Goal] = (),
    notes: Sequence[str] = (),
    curves: dict[str, Any] | None = None,
    positions: int | None = None,
) -> None:
    """Puts everything the report says about this case into the benchmark's JSON.

    The rival is the fastest of `rivals`, its `ratio` its time over ours.
    """
    rival = comparison.fastest(rivals) if rivals else None
    benchmark.extra_info.update(
        section=section,
        row=row,
        case=case,
        memory=memory,
        weights=weights,
        threads=torch.get_num_threads(),
        label="measured",
        seconds=comparison.seconds,
        rounds=comparison.rounds,
        errors=comparison.errors,
        error_unit=error_unit,
        ours=ours,
        rival=rival,
        ratio=comparison.ratio(rival, ours) if rival else None,
        error=max(comparison.errors.get(ours, {}).values(), default=None),
        floor=floor,
        overhead=overhead,
        goals=[{**asdict(goal), "met": goal.met} for goal in goals],
        notes=list(notes),
        curves=curves or {},
        positions=positions,
    )


def max_difference(found: Tensor, exact: Tensor, chunk: int = 1 << 18) -> float:
    """max |found - exact| in fp64, in cache-sized pieces; NaN where `found` has one."""
    if found.shape != exact.shape:
        raise ValueError(f"found: expected shape {list(exact.shape)}, got {list(found.shape)}")
    found, exact = found.detach().reshape(-1), exact.reshape(-1)
    difference = torch.empty(min(chunk, found.numel()), dtype=torch.float64)
    worst = torch.zeros((), dtype=torch.float64)
    for start in range(0, found.numel(), chunk):
        piece = exact[start : start + chunk]
        part = difference[: piece.numel()]
        torch.sub(found[start : start + chunk], piece, out=part)
        worst = torch.maximum(worst, torch.linalg.vector_norm(part, float("inf")))
    return worst.item()


def errors_over_largest(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """By name, the largest error over the largest exact value."""
    return {name: max_difference(x.cpu(), exact[name]) / exact[name].abs().max().item() for name, x in found.items()}


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `run` returns, and the most bytes of tensors it held at once beside those that were there before.

    On the CPU it follows every allocation and release of PyTorch's allocator; what libraries allocate is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as followed:
        result = run()
    events = [event for event in followed.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


def relative_error(found: Tensor, exact: Tensor) -> float:
    """max over elements of |found / exact - 1|."""
    return (found.detach().double() / exact - 1).abs().max().item()


def machine() -> dict[str, str]:
    """What the figures are measured on, and how busy it is: memory-bound ratios need an idle machine."""
    info = {"processor": platform.processor() or platform.machine(), "system": platform.platform(terse=True)}
    try:
        with open("/proc/cpuinfo") as lines:
            models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    if models:
        info["processor"] = f"{models[0]}, {len(models)} logical CPUs"
    if hasattr(os, "getloadavg"):
        info["load average before"] = f"{os.getloadavg()[0]:.1f}"
    info["capability"] = torch.backends.cpu.get_cpu_capability()
    info["threads"] = str(torch.get_num_threads())
    info["python"] = platform.python_version()
    info["torch"] = torch.__version__
    return info
