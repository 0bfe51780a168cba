"""`python -m clex_kernels`: what was built, which instruction set runs, which backend serves each device and why."""

import argparse
import importlib.util
import platform
import sys

import torch

import clex_kernels
from clex_kernels import extension


def describe_cuda() -> str:
    """Why CUDA tensors can or can't be served here, in words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"absent: torch {torch.__version__} is not a CUDA or ROCm build"
    if not torch.cuda.is_available():
        return "no device visible to torch"
    return f"{torch.cuda.get_device_name()}, capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"


def describe_triton() -> str:
    """The Triton version, or that it is missing."""
    if importlib.util.find_spec("triton") is None:
        return "absent: rotary, attention, decoding and the QKV projection on a GPU need it (pip install triton)"
    import triton

    return triton.__version__


def report() -> str:
    """The whole report, a line per fact."""
    built = "C++ and CUDA C++" if extension.has_cuda() else "C++ only"
    rows = [
        ("clex_kernels", clex_kernels.__version__),
        ("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        ("extension", f"{built} ({extension.build_reason()})"),
        ("instruction set", extension.isa()),
        ("GPU", describe_cuda()),
        ("triton", describe_triton()),
        (
            "CPU backend",
            "frequencies, tables, rotary, decoding, QKV projection of few tokens: C++; of more, and attention: C++"
            " rotary and torch's products and attention",
        ),
        (
            "GPU backend",
            "rotary, attention, decoding: Triton; QKV projection: Triton, or torch's product and rotary; frequencies,"
            " tables: "
            + ("CUDA C++" if extension.has_cuda() else "solved on the CPU and copied; torch fp64 on the device"),
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    """Prints the report; with --require-cuda fails unless CUDA C++ was built."""
    parser = argparse.ArgumentParser(prog="python -m clex_kernels", description=__doc__)
    parser.add_argument("--require-cuda", action="store_true", help="exit with 1 unless CUDA C++ was built")
    arguments = parser.parse_args()
    print(report())
    if arguments.require_cuda and not extension.has_cuda():
        sys.exit(f"CUDA C++ was not built: {extension.build_reason()}")


if __name__ == "__main__":
    main()
