"""Tables for a million positions, and the whole way from weights to cosines and sines."""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact
from benchmarks.measure import Goal, Way, compare, max_difference, record
from benchmarks.shapes import LONGEST, MAX_FACTOR, TABLE_LENGTHS
from benchmarks.weights import Weights
from clex_kernels import RotaryTable, reference, solve_frequencies

FACTORED = "factored tables"
COPY = "floor: copy of the factored tables' bytes"
WHOLE_WAY = "solve_frequencies, then factored tables"
AUTHORS_WAY = "authors: rk4 at 0.01, then full tables, fp32"
FIXED_WAY = "factored tables of plain RoPE's fixed frequencies"
TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)
END_TO_END_BOUNDS = {"4K": 2e-6, "128K": 5e-5, "1M": 5e-4}
# a full table holds 128 values per position: the fp64 comparison takes a share of them.
CHECKED = 8192
CURVE_BINS = 60
# fp32 angles are this far off at position 1M without being wrong by their own lights.
FP32_ANGLES = 2.0


def checked_positions(length: int) -> Tensor:
    """Positions compared with fp64: both ends, random ones between, even and logarithmic; all of a short table."""
    if length <= CHECKED:
        return torch.arange(length)
    generator = torch.Generator().manual_seed(3)
    ends = torch.arange(CHECKED // 4)
    even = torch.randint(length, (CHECKED // 4,), generator=generator)
    logarithmic = (length ** torch.rand(CHECKED // 4, generator=generator)).long().clamp(max=length - 1)
    return torch.cat((ends, even, logarithmic, length - 1 - ends)).unique()


def look_up(table: RotaryTable, positions: Tensor) -> Tensor:
    """cos and sin [2, P, R] as the kernels form them: the fp32 complex product of a coarse and a fine row."""
    coarse, fine = table.coarse[positions // table.tile], table.fine[positions % table.tile]
    cos = coarse[:, 0] * fine[:, 0] - coarse[:, 1] * fine[:, 1]
    sin = coarse[:, 0] * fine[:, 1] + coarse[:, 1] * fine[:, 0]
    return torch.stack((cos, sin))


def exact_rows(positions: Tensor, freq: Tensor) -> Tensor:
    return torch.stack(exact.cos_sin(positions, freq))


def errors_by_position(found: Tensor, true: Tensor) -> Tensor:
    """Largest error [P] over cos, sin and pairs."""
    return (found.double() - true).abs().amax(dim=(0, 2))


def error_curve(positions: Tensor, errors: Tensor) -> dict[str, list[float]]:
    """Largest error in logarithmic bins of position, for a plot."""
    edges = torch.logspace(0, torch.log10(positions.max() + 1.0).item(), CURVE_BINS + 1)
    bins = torch.bucketize(positions.float(), edges, right=True)
    kept = [b for b in range(1, CURVE_BINS + 1) if (bins == b).any()]
    return {
        "positions": [edges[b].item() for b in kept],
        "errors": [errors[bins == b].max().item() for b in kept],
    }


class FullTables:
    """The rivals: every cosine and sine of fp32 angles, [1M, R], in fp32."""

    def __init__(self, pairs: int):
        self.freq = torch.empty(pairs, dtype=torch.float32)
        self.positions = torch.arange(LONGEST, dtype=torch.float32)
        self.cos, self.sin, self.angle = (torch.empty(LONGEST, pairs) for _ in range(3))
        self.compiled = torch.compile(self.write, dynamic=False)

    @staticmethod
    def write(positions: Tensor, freq: Tensor, cos: Tensor, sin: Tensor) -> None:
        angle = positions[:, None] * freq
        cos.copy_(angle.cos())
        sin.copy_(angle.sin())

    def preallocated(self) -> tuple[Tensor, Tensor]:
        torch.outer(self.positions, self.freq, out=self.angle)
        return torch.cos(self.angle, out=self.cos), torch.sin(self.angle, out=self.sin)

    def allocating(self) -> tuple[Tensor, Tensor]:
        angle = torch.outer(self.positions, self.freq)
        return angle.cos(), angle.sin()

    def compiled_preallocated(self) -> tuple[Tensor, Tensor]:
        self.compiled(self.positions, self.freq, self.cos, self.sin)
        return self.cos, self.sin

    def polar(self) -> tuple[Tensor, Tensor]:
        angle = torch.outer(self.positions, self.freq)
        return torch.view_as_real(torch.polar(torch.ones_like(angle), angle)).unbind(-1)

    def ways(self) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
        return {
            "torch outer, cos, sin, preallocated": self.preallocated,
            "torch outer, cos, sin, fresh": self.allocating,
            "torch.compile, preallocated": self.compiled_preallocated,
            "torch.polar, fresh": self.polar,
        }


def bench_million_positions(benchmark: BenchmarkFixture, best_weights: Weights) -> None:
    """Tables for 1M positions from given frequencies; frequencies change before every timed call."""
    config = best_weights.config
    freqs = [exact.solve_exactly(up, down, TIME, config)[0] for up, down in best_weights.sets]
    positions = checked_positions(LONGEST)
    truths = [exact_rows(positions, freq) for freq in freqs]
    full = FullTables(config.pairs)
    freq = freqs[0].clone()

    def load(turn: int) -> None:
        freq.copy_(freqs[turn % len(freqs)])
        full.freq.copy_(freq)

    def check(turn: int, rows: Tensor) -> dict[str, float]:
        return {"cos, sin": errors_by_position(rows, truths[turn % len(freqs)]).max().item()}

    def way(name: str, run: Callable[[], tuple[Tensor, Tensor]]) -> Way:
        return Way(name, run, load, lambda turn, pair: check(turn, torch.stack([x[positions] for x in pair])), every=5)

    factored = RotaryTable.from_frequencies(freqs[0], length=LONGEST)
    source = torch.cat((factored.coarse.flatten(), factored.fine.flatten()))
    target = torch.empty_like(source)
    ours = Way(
        FACTORED,
        lambda: RotaryTable.from_frequencies(freq, length=LONGEST),
        load,
        lambda turn, table: check(turn, look_up(table, positions)),
    )
    rivals = [way(name, run) for name, run in full.ways().items()]
    copy = Way(COPY, lambda: target.copy_(source), load, lambda turn, made: {"bytes": max_difference(made, source)})
    result = compare(benchmark, ours, [*rivals, copy], rounds=15, wrong=FP32_ANGLES)
    names = [rival.name for rival in rivals]
    rival = result.fastest(names)
    full_bytes = 2 * LONGEST * config.pairs * 4
    prior = full.preallocated()
    record(
        benchmark,
        section="tables",
        row="tables, 1M positions",
        case=f"[{LONGEST}, {config.pairs}], fp32",
        memory="ours into fresh memory (8.4 MB); each rival's policy is in its name",
        weights=best_weights.kind,
        error_unit=f"largest |cos or sin - exact| at {len(positions)} positions",
        comparison=result,
        ours=FACTORED,
        rivals=names,
        floor=COPY,
        goals=[
            Goal("smaller than the full tables", full_bytes / (4 * source.numel()), "at least", 60, label="counted"),
            Goal(f"faster than the fastest rival ({rival})", result.ratio(rival, FACTORED), "at least", 300),
            Goal("error of cos and sin", result.errors[FACTORED]["cos, sin"], "at most", 3e-7, unit=""),
        ],
        curves=table_curves(full, prior, freq, positions),
    )


def table_curves(
    full: FullTables, prior: tuple[Tensor, Tensor], freq: Tensor, positions: Tensor
) -> dict[str, dict[str, list[float]]]:
    """Error against position of tables made from the same exact frequencies."""
    true = exact_rows(positions, freq)
    table = RotaryTable.from_frequencies(freq, length=LONGEST)
    torch_rows = torch.stack([x[positions] for x in prior])
    return {
        "factored tables": error_curve(positions, errors_by_position(look_up(table, positions), true)),
        "fp32 angles by torch": error_curve(positions, errors_by_position(torch_rows, true)),
    }


@functools.cache
def fp32_positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)


@pytest.mark.parametrize("length", TABLE_LENGTHS)
def bench_end_to_end(benchmark: BenchmarkFixture, weights: Weights, length: str) -> None:
    """Weights to cosines and sines at t = 16; the weights change before every timed call."""
    size, config = TABLE_LENGTHS[length], weights.config
    positions = checked_positions(size)
    truths = [exact_rows(positions, exact.solve_exactly(up, down, TIME, config)[0]) for up, down in weights.sets]
    plain = reference.plain_log_frequencies(config, torch.float64).exp()
    plain_truth = exact_rows(positions, plain)
    curves: dict[str, dict[str, list[float]]] = {}

    def ours_run() -> RotaryTable:
        with torch.no_grad():
            freq = solve_frequencies(weights.up, weights.down, TIME, config)[0]
            return RotaryTable.from_frequencies(freq, length=size)

    def authors_run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            freq = reference.frequencies(weights.up, weights.down, TIME, config)[0]
            angle = torch.outer(fp32_positions(size), freq)
            return angle.cos(), angle.sin()

    def check(name: str, turn: int, rows: Tensor) -> dict[str, float]:
        errors = errors_by_position(rows, truths[weights.index(turn)])
        if weights.index(turn) == 0:
            curves[name] = error_curve(positions, errors)
        return {"cos, sin": errors.max().item()}

    ours = Way(
        WHOLE_WAY,
        ours_run,
        weights.load,
        lambda turn, table: check(WHOLE_WAY, turn, look_up(table, positions)),
    )
    authors = Way(
        AUTHORS_WAY,
        authors_run,
        weights.load,
        lambda turn, pair: check(AUTHORS_WAY, turn, torch.stack([x[positions] for x in pair])),
        every=6,
    )
    fixed = Way(
        FIXED_WAY,
        lambda: RotaryTable.from_frequencies(plain, length=size),
        weights.load,
        lambda turn, table: {"cos, sin": errors_by_position(look_up(table, positions), plain_truth).max().item()},
    )
    result = compare(benchmark, ours, [authors, fixed], rounds=12, wrong=FP32_ANGLES)
    error = result.errors[WHOLE_WAY]["cos, sin"]
    record(
        benchmark,
        section="end to end",
        row=f"weights to cos and sin, {length} positions",
        case=f"t = {MAX_FACTOR}, D {config.rotary_dim}, fp32 tables",
        memory="fresh outputs for all",
        weights=weights.kind,
        error_unit=f"largest |cos or sin - exact| at {len(positions)} positions",
        comparison=result,
        ours=WHOLE_WAY,
        rivals=[AUTHORS_WAY],
        goals=[Goal("error of cos and sin", error, "at most", END_TO_END_BOUNDS[length], unit="")],
        curves=curves if size == LONGEST else None,
        positions=size,
    )
