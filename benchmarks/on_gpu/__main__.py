"""A process that does tasks of one stage on the device: started by benchmarks.gpu_measured, not by hand."""

import argparse
from pathlib import Path
from typing import get_args

import torch

from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import FULL
from benchmarks.on_gpu.stages import Stage, tasks_of
from benchmarks.on_gpu.tune_subjects import TUNE
from benchmarks.on_gpu.work import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__)
    parser.add_argument("stage", choices=get_args(Stage))
    parser.add_argument("orders", type=Path, help="which tasks, in JSON")
    parser.add_argument("lines", type=Path, help="where results go, a line of JSON each")
    parser.add_argument("until", type=float, help="when to begin no more, by time.time()")
    parser.add_argument("threads", type=int, help="of the CPU, for references")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = tasks_of(arguments.stage, Gpu(), FULL, TUNE, arguments.until)
    serve(tasks, arguments.orders, arguments.lines, arguments.until)


if __name__ == "__main__":
    main()
