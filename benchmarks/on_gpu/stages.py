"""All that is done on the device, by stage and name: floors, checks, benchmarks, and tuning."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain, zip_longest
from typing import Literal

import torch

from benchmarks.on_gpu.attention_cases import attention_cases
from benchmarks.on_gpu.attention_checks import attention_checks, decode_checks
from benchmarks.on_gpu.case import Case, run_case
from benchmarks.on_gpu.checks import Check, run_check
from benchmarks.on_gpu.decode_cases import decode_cases
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import measure_floors
from benchmarks.on_gpu.layer_cases import layer_cases
from benchmarks.on_gpu.projection_cases import projection_cases
from benchmarks.on_gpu.projection_checks import append_checks, projection_checks
from benchmarks.on_gpu.rivals import library_versions
from benchmarks.on_gpu.rotary_cases import rotary_cases
from benchmarks.on_gpu.rotary_checks import rotary_checks
from benchmarks.on_gpu.sizes import FULL, Sizes
from benchmarks.on_gpu.table_cases import table_cases
from benchmarks.on_gpu.tune import slots_of, tune_tasks
from benchmarks.on_gpu.tune_subjects import TuneSizes
from benchmarks.on_gpu.work import Result, Task
from clex_kernels.kernels.launch_tables import architecture_of

# "compile" readies the candidates that "tune" times.
Stage = Literal["floors", "checks", "cases", "compile", "tune"]

# seconds of timed rounds of one case, and the fewest and most rounds.
CASE_SECONDS, CASE_ROUNDS = 3.0, (10, 50)


def all_checks(sizes: Sizes, kind: type[Gpu]) -> list[Check]:
    """Those of a kind of device; every head and dtype of a kernel come before its features."""
    return [
        *rotary_checks(sizes),
        *attention_checks(sizes),
        *decode_checks(sizes),
        *append_checks(sizes),
        *projection_checks(sizes, kind.projection_backends),
    ]


def all_cases(sizes: Sizes) -> list[Case]:
    """The most important first: one of every operation, then the next of every operation."""
    rows: dict[str, list[Case]] = {}
    for make in (attention_cases, decode_cases, rotary_cases, projection_cases, layer_cases, table_cases):
        for case in make(sizes):
            rows.setdefault(case.row, []).append(case)
    return [case for case in chain.from_iterable(zip_longest(*rows.values())) if case is not None]


def measure_device(gpu: Gpu, sizes: Sizes, without: Mapping[str, str], trying: Callable[[str], None]) -> Result:
    return {
        "about": gpu.about(),
        "libraries": library_versions(),
        "tables": architecture_of(torch.empty(1, device=gpu.device)),
        "floors": asdict(measure_floors(gpu, sizes)),
    }


def tasks_of(stage: Stage, gpu: Gpu, sizes: Sizes, tuned: TuneSizes, until: float) -> dict[str, Task]:
    """What a stage does, by name, in order."""
    if stage == "floors":
        return {"floors": partial(measure_device, gpu, sizes)}
    if stage == "checks":
        return {check.name: partial(run_check, gpu, check) for check in all_checks(sizes, type(gpu))}
    if stage == "cases":
        rules = (CASE_SECONDS, until, CASE_ROUNDS)
        return {case.full_name: partial(run_case, gpu, case, *rules) for case in all_cases(sizes)}
    return tune_tasks(gpu, tuned, until, only_compiles=stage == "compile")


def names_of(stage: Stage, tables: str) -> list[str]:
    """The names of a stage's tasks at full size, found without the device; `tables`: the architecture tuned."""
    if stage == "floors":
        return ["floors"]
    if stage == "checks":
        return [check.name for check in all_checks(FULL, Gpu)]
    if stage == "cases":
        return [case.full_name for case in all_cases(FULL)]
    return [slot.name for slot in slots_of(tables)]
