"""Kernels compiled ahead of time, with no GPU: launches become compilations, and what the toolchain says of the result.

Launchers of the package are called with meta tensors, so the signature and its specialisation (alignment, constants)
are those of a real launch. Compiled code is kept in build/compiled/triton, or TRITON_CACHE_DIR, and made again when
absent.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

BUILD = Path(__file__).resolve().parents[2] / "build" / "compiled"


class Target(NamedTuple):
    gpu: GPUTarget
    shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class FakeDriver:
    """Stands in for a GPU of the target; its name as the device keeps Triton's caches of different targets apart."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling(name: str, only: str | None = None) -> Iterator[list[tuple[Any, dict[str, int]]]]:
    """Launches (of the kernel `only`) compile for the target instead, and are listed: compiled kernel and constants."""
    compiled = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if only not in (None, self.fn.__name__):
            return
        constants = {key: value for key, value in kwargs.items() if key in self.arg_names}
        compiled.append((run(self, *args, grid=grid, warmup=True, **kwargs), constants))

    triton.runtime.driver.set_active(FakeDriver(name))
    JITFunction.run = compile_only
    try:
        with triton.knobs.cache.scope():
            if "TRITON_CACHE_DIR" not in os.environ:
                triton.knobs.cache.dir = str(BUILD / "triton")
            yield compiled
    finally:
        JITFunction.run = run
        # reset_active() would look for a GPU.
        triton.runtime.driver._active = active


@functools.cache
def find_nvdisasm() -> str | None:
    """The disassembler of Triton's wheel, else of the CUDA toolkit."""
    roots = (Path(triton.backends.nvidia.__file__).parent, os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    bundled = (shutil.which("nvdisasm", path=str(Path(root) / "bin")) for root in roots if root)
    return next(filter(None, bundled), shutil.which("nvdisasm"))


def count_ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes that ptxas reports for what Triton has it compile."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        command = [get_ptxas(arch).path, *options, str(source), "-o", f"{source}.o"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, spills))


def read_sass(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
