"""Does many runs in worker processes of one thread each, which is faster here than one process of many threads."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
from tqdm import tqdm

from examples.extrapolation.runs import Job, base_path, do_job, make_base
from examples.extrapolation.settings import Base

POLL_SECONDS = 1.0

_steps_done: "Synchronized[int]"


def do_jobs(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Results of the jobs, in their order; those stored already are read. Bases are trained where they lack."""
    open_jobs = [job for job in jobs if not job.path.exists()]
    bases = {job.tuning.base for job in open_jobs if not base_path(job.tuning.base).exists()}
    total = sum(base.steps for base in bases) + sum(job.tuning.steps for job in open_jobs)
    context = multiprocessing.get_context("spawn")
    done = context.Value("l", 0)
    with (
        tqdm(total=total, unit="step", smoothing=0.05) as bar,
        ProcessPoolExecutor(workers, context, _start_worker, (done,)) as pool,
    ):
        training = {pool.submit(_make_base, base): base for base in sorted(bases, key=lambda base: base.seed)}
        tuning: set[Future[None]] = {pool.submit(_do_job, job) for job in open_jobs if job.tuning.base not in bases}
        while training or tuning:
            finished, _ = wait({*training, *tuning}, POLL_SECONDS, FIRST_COMPLETED)
            for future in finished:
                future.result()
                if future in training:
                    base = training.pop(future)
                    tuning |= {pool.submit(_do_job, job) for job in open_jobs if job.tuning.base == base}
                tuning.discard(future)
            bar.update(done.value - bar.n)
    return [do_job(job) for job in jobs]


def _start_worker(done: "Synchronized[int]") -> None:
    global _steps_done
    _steps_done = done
    torch.set_num_threads(1)


def _count(steps: int) -> None:
    with _steps_done.get_lock():
        _steps_done.value += steps


def _make_base(base: Base) -> None:
    make_base(base, _count)


def _do_job(job: Job) -> None:
    do_job(job, _count)
