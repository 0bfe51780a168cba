"""Several processes on torch's own distributed engine, for tests.

    def worker(rank: int, world: int, factor: float) -> Any:     # a top-level function of a test module
        total = torch.full((), factor * rank)
        dist.all_reduce(total)                                   # the default group, gloo, is there
        return {"total": total}                                  # whatever torch.save can write, or None

    results = run_processes(worker, 2, tmp_path, 3.0)            # [what rank 0 returned, what rank 1 returned]

Processes are spawned, so each imports the test module anew: 3 to 5 s with torch and transformers. Start one group per
file, in a module-scoped fixture, and check many things with what it returned. They meet in a file under tmp_path, never
at a port, so that tests can run side by side. Every process has one thread.
"""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

# how long a failed process's peers may take to fail by themselves, for their tracebacks.
_GRACE_S = 2.0


def run_processes(
    worker: Callable[..., Any], world: int, tmp_path: Path, *arguments: Any, time_limit: float = 300.0
) -> list[Any]:
    """Runs worker(rank, world, *arguments) in `world` processes with a gloo group; returns the results by rank.

    worker: a top-level function of an importable module; it and `arguments` are pickled, and what it returns goes
        through torch.save (tensors on the CPU, numbers, strings, lists and dicts of them).
    tmp_path: a directory that exists; each call uses a new one inside it.
    time_limit: seconds for everything; then the processes are killed and TimeoutError is raised.

    A failure in a process is raised here as RuntimeError with its traceback, the earliest first: its peers' failures
    are often only lost connections. No process outlives the call.
    """
    folder = Path(mkdtemp(prefix="processes", dir=tmp_path))
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run, args=(worker, rank, world, folder, time_limit, arguments), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        is_late = not _wait(processes, time_limit)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    _raise_failures(processes, folder, f"over {time_limit} s" if is_late else "")
    return [torch.load(folder / f"result{rank}", weights_only=True) for rank in range(world)]


def _wait(processes: list[Any], time_limit: float) -> bool:
    """Until all have ended, or one has failed and its peers had time to; whether that was within the limit."""
    end = time.monotonic() + time_limit
    has_failed = False
    while any(process.is_alive() for process in processes):
        if time.monotonic() > end:
            return has_failed
        if not has_failed and any(process.exitcode for process in processes):
            has_failed, end = True, min(end, time.monotonic() + _GRACE_S)
        time.sleep(0.02)
    return True


def _raise_failures(processes: list[Any], folder: Path, lateness: str) -> None:
    written = sorted(folder.glob("failure*"), key=lambda path: path.stat().st_mtime_ns)
    texts = [f"rank {path.name.removeprefix('failure')} failed:\n{path.read_text()}" for path in written]
    if texts:
        raise RuntimeError("\n".join(texts))
    missing = [rank for rank in range(len(processes)) if not (folder / f"result{rank}").exists()]
    if missing:
        codes = [process.exitcode for process in processes]
        error = TimeoutError if lateness else RuntimeError
        raise error(f"no result of ranks {missing}, {lateness or 'nor a traceback'}; exit codes {codes}")


def _run(
    worker: Callable[..., Any], rank: int, world: int, folder: Path, time_limit: float, arguments: tuple[Any, ...]
) -> None:
    # several processes with all of torch's threads each would only wait for one another.
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), world)
        timeout = timedelta(seconds=time_limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        result = worker(rank, world, *arguments)
        # nobody leaves while a peer still needs it.
        dist.barrier()
        torch.save(result, folder / f"part{rank}")
        os.replace(folder / f"part{rank}", folder / f"result{rank}")
        dist.destroy_process_group()
    except BaseException:
        # also SystemExit: whatever ends a worker early is a failure of the test.
        path = folder / f"part{rank}"
        path.write_text(traceback.format_exc())
        os.replace(path, folder / f"failure{rank}")
        os._exit(1)
