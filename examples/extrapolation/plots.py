"""The document's figures."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator

from clex_kernels import ClexConfig
from clex_kernels.weights import plain_frequencies
from examples.extrapolation.methods import frequencies
from examples.extrapolation.summary import MEASURES, Perplexities, is_flat, spread
from examples.figures import save

# colour and line of each row that is drawn: dotted ones were not trained for it, dashed ones saw no runs.
STYLES = {
    "RoPE": ("#9aa5b1", ":"),
    "linear at evaluation": ("#c9902c", ":"),
    "dynamic NTK at evaluation": ("#b5473c", ":"),
    "dynamic YaRN at evaluation": ("#8e5ea2", ":"),
    "linear, factor 16": ("#c9902c", "--"),
    "YaRN, factor 16": ("#8e5ea2", "--"),
    "CLEX, uniform": ("#0b6e4f", "--"),
    "linear by t, runs": ("#c9902c", "-"),
    "RoPE, runs": ("#9aa5b1", "-"),
    "YaRN by t, runs": ("#8e5ea2", "-"),
    "ODE off, runs": ("#b5473c", "-"),
    "CLEX, runs": ("#0b6e4f", "-"),
}
SHOWN_PAIRS = 8


def plot_perplexity(perplexities: Perplexities, train_length: int, path: Path) -> None:
    """Perplexity against length, all rows above and those that stay within the bound below.

    On the left over whole windows, on the right over their last part; bars are deviations over seeds.
    """
    figure, grid = plt.subplots(2, len(MEASURES), figsize=(11.5, 8.5), sharex=True, sharey="row")
    flat = [label for label in STYLES if is_flat(perplexities, label)]
    for (above, below), (measure, name) in zip(grid.T, MEASURES.items(), strict=True):
        lengths = [factor * train_length for factor in next(iter(perplexities.values()))[measure]]
        _draw_rows(above, perplexities, list(STYLES), measure, train_length)
        _draw_rows(below, perplexities, flat, measure, train_length)
        above.set(xscale="log", yscale="log", title=name)
        above.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
        below.set(xscale="log", xlabel=f"length (bytes); trained at {train_length}")
        below.set_xticks(lengths, [str(length) for length in lengths])
        for axes in (above, below):
            axes.minorticks_off()
    grid[0, 0].set_ylabel("test perplexity per byte, all rows")
    grid[1, 0].set_ylabel("rows within 3 % of their own 1x at 4x and 8x")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path, dpi=110)


def _draw_rows(axes: plt.Axes, perplexities: Perplexities, labels: list[str], measure: str, train_length: int) -> None:
    for label in labels:
        colour, line = STYLES[label]
        cells = {factor: spread(list(seeds.values())) for factor, seeds in perplexities[label][measure].items()}
        axes.errorbar(
            [factor * train_length for factor in cells],
            [cell.mean for cell in cells.values()],
            yerr=[cell.deviation for cell in cells.values()],
            color=colour,
            linestyle=line,
            marker="o",
            markersize=3,
            capsize=2,
            label=label,
        )


def plot_frequencies(learned: dict[str, dict[str, Any]], config: ClexConfig, path: Path) -> None:
    """Per method a column: frequencies over t as a share of plain RoPE's, and below of those with the ODE off."""
    figure, grid = plt.subplots(2, len(learned), figsize=(11.5, 8.0), sharex=True, sharey="row")
    colours = plt.get_cmap("viridis")
    plain = plain_frequencies(config)
    for (above, below), (name, solution) in zip(grid.T, learned.items(), strict=True):
        times, freq = solution["t"], torch.tensor(solution["freq"], dtype=torch.float64)
        off = torch.stack([frequencies("ntk", t, config)[0] for t in times])
        for pair in torch.linspace(0, config.pairs - 1, SHOWN_PAIRS).long().tolist():
            colour = colours(0.95 * pair / (config.pairs - 1))
            wavelength = 2 * torch.pi / plain[pair]
            above.plot(times, freq[:, pair] / plain[pair], color=colour, label=f"pair {pair}: {wavelength:.0f} bytes")
            above.plot(times, off[:, pair] / plain[pair], color=colour, linestyle=":", linewidth=1)
            below.plot(times, freq[:, pair] / off[:, pair], color=colour)
        above.set(xscale="log", yscale="log", title=name)
        below.set(yscale="log", xlabel="length factor t")
        for axes in (above, below):
            axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    grid[0, 0].set_ylabel("frequency / plain RoPE's; dotted: ODE off")
    grid[1, 0].set_ylabel("frequency / with the ODE off")
    title = "wavelength at t = 1"
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, title=title)
    save(figure, path, dpi=110)
