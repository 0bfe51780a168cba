"""Checks and times every kernel on the CUDA device at hand, beside rivals and measured floors: `make gpu`.

    python -m benchmarks.gpu_measured [--tune] [--out build/gpu] [--seconds 420]

Writes measured.json, which has everything, and index.md; with --tune, launch_tables.md and replacement tables in Python
instead. Nothing is fetched. Ends with status 1 if there is no device, a kernel is wrong, or a check did not run.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.on_gpu.device import missing_cuda

if TYPE_CHECKING:
    from benchmarks.on_gpu.running import Runner

ROOT = Path(__file__).resolve().parent.parent
# all of it, reports too, is to take less than eight minutes; tuning has ten.
SECONDS, TUNE_SECONDS = 420.0, 600.0


def missing_packages() -> str | None:
    absent = [name for name in ("triton", "torchdiffeq") if importlib.util.find_spec(name) is None]
    return f"found no {' and no '.join(absent)}, which kernels or their fp64 oracle need" if absent else None


def main(arguments: Sequence[str] | None = None, run: "Runner | None" = None) -> int:
    """Returns the exit status; `run` does the stages' work, by default in processes on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="measure the launch tables' candidates instead")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the report")
    parser.add_argument("--seconds", type=float, help="wall time after which nothing more begins")
    given = parser.parse_args(arguments)
    if reason := missing_cuda() or missing_packages():
        print(f"make gpu: {reason}", file=sys.stderr)
        return 1
    # only now: without those packages it can't be imported.
    from benchmarks.on_gpu import running

    run = run or running.run_in_processes
    given.out.mkdir(parents=True, exist_ok=True)
    if given.tune:
        return running.tune(run, given.out, given.seconds or TUNE_SECONDS)
    return running.write_report(running.measure(run, given.seconds or SECONDS), given.out)


if __name__ == "__main__":
    sys.exit(main())
