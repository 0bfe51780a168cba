"""A CPU in the place of the GPU that is measured, and sizes that it can do."""

import time
from typing import Any

from benchmarks.on_gpu import stages, work
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.stages import Stage
from benchmarks.on_gpu.tune_subjects import TuneSizes
from benchmarks.shapes import DecodeShape, ProjectionShape, RotaryShape


class Cpu(Gpu):
    """Its clock is the host's; `log` has what was asked of it."""

    device = "cpu"
    attention_backends = ("auto",)
    projection_backends = ("linear",)
    architecture = "none"

    def __init__(self) -> None:
        self.log: list[str] = []

    def flush(self) -> None:
        self.log.append("flush")

    def hold(self, seconds: float) -> None:
        self.log.append("hold")

    def mark(self) -> Any:
        self.log.append("mark")
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return end - start

    def wait(self) -> None:
        self.log.append("wait")

    def forget(self) -> None:
        self.log.append("forget")

    def about(self) -> dict[str, str]:
        return {"GPU": "a CPU instead", "architecture": self.architecture}


LAYER = ProjectionShape("a tiny layer", C=32, H=4, G=2, D=16, R=8)
PARTIAL = ProjectionShape("a tiny layer with bias", C=24, H=4, G=4, D=20, R=6, has_bias=True)
CACHE = DecodeShape("bf16", 2, 64, None, 4, 2, 16)
SIZES = Sizes(
    heads=((16, 8), (20, 6)),
    rotary=RotaryShape("tiny", B=1, L=24, H=4, G=2, D=16),
    prefill=(40, 24),
    training=(24,),
    attention_heads=(4, 2, 16),
    rows_checked=4,
    decode=(DecodeShape("bf16", 1, 64, None, 4, 2, 16), CACHE),
    paged=CACHE,
    pages=(16, 32),
    projections={LAYER: (1, 16), PARTIAL: (3,)},
    tables=256,
    layer=LAYER,
    layer_lengths=(24,),
    layer_caches=(CACHE,),
    copies=(1 << 16, 1 << 18),
    products=(32,),
)
TUNED = TuneSizes({"half": 70, "float32": 40}, heads=(2, 1), slots=130, sequences=2, columns=64, rows_checked=4)


def run_here(stage: Stage, until: float, tables: str) -> list[work.Result]:
    """A stage in this process, on the CPU."""
    return work.in_place(stages.tasks_of(stage, Cpu(), SIZES, TUNED, until), until)
