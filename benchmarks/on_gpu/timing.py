"""Times on the device: events around single calls, a cold L2 cache, ways that alternate, every result checked.

Before each call its inputs are replaced, the L2 cache is flushed, and the device is held busy for as long as the host
needs to hand over the call: what is timed is the device's own time, and the host's stands beside it. A rival that
raises, or whose result is wrong, gets the reason in place of a time.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Way, peak_memory
from benchmarks.on_gpu.device import Gpu

OUT_OF_TIME = "not run: out of time"
# the untimed calls of a way: the first compiles, with each set's first its truth is computed, and the last shows what a
# round takes.
WARM_TURNS = (0, 1, 2)
# fewer say nothing.
FEWEST = 3
LONGEST_HOLD = 0.02
WRONG = 0.05


@dataclass(frozen=True)
class Rival:
    """A way that is made when its turn comes: it may need modules that are missing, and making it may raise."""

    name: str
    make: Callable[[], Way]
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        absent = [module for module in dict.fromkeys(self.needs) if importlib.util.find_spec(module) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def ready(way: Way) -> Rival:
    return Rival(way.name, lambda: way)


@dataclass(frozen=True)
class Plan:
    """How long a case may take, in all and by the clock of time.time(), how often ways run, and which errors are too
    large, by quantity where it is not WRONG.
    """

    seconds: float
    until: float
    rounds: tuple[int, int] = (10, 50)
    follows: bool = False
    wrong: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Times:
    """By way: seconds of every timed call on the device and of the host, largest errors, most bytes held at once (where
    the plan follows memory), and why there is no time.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    host: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        self.reasons[name] = reason
        for kept in (self.seconds, self.host, self.errors, self.peaks):
            kept.pop(name, None)

    def spreads(self) -> dict[str, float]:
        """Distance of the quartiles over the median."""
        return {name: spread(values) for name, values in self.seconds.items()}


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in values.items()}


def spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


class Poisoned(RuntimeError):
    """An error after which a process can't use the device any more."""


def is_lost(error: Exception) -> bool:
    """Whether it says that the device is lost to this process."""
    kinds = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
    return isinstance(error, kinds) or "CUDA error" in str(error) or "Triton Error [CUDA]" in str(error)


def raise_if_lost(gpu: Gpu, error: Exception) -> None:
    """Raises Poisoned if the device is lost, whatever the error says: else the next way would get the blame."""
    try:
        gpu.wait()
    except Exception as lost:
        # a rival's own kernels may report a lost device in their own words, so any error of a mere wait means that.
        raise Poisoned(describe(lost)) from error
    if is_lost(error):
        raise Poisoned(describe(error)) from error


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def time_once(gpu: Gpu, run: Callable[[], Any], hold: float = 0.0) -> tuple[Any, float, float]:
    """What `run` returns, and its seconds on the device and on the host."""
    gpu.flush()
    gpu.hold(min(hold, LONGEST_HOLD))
    start = gpu.mark()
    began = time.perf_counter()
    result = run()
    host = time.perf_counter() - began
    return result, gpu.seconds(start, gpu.mark()), host


class _Round:
    """One way, checked and timed, call after call."""

    def __init__(self, gpu: Gpu, way: Way, times: Times, plan: Plan):
        self.gpu, self.way, self.times, self.plan = gpu, way, times, plan
        self.hold = 0.0

    def follow(self) -> None:
        """One call, of which only the memory counts."""
        self.way.prepare(0)
        _, self.times.peaks[self.way.name] = peak_memory(self.way.run, torch.device(self.gpu.device))

    def call(self, turn: int, counts: bool) -> None:
        self.way.prepare(turn)
        result, seconds, host = time_once(self.gpu, self.way.run, self.hold)
        # a call that has compiled once needs the host for as long as this one did; twice that is enough.
        self.hold = 2 * host
        for quantity, error in self.way.errors(turn, result).items():
            bound = self.plan.wrong.get(quantity, WRONG)
            if not error <= bound:
                raise ArithmeticError(f"error of {quantity}: {error:.1e}, expected at most {bound}")
            errors = self.times.errors.setdefault(self.way.name, {})
            errors[quantity] = max(error, errors.get(quantity, 0.0))
        if counts:
            self.times.seconds.setdefault(self.way.name, []).append(seconds)
            self.times.host.setdefault(self.way.name, []).append(host)


def attempt(gpu: Gpu, times: Times, name: str, act: Callable[[], None]) -> bool:
    """Whether it went well; else its reason is kept. What a rival raises is its own affair."""
    try:
        act()
    except ArithmeticError as error:
        times.drop(name, f"wrong: {error}")
    except Exception as error:
        # rivals raise all kinds; the report has the words in place of a time.
        raise_if_lost(gpu, error)
        times.drop(name, f"raised {describe(error)}")
    else:
        return True
    return False


def time_ways(
    gpu: Gpu,
    rivals: Sequence[Rival],
    plan: Plan,
    without: Mapping[str, str] | None = None,
    trying: Callable[[str], None] = lambda name: None,
) -> Times:
    """Times all of them, ours first by convention, in alternation; those in `without` keep their reason.

    `trying` hears of every way before it is called, which may be the last thing this process does.
    """
    names = [rival.name for rival in rivals]
    if len(set(names)) < len(names):
        raise ValueError(f"rivals: expected different names, got {names}")
    times, rounds, cost = Times(reasons=dict(without or {})), [], 0.0
    for rival in rivals:
        if rival.name in times.reasons or rival.missing:
            times.reasons.setdefault(rival.name, rival.missing or "")
        elif time.time() > plan.until:
            times.drop(rival.name, OUT_OF_TIME)
        else:
            trying(rival.name)
            cost += warm(gpu, rival, times, plan, rounds)
    least, most = plan.rounds
    count = min(max(int(plan.seconds / max(cost, 1e-9)), least), most)
    for number in range(count):
        if time.time() > plan.until and number >= FEWEST:
            break
        turn = len(WARM_TURNS) + number
        shift = number % len(rounds) if rounds else 0
        # another order every round, so that no way always follows the same one.
        for each in [*rounds[shift:], *rounds[:shift]]:
            if number % each.way.every:
                continue
            trying(each.way.name)
            if not attempt(gpu, times, each.way.name, partial(each.call, turn, counts=True)):
                rounds.remove(each)
    for each in rounds:
        if each.way.name not in times.seconds:
            times.drop(each.way.name, OUT_OF_TIME)
    return times


def warm(gpu: Gpu, rival: Rival, times: Times, plan: Plan, rounds: list[_Round]) -> float:
    """Makes a way and calls it without counting; returns the seconds that it adds to a round."""
    seconds = 0.0

    def calls() -> None:
        nonlocal seconds
        each = _Round(gpu, rival.make(), times, plan)
        for turn in WARM_TURNS:
            began = time.perf_counter()
            each.call(turn, counts=False)
            seconds = (time.perf_counter() - began) / each.way.every
        if plan.follows:
            each.follow()
        rounds.append(each)

    return seconds if attempt(gpu, times, rival.name, calls) else 0.0
