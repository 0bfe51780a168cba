"""The one file that touches CUDA, apart from the device string of tensors: a CPU stands in for `Gpu` in tests.

`python -m benchmarks.on_gpu.device` ends with status 1, and says why, where nothing can be measured.
"""

import functools
import gc
import platform
import sys
from typing import Any

import torch

# a pause this long, after another one in which an idle device speeds up, tells how many clock ticks a second has.
PROBE_TICKS = 50_000_000


def missing_cuda() -> str | None:
    """Why nothing can be measured here, with what was found; None where it can."""
    if torch.version.hip is not None:
        return f"found torch {torch.__version__} for ROCm; expected a CUDA build: timings are by CUDA only"
    if torch.version.cuda is None:
        return f"found torch {torch.__version__}, which is no CUDA build"
    if not torch.cuda.is_available():
        return f"found torch {torch.__version__} built for CUDA {torch.version.cuda}, but it sees no device"
    return None


class Gpu:
    """The current CUDA device: its clock, its L2 cache, and what it is."""

    device = "cuda"
    # what serves a call there; the first of each is this package's own kernel.
    attention_backends: tuple[str, ...] = ("triton", "sdpa")
    projection_backends: tuple[str, ...] = ("triton", "linear")

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.empty(2 * self._properties.L2_cache_size, dtype=torch.uint8, device=self.device)

    @functools.cached_property
    def _ticks_per_second(self) -> float:
        torch.cuda._sleep(PROBE_TICKS)
        start = self.mark()
        torch.cuda._sleep(PROBE_TICKS)
        return PROBE_TICKS / self.seconds(start, self.mark())

    @property
    def architecture(self) -> str:
        """As the launch tables name it."""
        return f"sm_{self._properties.major}{self._properties.minor}"

    @property
    def memory_bytes(self) -> int:
        return self._properties.total_memory

    def flush(self) -> None:
        """Writes twice the L2 cache's size, so that nothing else is left in it."""
        self._flushed.zero_()

    def hold(self, seconds: float) -> None:
        """Keeps the device busy for so long, while the host hands it what comes next."""
        torch.cuda._sleep(int(seconds * self._ticks_per_second))

    def mark(self) -> Any:
        """A point on the device's own clock."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, once the device has passed both."""
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize()

    def forget(self) -> None:
        """Gives back memory that nothing refers to, so that a large case finds it."""
        gc.collect()
        torch.cuda.empty_cache()

    def about(self) -> dict[str, str]:
        """For the head of the report."""
        # neither need be there when the device is looked for.
        import triton

        from clex_kernels import extension

        properties = self._properties
        return {
            "GPU": properties.name,
            "architecture": self.architecture,
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA, cuDNN": f"{torch.version.cuda}, {torch.backends.cudnn.version()}",
            "triton": triton.__version__,
            "extension": f"{'C++ and CUDA C++' if extension.has_cuda() else 'C++ only'} ({extension.build_reason()})",
        }


if __name__ == "__main__" and (reason := missing_cuda()):
    sys.exit(f"make gpu: {reason}")
