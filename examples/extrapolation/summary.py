"""From results to what the document shows: means and spreads over seeds, paired differences, the verdict."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from examples.extrapolation.methods import ODE_ALONE, ODE_ALONE_SLOW, UNTUNED

BOUND = 0.03
JUDGED_FACTORS = (4, 8)
MEASURES = {"whole": "whole window", "last": "last L bytes"}


@dataclass(frozen=True)
class Row:
    """A line of the table: a fine-tuned model, and the rule it is read with."""

    label: str
    method: str
    rule: str


ROWS = (
    Row("RoPE", "RoPE", "rope"),
    Row("linear at evaluation", "RoPE", "linear"),
    Row("dynamic NTK at evaluation", "RoPE", "ntk"),
    Row("dynamic YaRN at evaluation", "RoPE", "yarn"),
    Row("linear, factor 16", "linear, factor 16", "linear"),
    Row("YaRN, factor 16", "YaRN, factor 16", "yarn"),
    Row("RoPE, runs", "RoPE, runs", "rope"),
    Row("linear by t, runs", "linear by t, runs", "linear"),
    Row("YaRN by t, runs", "YaRN by t, runs", "yarn"),
    Row("ODE off, uniform", "ODE off, uniform", "ntk"),
    Row("CLEX, uniform", "CLEX, uniform", "clex"),
    Row("ODE off, runs", "ODE off, runs", "ntk"),
    Row("CLEX, runs", "CLEX, runs", "clex"),
)
FROZEN_ROWS = (
    Row("RoPE, model as it was", UNTUNED.name, "rope"),
    Row("linear, model as it was", UNTUNED.name, "linear"),
    Row("dynamic NTK, model as it was", UNTUNED.name, "ntk"),
    Row("dynamic YaRN, model as it was", UNTUNED.name, "yarn"),
    Row("ODE alone: tanh, lr 1e-4", ODE_ALONE.name, "clex"),
    Row("ODE alone: silu, lr 1e-5", ODE_ALONE_SLOW.name, "clex"),
)
PAIRS = (("CLEX, uniform", "ODE off, uniform"), ("CLEX, runs", "ODE off, runs"))


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; a deviation of 0 is that of a single run."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f}" if self.deviation else f"{self.mean:.2f}"


Perplexities = dict[str, dict[str, dict[int, dict[int, float]]]]


def by_row(results: Sequence[dict[str, Any]]) -> Perplexities:
    """Perplexities by row label, measure, length factor and seed."""
    found: Perplexities = {}
    for row in (*ROWS, *FROZEN_ROWS):
        for result in results:
            if result["method"] != row.method:
                continue
            for factor, score in result["scores"][row.rule].items():
                for measure, value in zip(MEASURES, score, strict=True):
                    cell = found.setdefault(row.label, {}).setdefault(measure, {}).setdefault(int(factor), {})
                    cell[result["seed"]] = value
    return found


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation; 0 for one value."""
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def difference(perplexities: Perplexities, ours: str, other: str, measure: str, factor: int) -> Spread:
    """Of two rows' perplexities at a length, paired by seed."""
    left, right = (perplexities[label][measure][factor] for label in (ours, other))
    return spread([left[seed] - right[seed] for seed in left])


def growth(perplexities: Perplexities, label: str, measure: str, factor: int) -> Spread:
    """Of a row's perplexity over its own at 1x, per seed, as a share of that."""
    at = perplexities[label][measure]
    return spread([at[factor][seed] / at[1][seed] - 1 for seed in at[factor]])


def is_flat(perplexities: Perplexities, label: str) -> bool:
    """Whether a row stays within 3 % of its own 1x at 4x and 8x, over whole windows and their last part, on average."""
    return all(
        growth(perplexities, label, measure, factor).mean <= BOUND for measure in MEASURES for factor in JUDGED_FACTORS
    )


def perplexity_table(perplexities: Perplexities, measure: str) -> str:
    """Markdown: a line per fine-tuned row and per pair, a column per length."""
    factors = sorted(perplexities[ROWS[0].label][measure])
    lines = [_line([MEASURES[measure], *(f"{factor}x" for factor in factors)]), "|---" * (len(factors) + 1) + "|"]
    lines += [_line([row.label, *_cells(perplexities[row.label][measure])]) for row in ROWS]
    for ours, other in PAIRS:
        cells = (difference(perplexities, ours, other, measure, factor) for factor in factors)
        name = f"*{ours.replace(',', ' minus ODE off,')}*"
        lines.append(_line([name, *(f"{cell.mean:+.3f} ± {cell.deviation:.3f}" for cell in cells)]))
    return "\n".join(lines)


def frozen_table(perplexities: Perplexities) -> str:
    """Markdown: rows whose model was not fine-tuned; whole window / last bytes, of the seeds' means."""
    factors = sorted(perplexities[FROZEN_ROWS[0].label]["whole"])
    heads = ["whole window / last L bytes", *(f"{factor}x" for factor in factors)]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in FROZEN_ROWS:
        pairs = zip(*(_cells(perplexities[row.label][measure]) for measure in MEASURES), strict=True)
        lines.append(_line([row.label, *(" / ".join(pair) for pair in pairs)]))
    return "\n".join(lines)


def growth_table(perplexities: Perplexities) -> str:
    """Markdown: how far each row rises over its own 1x at the judged lengths, in percent."""
    heads = [f"{factor}x, {name}" for factor in JUDGED_FACTORS for name in MEASURES.values()]
    lines = [_line(["change against own 1x", *heads, "within 3 %"]), "|---" * (len(heads) + 2) + "|"]
    for row in ROWS:
        cells = [growth(perplexities, row.label, measure, factor) for factor in JUDGED_FACTORS for measure in MEASURES]
        shown = (f"{100 * cell.mean:+.1f} ± {100 * cell.deviation:.1f} %" for cell in cells)
        lines.append(_line([row.label, *shown, "yes" if is_flat(perplexities, row.label) else "no"]))
    return "\n".join(lines)


def _cells(by_factor: dict[int, dict[int, float]]) -> list[str]:
    return [str(spread(list(seeds.values()))) for _, seeds in sorted(by_factor.items())]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
