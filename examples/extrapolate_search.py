"""Looks for settings with which the learned ODE earns its place, on validation documents.

    python -m examples.extrapolate_search

Each trial changes one thing of the final runs' fine-tuning. Results are stored as those of examples/extrapolate.py
are, and printed as a table: validation perplexity over whole windows / over the last part, by length.
"""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from examples.extrapolation.methods import METHODS, UNTUNED, Method, Rule
from examples.extrapolation.runs import Job
from examples.extrapolation.settings import Ode, Reading, Tuning
from examples.extrapolation.workers import do_jobs

READING = Reading(split="validation", segments=24)
OFF, ON = (next(method for method in METHODS if method.name == name) for name in ("ODE off, runs", "CLEX, runs"))


@dataclass(frozen=True)
class Trial:
    """One change, and the method it is tried with."""

    name: str
    method: Method = ON
    changes: dict[str, Any] = field(default_factory=dict)
    ode: Ode = field(default_factory=Ode)
    read_with: Rule | None = None

    @property
    def rule(self) -> Rule:
        """Whose scores are shown."""
        return self.read_with or self.method.rule

    def job(self) -> Job:
        """What is to be run."""
        return Job(replace(Tuning(ode=self.ode), **self.changes), self.method, READING)


def _alone(activation: Literal["tanh", "silu"], lr: float, steps: int) -> Trial:
    ode = Ode(activation=activation, head_start=steps, head_start_lr=lr)
    return Trial(
        f"ODE alone: {activation}, lr {lr:.0e}, {steps} steps".replace("e-0", "e-"), changes={"steps": steps}, ode=ode
    )


TRIALS = (
    Trial("ODE off", OFF),
    Trial("CLEX: silu, ODE lr 1e-5"),
    Trial("ODE lr 3e-6", ode=Ode(lr=3e-6)),
    Trial("ODE lr 1e-4", ode=Ode(lr=1e-4)),
    Trial("tanh, ODE lr 3e-5", ode=Ode(activation="tanh", lr=3e-5)),
    Trial(
        "tanh, 60 steps of the ODE alone at 3e-5, then both at 3e-6",
        ode=Ode(activation="tanh", lr=3e-6, head_start=60, head_start_lr=3e-5),
    ),
    Trial("down starts at random, deviation 1e-3", ode=Ode(down_std=1e-3)),
    Trial("hidden width times 4", ode=Ode(hidden_factor=4)),
    Trial("one t per step, ODE off", OFF, {"per_sequence": False}),
    Trial("one t per step", changes={"per_sequence": False}),
    Trial("continuous t, ODE off", OFF, {"factors": "continuous"}),
    Trial("continuous t", changes={"factors": "continuous"}),
    Trial("1000 steps, ODE off", OFF, {"steps": 1000}),
    Trial("1000 steps", changes={"steps": 1000}),
    Trial("1000 steps, ODE lr 3e-6", changes={"steps": 1000}, ode=Ode(lr=3e-6)),
    Trial("no fine-tuning, dynamic NTK", UNTUNED, {"steps": 0}, read_with="ntk"),
    Trial("no fine-tuning, dynamic YaRN", UNTUNED, {"steps": 0}, read_with="yarn"),
    _alone("silu", 1e-5, Tuning().steps),
    _alone("tanh", 3e-5, Tuning().steps),
    _alone("silu", 1e-5, 1000),
    _alone("silu", 3e-5, 1000),
    _alone("tanh", 3e-5, 1000),
    _alone("tanh", 1e-4, 1000),
)


def search_table(trials: tuple[Trial, ...], results: list[dict[str, Any]]) -> str:
    """Markdown, a line per trial."""
    heads = ["trial", *(f"{factor}x" for factor in READING.factors)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for trial, result in zip(trials, results, strict=True):
        scores = result["scores"][trial.rule]
        cells = (f"{whole:.2f} / {last:.2f}" for whole, last in scores.values())
        lines.append("| " + " | ".join([trial.name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs all trials and prints their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    workers = parser.parse_args().workers
    print(search_table(TRIALS, do_jobs([trial.job() for trial in TRIALS], workers)))


if __name__ == "__main__":
    main()
