"""Runs and their stored results: a base checkpoint, fine-tuned copies of it, and what these score.

Results lie under build/extrapolation/, named by all settings they depend on, so that a run that was cut short goes on
where it was, and one with other settings starts anew.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.extrapolation.evaluation import evaluate
from examples.extrapolation.methods import Method, Rotary, Rule
from examples.extrapolation.settings import Base, Ode, Reading, Tuning, storage_key
from examples.extrapolation.training import Progress, fine_tune, new_model, no_progress, train_base
from examples.train_tiny import TinyLlama

STORE = Path("build/extrapolation")
# rules that need no fine-tuning of their own and are tried on the model fine-tuned with plain RoPE.
UNTRAINED: tuple[Rule, ...] = ("rope", "linear", "ntk", "yarn")
FREQUENCY_TIMES = 31


@dataclass(frozen=True)
class Job:
    """One fine-tuning and what it is read on."""

    tuning: Tuning
    method: Method
    reading: Reading

    @property
    def path(self) -> Path:
        """Where the result is stored: by all settings, those of the ODE only where there is one."""
        tuning = self.tuning if self.method.learns else replace(self.tuning, ode=Ode())
        return STORE / f"result-{storage_key(tuning, self.method, self.reading)}.json"


def base_path(base: Base) -> Path:
    """Where a base checkpoint is stored."""
    return STORE / f"base-{storage_key(base)}.pt"


def make_base(base: Base, progress: Progress = no_progress) -> None:
    """Trains and stores a base checkpoint, unless it is there."""
    path = base_path(base)
    if not path.exists():
        save_whole(path, lambda new: torch.save(train_base(base, progress).state_dict(), new))


def load_base(base: Base) -> TinyLlama:
    """The model of a stored checkpoint."""
    model = new_model(base)
    model.load_state_dict(torch.load(base_path(base)))
    return model


def do_job(job: Job, progress: Progress = no_progress) -> dict[str, Any]:
    """Fine-tunes and evaluates, or reads the stored result. Scores are by rule, then by length factor."""
    if job.path.exists():
        return json.loads(job.path.read_text())
    start = time.perf_counter()
    model = load_base(job.tuning.base)
    rotary = fine_tune(model, job.tuning, job.method, progress)
    seconds = time.perf_counter() - start
    length = job.tuning.base.train_length
    result = {
        "method": job.method.name,
        "seed": job.tuning.seed,
        "scores": {
            rule: evaluate(model, partial(rotary.at, rule=rule), job.reading, length) for rule in rules_of(job.method)
        },
        "frequencies": learned_frequencies(rotary) if job.method.learns else None,
        "tuning_seconds": seconds,
        "seconds": time.perf_counter() - start,
    }
    save_whole(job.path, lambda new: new.write_text(json.dumps(result)))
    return json.loads(job.path.read_text())


def rules_of(method: Method) -> tuple[Rule, ...]:
    """What a model fine-tuned with a method is read with: its own rule, or all those that need no training."""
    return UNTRAINED if method.rule == "rope" and method.positions == "plain" else (method.rule,)


def learned_frequencies(rotary: Rotary) -> dict[str, list[Any]]:
    """What the ODE learned: t, and frequencies [T][R] in rad/token."""
    config = rotary.config
    times = torch.linspace(1, config.max_factor, FREQUENCY_TIMES, dtype=torch.float64)
    lengths = (times * config.train_length).long()
    freq = [[float(f"{value:.6g}") for value in row] for row in rotary.clex.at(lengths).freq.tolist()]
    return {"t": (lengths / config.train_length).tolist(), "freq": freq}


def save_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside `path`, then renames: what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    write(new)
    new.rename(path)
