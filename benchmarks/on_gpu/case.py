"""What a benchmark on the device consists of, and how it becomes the record that the report reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost
from benchmarks.on_gpu.timing import Plan, Rival, describe, medians, time_ways

SETS = 2
# over what a goal's ratio is, beside ways by name; or that it is about the largest error of ours.
OVER_FLOOR, OVER_RIVAL, ERROR = "the measured floor", "the fastest rival", "error"
# of a bf16 gradient to the frequencies, by others too: what rounding costs, times positions up to 16 L.
WRONG_DFREQ = {"dfreq": 0.2}
# a ratio that is one, measured.
NOISE = 1.05
ERROR_UNIT = "largest error over largest exact value of that tensor"


@dataclass(frozen=True)
class Aim:
    """A goal of the design: the time of ours over that of `over`, or the error of ours, is at most `bound`."""

    over: str
    bound: float
    what: str


@dataclass
class Bench:
    """A case on the device: ours, rivals that do the same, and what it costs at least.

    `own` are other ways of this package, `without` the name of the one that rotates nothing; `besides` are others' ways
    that do something else. `follows`: whether the most memory held is of interest. `wrong`: errors that are too large.
    """

    ours: Rival
    rivals: list[Rival]
    cost: Cost
    own: list[Rival] = field(default_factory=list)
    besides: list[Rival] = field(default_factory=list)
    without: str | None = None
    follows: bool = False
    aims: list[Aim] = field(default_factory=list)
    wrong: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A benchmark by name, made when its turn comes."""

    section: str
    row: str
    name: str
    make: Callable[[Gpu], Bench]

    @property
    def full_name(self) -> str:
        return f"{self.row}: {self.name}"


def run_case(
    gpu: Gpu,
    case: Case,
    seconds: float,
    until: float,
    rounds: tuple[int, int],
    without: Mapping[str, str],
    trying: Callable[[str], None],
) -> dict[str, Any]:
    """The record of a case, without its floor and goals, which are the report's to find."""
    gpu.forget()
    try:
        bench = case.make(gpu)
    except torch.OutOfMemoryError as error:
        return {"not_run": f"not run: {describe(error)}"}
    plan = Plan(seconds, until, rounds, bench.follows, bench.wrong)
    times = time_ways(gpu, [bench.ours, *bench.own, *bench.rivals, *bench.besides], plan, without, trying)
    return {
        "section": case.section,
        "row": case.row,
        "case": case.name,
        "label": "measured",
        "seconds": medians(times.seconds),
        "spreads": times.spreads(),
        "all_seconds": times.seconds,
        "host_seconds": medians(times.host),
        "peak_bytes": times.peaks,
        "rounds": {name: len(values) for name, values in times.seconds.items()},
        "errors": times.errors,
        "error_unit": ERROR_UNIT,
        "reasons": times.reasons,
        "ours": bench.ours.name,
        "own": [way.name for way in (bench.ours, *bench.own)],
        "rivals": [rival.name for rival in bench.rivals],
        "without": bench.without,
        "bytes": bench.cost.bytes,
        "operations": bench.cost.operations,
        "aims": [vars(aim) for aim in bench.aims],
        "notes": bench.notes,
    }


def errors_of(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """By name, the largest error over the largest exact value; computed where the tensors are."""
    return {name: error_of(x, exact[name]) for name, x in found.items()}


def error_of(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        raise ValueError(f"found: expected shape {list(exact.shape)}, got {list(found.shape)}")
    # max passes a NaN on.
    return ((found.detach().double() - exact).abs().max() / exact.abs().max()).item()


def draw(gpu: Gpu, seed: int, *sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(gpu.device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=gpu.device, dtype=dtype) for size in sizes]


def sampled_rows(gpu: Gpu, length: int, rows: int) -> list[Tensor]:
    """Of every input set, the tokens at which results are compared with fp64, in order."""
    generators = (torch.Generator().manual_seed(seed) for seed in range(SETS))
    return [torch.randperm(length, generator=each)[:rows].sort().values.to(gpu.device) for each in generators]
