"""`python tests/sanitizers/address.py`: the CPU's tests on an extension built with ASan and UBSan.

Builds in a tree of its own, build/asan-tree, by the flags that setuptools takes from the environment, so what is tested
is optimised like what is shipped. Nothing is recovered from: a finding ends the process, which the tests' own exit
status tells. Leaks are not looked for: Python and torch never free all they have, and torch's stable ABI leaks each
std::string argument of an operator. Tests may be named on the command line, with any options of pytest; none: those
below.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "asan-tree"
PARTS = ("csrc", "clex_kernels", "tests", "benchmarks", "examples", "setup.py", "pyproject.toml", "README.md")

# float-cast-overflow is in none of the others. UBSan names lines, ASan functions.
CHECKS = "-fsanitize=address,undefined,float-cast-overflow"
FLAGS = f"{CHECKS} -fno-sanitize-recover=all -fno-omit-frame-pointer"

# all that runs the extension's own code; each takes every instruction set that this processor has where it matters.
TESTS = (
    "test_append.py",
    "test_append_interface.py",
    "test_attention.py",
    "test_attention_cpu.py",
    "test_clex_attention.py",
    "test_clex_attention_decode.py",
    "test_decode.py",
    "test_decode_interface.py",
    "test_frequencies.py",
    "test_modules.py",
    "test_qkv_rotary.py",
    "test_qkv_rotary_cpu.py",
    "test_qkv_rotary_interface.py",
    "test_rotary.py",
    "test_rotary_checks.py",
    "test_rotary_interface.py",
    "test_rotary_table.py",
    "test_sampling.py",
    "test_table_cache.py",
    "test_tables.py",
)
# not left out for what they would find: Inductor has g++ compile code of its own, and a preloaded ASan makes g++ take
# minutes for it. What it calls of the extension, other tests call.
LEFT_OUT = "not inductor"


def build() -> None:
    """The extension in place in a fresh copy of the sources."""
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir(parents=True)
    for part in PARTS:
        subprocess.run(["cp", "-r", ROOT / part, TREE], check=True)
    (TREE / "clex_kernels" / "_C.abi3.so").unlink(missing_ok=True)
    flags = {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": CHECKS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=TREE, env=os.environ | flags, check=True)


def runtime() -> dict[str, str]:
    """What a process needs to load the extension into a Python that knows nothing of it."""

    def library(name: str) -> str:
        return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout

    # libstdc++ too: ASan looks for what throws exceptions before anything else has loaded it.
    preloaded = " ".join(library(name).strip() for name in ("libasan.so", "libstdc++.so"))
    return {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main(arguments: list[str]) -> int:
    """Exit status of the tests."""
    build()
    chosen = arguments or ["-n", "2", "--dist", "worksteal", "-k", LEFT_OUT, *(f"tests/{name}" for name in TESTS)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen]
    return subprocess.run(command, cwd=TREE, env=os.environ | runtime()).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
