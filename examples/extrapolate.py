"""Trains small Llamas at one length with several rotary methods and reads them at up to 16 times of it.

    python -m examples.extrapolate --quick                # under 3 minutes on 2 cores, output in build/extrapolation
    python -m examples.extrapolate --output docs          # everything docs/extrapolation.md shows

All methods fine-tune one checkpoint, trained from scratch with plain RoPE, for equally many steps, each with three
seeds, of which the data order, the sampled positions and the ODE's start depend. Every choice was made on validation
documents (examples/extrapolate_search.py); this reads test documents. Runs that are stored already are not repeated.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from examples.extrapolation.methods import METHODS, ODE_ALONE, ODE_ALONE_SLOW, UNTUNED
from examples.extrapolation.plots import plot_frequencies, plot_perplexity
from examples.extrapolation.runs import Job
from examples.extrapolation.settings import Base, Ode, Reading, Tuning
from examples.extrapolation.summary import MEASURES, by_row, frozen_table, growth_table, perplexity_table
from examples.extrapolation.workers import do_jobs

SEEDS = (0, 1, 2)
ALONE_STEPS = 1000
QUICK_STEPS = 30
QUICK_TUNING, QUICK_READING = Tuning(Base(steps=120), steps=QUICK_STEPS), Reading(segments=4)
DRAWN_METHODS = ("CLEX, runs", ODE_ALONE_SLOW.name)


def plan(quick: bool) -> list[Job]:
    """Every fine-tuning of the experiment, those of the ODE alone and a model without any among them."""
    if quick:
        return plan_of(QUICK_TUNING, QUICK_STEPS, (0,), QUICK_READING)
    return plan_of(Tuning(), ALONE_STEPS, SEEDS, Reading())


def plan_of(tuning: Tuning, alone_steps: int, seeds: tuple[int, ...], reading: Reading) -> list[Job]:
    """As `plan`, with these settings."""
    alone = {
        ODE_ALONE: Ode(activation="tanh", head_start=alone_steps, head_start_lr=1e-4),
        ODE_ALONE_SLOW: Ode(activation="silu", head_start=alone_steps, head_start_lr=1e-5),
    }
    jobs = [Job(replace(tuning, steps=0), UNTUNED, reading)]
    for seed in seeds:
        jobs += [Job(replace(tuning, seed=seed), method, reading) for method in METHODS]
        for method, ode in alone.items():
            jobs.append(Job(replace(tuning, seed=seed, steps=alone_steps, ode=ode), method, reading))
    return jobs


def write_report(jobs: list[Job], results: list[dict[str, Any]], folder: Path) -> str:
    """Writes extrapolation.json and the figures into `folder`; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "reading": asdict(jobs[0].reading),
        "process_seconds": round(sum(result["seconds"] for result in results)),
        "results": [{"tuning": asdict(job.tuning)} | result for job, result in zip(jobs, results, strict=True)],
    }
    (folder / "extrapolation.json").write_text(json.dumps(report) + "\n")
    config = jobs[0].tuning.config()
    plot_perplexity(by_row(results), config.train_length, folder / "extrapolation.png")
    learned = {name: next(r["frequencies"] for r in results if r["method"] == name) for name in DRAWN_METHODS}
    plot_frequencies(learned, config, folder / "extrapolation_frequencies.png")
    return tables(results)


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown tables of test perplexities, of their growth over 1x, and of models that were not fine-tuned."""
    perplexities = by_row(results)
    by_measure = [perplexity_table(perplexities, measure) for measure in MEASURES]
    return "\n\n".join([*by_measure, growth_table(perplexities), frozen_table(perplexities)])


def main() -> None:
    """Runs, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: shows that it works, no more")
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--output", type=Path, default=Path("build/extrapolation"), help="folder of figures and json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    jobs = plan(arguments.quick)
    results = do_jobs(jobs, arguments.workers)
    print(write_report(jobs, results, arguments.output))
    print(f"\n{time.perf_counter() - start:.0f} s; extrapolation.json and figures in {arguments.output}")


if __name__ == "__main__":
    main()
