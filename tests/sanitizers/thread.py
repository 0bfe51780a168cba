"""`python tests/sanitizers/thread.py [STEPS]`: what threads share in csrc/, under ThreadSanitizer.

Neither Python nor torch is built with it, so drivers in C++ run the sources that need no torch, with threads of their
own: the table cache, and the kernels whose threads share a plan. All else in csrc/ that outlives a call is a thread's
own (`thread_local`), or chosen once (the instruction set, which only tests set again).
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "tsan"
FLAGS = ["-std=c++20", "-O1", "-g", "-fopenmp-simd", "-Wall", "-Wno-unknown-pragmas", "-fsanitize=thread", "-pthread"]
# drivers, and the sources that each is linked with.
DRIVERS = {
    "table_cache_threads": ["table_cache.cpp"],
    "kernels_threads": ["decode.cpp", "decode_plan.cpp", "qkv_rotary.cpp", "rotary.cpp"],
}


def refusal(folder: Path) -> str | None:
    """Why g++ can't build with ThreadSanitizer, in its own words, or None."""
    source = folder / "nothing.cpp"
    source.write_text("int main() {}\n")
    done = subprocess.run(["g++", *FLAGS, source, "-o", folder / "nothing"], capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def build(driver: str, folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """The program of a driver with the sources of `csrc`."""
    program = folder / driver
    sources = [HERE / f"{driver}.cpp", *(csrc / name for name in DRIVERS[driver])]
    subprocess.run(["g++", *FLAGS, f"-I{csrc}", *sources, "-o", program], check=True)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program until its end; exit status 66 for a race, 1 if what it checks does not hold."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        # older runtimes don't know the addresses that newer kernels draw at random.
        done = subprocess.run(["setarch", "-R", program, *arguments], capture_output=True, text=True, timeout=300)
    return done


def main(steps: str) -> int:
    """The worst exit status of the drivers."""
    BUILD.mkdir(parents=True, exist_ok=True)
    status = 0
    for driver in DRIVERS:
        done = run(build(driver, BUILD), steps)
        print(f"{driver}: {done.stdout}{done.stderr}", end="")
        status = max(status, abs(done.returncode))
    return status


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["100000"])))
