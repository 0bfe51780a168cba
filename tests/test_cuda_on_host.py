"""CUDA C++ without a GPU: the kernels run on the host under tests/cuda_host and compile with nvcc.

A kernel file joins with a driver in tests/cuda_host: `<stem>_driver.cpp` includes csrc/<stem>.cu, exports what the
tests call through ctypes, and has a main for ThreadSanitizer.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clex_kernels.frequencies import DENSE_TERMS, MAX_STEPS

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc"
SHIM = Path(__file__).parent / "cuda_host"
STEMS = sorted(driver.name.removesuffix("_driver.cpp") for driver in SHIM.glob("*_driver.cpp"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# every thread has an output, fewer threads than outputs, and a count that divides nothing.
THREADS = [64, 8, 37]
NOTHING_ON_CHIP, MEMORY_ON_CHIP, ALL_ON_CHIP = 0, 20_000, 1 << 20

SHARED = "-shared", "-fPIC", "-fno-gnu-unique"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the kernels for the host")


def find_nvcc():
    standard = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(standard) if standard.exists() else None)


def compile_host(stem, output, *flags, sources=SOURCES):
    command = ["g++", "-std=c++20", "-O1", "-fopenmp-simd", "-Wall", f"-I{SHIM}", f"-I{sources}", *flags]
    subprocess.run([*command, str(SHIM / f"{stem}_driver.cpp"), "-o", str(output)], check=True)
    return output


def load(path):
    library = ctypes.CDLL(str(path))
    library.solve_frequencies.restype = library.solve_frequencies_bwd.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_host")
    return load(compile_host("frequencies", folder / "frequencies.so", *SHARED))


def split_at(text, mark, occurrence):
    """What stands before and after the given occurrence of the mark."""
    parts = text.split(mark)
    assert occurrence < len(parts) - 1
    return mark.join(parts[: occurrence + 1]), mark.join(parts[occurrence + 1 :])


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def weights(pairs, hidden):
    generator = torch.Generator().manual_seed(pairs)
    up = (2 * torch.rand(pairs, hidden, generator=generator) - 1) / math.sqrt(hidden)
    return up, 0.1 * torch.randn(hidden, pairs, generator=generator)


def solve_on_shim(library, up, down, times, activation, threads, limit, last=1.0):
    """The outputs of solve_frequencies_kernel (with a last time, polynomials too), None if its threads lost step."""
    pairs, hidden = up.shape
    out = SimpleNamespace(
        freq=torch.full((len(times), pairs), math.nan, dtype=torch.float64),
        nodes=torch.full((MAX_STEPS + 1,), math.nan, dtype=torch.float64),
        states=torch.full((MAX_STEPS, pairs), math.nan, dtype=torch.float64),
        polynomials=torch.full((MAX_STEPS, 1 + DENSE_TERMS, pairs), math.nan, dtype=torch.float64),
        evaluations=torch.zeros(1, dtype=torch.int64),
    )
    in_step = library.solve_frequencies(
        pairs,
        hidden,
        len(times),
        ctypes.c_double(math.log(1e4)),
        ctypes.c_double(math.log(5e3)),
        int(activation == "silu"),
        pointer(up),
        pointer(down),
        pointer(times),
        ctypes.c_double(last),
        pointer(out.freq),
        pointer(out.nodes),
        pointer(out.states),
        pointer(out.polynomials if last > 1 else None),
        pointer(out.evaluations),
        threads,
        ctypes.c_int64(limit),
    )
    return out if in_step else None


def differentiate_on_shim(library, up, down, times, activation, solved, dfreq, threads, limit):
    pairs, hidden = up.shape
    dup, ddown = torch.zeros(pairs, hidden, dtype=torch.float64), torch.zeros(hidden, pairs, dtype=torch.float64)
    assert library.solve_frequencies_bwd(
        pairs,
        hidden,
        len(times),
        ctypes.c_double(math.log(5e3)),
        int(activation == "silu"),
        *map(pointer, (up, down, times, solved.nodes, solved.states, solved.freq, dfreq, dup, ddown)),
        threads,
        ctypes.c_int64(limit),
    )
    return dup, ddown


CASES = [
    pytest.param(5, 10, "silu", THREADS[0], ALL_ON_CHIP, id="R5-M10-silu-64-threads-all-on-chip"),
    pytest.param(6, 48, "tanh", THREADS[1], MEMORY_ON_CHIP, id="R6-M48-tanh-8-threads-memory-on-chip"),
    pytest.param(32, 64, "tanh", THREADS[2], NOTHING_ON_CHIP, id="R32-M64-tanh-37-threads-global"),
]


@needs_compiler
@pytest.mark.parametrize(("pairs", "hidden", "activation", "threads", "limit"), CASES)
def test_frequencies_forward_and_backward_match_the_cpu(library, pairs, hidden, activation, threads, limit):
    up, down = weights(pairs, hidden)
    times = torch.tensor([1, 1.5, 2, 6.25], dtype=torch.float64)
    bases = math.log(1e4), math.log(5e3)
    freq, nodes, states, evaluations = torch.ops.clex.solve_frequencies(up, down, times, *bases, activation)
    solved = solve_on_shim(library, up, down, times, activation, threads, limit)
    # the last bit of a sum can move a step's end by the error that the tolerance allows it.
    torch.testing.assert_close(solved.nodes, nodes, rtol=1e-6, atol=0)
    torch.testing.assert_close(solved.freq, freq, rtol=1e-11, atol=0)
    assert solved.states.isfinite().all()
    assert torch.equal(solved.evaluations, evaluations)

    dfreq = torch.randn(freq.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = SimpleNamespace(freq=freq, nodes=nodes, states=states)
    sums = differentiate_on_shim(library, up, down, times, activation, exact, dfreq, threads, limit)
    wide = (dfreq, freq, up.double(), down.double(), times, nodes, states, bases[1], activation)
    wanted = torch.ops.clex.solve_frequencies_bwd(*wide)
    for got, want in zip(sums, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * want.abs().max().item())


@needs_compiler
def test_a_trajectory_matches_the_cpu(library):
    up, down = weights(5, 10)
    nothing = torch.empty(0, dtype=torch.float64)
    solved = solve_on_shim(library, up, down, nothing, "silu", 16, ALL_ON_CHIP, last=6.0)
    nodes, polynomials = torch.ops.clex.trajectory(up, down, 6.0, math.log(1e4), math.log(5e3), "silu")
    torch.testing.assert_close(solved.nodes, nodes, rtol=1e-6, atol=0)
    torch.testing.assert_close(solved.polynomials, polynomials, rtol=1e-5, atol=1e-8)


@needs_compiler
def test_no_solution_is_nan_on_cuda(library):
    up, down = weights(5, 10)
    times = torch.tensor([1, 2], dtype=torch.float64)
    for broken in (1e3 * down, torch.full_like(down, math.nan)):
        freq = solve_on_shim(library, 1e3 * up, broken, times, "silu", 16, ALL_ON_CHIP).freq
        assert freq.isnan().any(1).tolist() == [False, True]


@needs_compiler
def test_times_that_make_no_sense_are_nan_on_cuda(library):
    up, down = weights(5, 10)
    times = torch.tensor([0.9, 1, 8, 2, math.nan], dtype=torch.float64)
    freq = solve_on_shim(library, up, down, times, "silu", 16, ALL_ON_CHIP).freq
    assert freq.isnan().any(1).tolist() == freq.isnan().all(1).tolist() == [True, False, False, True, True]


@needs_compiler
@pytest.mark.parametrize("barrier", range(5))
def test_a_missing_barrier_is_seen(barrier, tmp_path):
    broken = tmp_path / "csrc"
    shutil.copytree(SOURCES, broken)
    kernels = broken / "frequencies.cu"
    before, after = split_at(kernels.read_text(), "__syncthreads();", barrier)
    kernels.write_text(before + after)
    library = load(compile_host("frequencies", tmp_path / "broken.so", *SHARED, sources=broken))
    up, down = weights(5, 10)
    times = torch.tensor([4], dtype=torch.float64)
    freq = torch.ops.clex.solve_frequencies(up, down, times, math.log(1e4), math.log(5e3), "silu")[0]
    solved = solve_on_shim(library, up, down, times, "silu", 64, ALL_ON_CHIP)
    assert solved is None or not torch.allclose(solved.freq, freq, rtol=1e-9, atol=0)


@needs_compiler
def test_tables_match_the_cpu(tmp_path):
    tables = ctypes.CDLL(str(compile_host("tables", tmp_path / "tables.so", *SHARED)))
    generator = torch.Generator().manual_seed(0)
    freq = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    # far past where the reduction in two words ends.
    positions = torch.tensor([0, 0.25, 1e6, 1e13], dtype=torch.float64).expand(3, 4).contiguous()
    for given, rows, spacing in ((positions, 4, 0.0), (None, 5, 64.0)):
        coarse = torch.full((3, rows, 2, 6), math.nan, dtype=torch.float64)
        sizes = (ctypes.c_int64(size) for size in (3, rows, 6))
        scales = ctypes.c_double(spacing), ctypes.c_double(1.5)
        tables.fill_table(pointer(freq), pointer(given), *sizes, *scales, pointer(coarse), 2, 16)
        wanted = torch.ops.clex.tables(freq, 64 * rows, given, 1.5, torch.float64)[0]
        torch.testing.assert_close(coarse, wanted, rtol=0, atol=2e-15)


@needs_compiler
@pytest.mark.parametrize("stem", STEMS)
def test_thread_sanitizer_finds_no_race(stem, tmp_path):
    flags = "-g", "-fsanitize=thread", "-DCUDA_HOST_THREADS", "-pthread"
    try:
        program = compile_host(stem, tmp_path / stem, *flags)
    except subprocess.CalledProcessError:
        pytest.skip("g++ has no ThreadSanitizer here")
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc to compile the kernels with")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_nvcc_compiles_the_kernels(stem, architecture, tmp_path):
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    command = [nvcc, "-std=c++20", "-O1", f"-arch={architecture}", "--ptx", str(SOURCES / f"{stem}.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "kernels.ptx")], check=True)
