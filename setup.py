"""Builds clex_kernels._C: C++ always, CUDA C++ when torch is a CUDA build and a matching nvcc is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
CPP_SOURCES = [str(path) for path in sorted(Path("csrc").glob("*.cpp"))]
CUDA_SOURCES = [str(path) for path in sorted(Path("csrc").glob("*.cu"))]
HEADERS = [str(path) for path in sorted(Path("csrc").glob("*.h"))]


def find_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None, and the reason in words."""
    wanted = torch.version.cuda
    if wanted is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    reason = "no nvcc found"
    nvcc_on_path = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        cpp_extension.CUDA_HOME,
        "/usr/local/cuda",
        nvcc_on_path and Path(nvcc_on_path).resolve().parent.parent,
    ]
    for root in (Path(candidate) for candidate in candidates if candidate):
        nvcc = root / "bin" / "nvcc"
        # torch may guess the folder of a wrapper script, which has no headers.
        if not nvcc.exists() or not (root / "include" / "cuda_runtime.h").exists():
            continue
        banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", banner)
        if release and release[1] == wanted.split(".")[0]:
            return root, f"nvcc {release[1]}.{release[2]} matches torch {torch.__version__}"
        found = f"{release[1]}.{release[2]}" if release else "of unknown version"
        reason = f"nvcc is {found}, torch {torch.__version__} wants CUDA {wanted}"
    return None, reason


def list_architectures(cuda_root: Path) -> str:
    """Those of CUDA_ARCHITECTURES that this nvcc knows, the last one also as PTX for later GPUs."""
    command = [cuda_root / "bin" / "nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return ";".join(arch for arch in CUDA_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def make_extension():
    cuda_root, reason = find_cuda()
    verdict = f"{'C++ and CUDA C++' if cuda_root else 'C++ only'}: {reason}"
    print(f"clex_kernels builds {verdict}", file=sys.stderr)
    defines = [
        ("TORCH_TARGET_VERSION", STABLE_ABI_TARGET),
        ("CLEX_BUILD_REASON", f'"{reason}"'),
    ]
    cxx_flags = ["-O3", "-g0", "-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    cxx_flags += ["-fvisibility=hidden", "-Wall"]
    settings = {
        "py_limited_api": True,
        "depends": HEADERS,
        "extra_compile_args": {"cxx": cxx_flags, "nvcc": ["-O3", "-std=c++20"]},
    }
    if cuda_root is None:
        return cpp_extension.CppExtension("clex_kernels._C", CPP_SOURCES, define_macros=defines, **settings)

    cpp_extension.CUDA_HOME = str(cuda_root)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", list_architectures(cuda_root))
    extension = cpp_extension.CUDAExtension(
        "clex_kernels._C", CPP_SOURCES + CUDA_SOURCES, define_macros=[*defines, ("CLEX_WITH_CUDA", "1")], **settings
    )
    # a static runtime lets the same file load beside a CPU build of torch.
    shared_cuda = ("cudart", "c10_cuda", "torch_cuda")
    kept = [library for library in extension.libraries if library not in shared_cuda]
    extension.libraries = [*kept, "cudart_static", "rt", "dl", "pthread"]
    return extension


class BuildExtension(cpp_extension.BuildExtension):
    """Gives x.cu an object file of its own beside x.cpp's."""

    def build_extensions(self):
        name_objects = self.compiler.object_filenames

        def object_filenames(sources, *args, **kwargs):
            names = name_objects(sources, *args, **kwargs)
            return [
                f"{Path(name).with_suffix('')}_cuda.o" if str(source).endswith(".cu") else name
                for source, name in zip(sources, names, strict=True)
            ]

        self.compiler.object_filenames = object_filenames
        super().build_extensions()


setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
