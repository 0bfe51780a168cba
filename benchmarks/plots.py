"""The report's figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.summary import LayerCost, Overhead
from clex_kernels import ClexConfig, reference, solve_frequencies
from examples.figures import save

OURS, THEIRS, BETWEEN, FAINT = "#0b6e4f", "#b5473c", "#c9902c", "#9aa5b1"
SIZE = (8.0, 4.5)
SHOWN_PAIRS = 7


def plot_loss(losses: Sequence[float], seconds: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=SIZE)
    steps = torch.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=FAINT, linewidth=0.8, label="each step, t drawn from 1..16")
    window = 2 * (len(losses) // 30) + 1
    mean = torch.tensor(losses).unfold(0, window, 1).mean(-1)
    axes.plot(steps[window // 2 : len(losses) - window // 2], mean, color=OURS, label=f"mean of {window} steps")
    axes.set(
        xlabel=f"step ({len(losses)} in {seconds:.0f} s)",
        ylabel="training loss (nats per byte)",
        title="A byte-level Llama trained with ClexAttention",
    )
    axes.legend(frameon=False)
    save(figure, path)


def plot_frequencies(up: Tensor, down: Tensor, config: ClexConfig, path: Path) -> None:
    """Learned frequencies over t as a share of plain RoPE's, and their change since the start, NTK scaling."""
    times = torch.linspace(1, config.max_factor, 151, dtype=torch.float64)
    learned = solve_frequencies(up, down, times, config)
    started = solve_frequencies(up, torch.zeros_like(down), times, config)
    plain = reference.plain_log_frequencies(config, torch.float64).exp()
    figure, (axes, change) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    shown = torch.linspace(0, config.pairs - 1, SHOWN_PAIRS).long().tolist()
    for number, pair in enumerate(shown):
        color = plt.cm.viridis(number / len(shown))
        axes.plot(times, learned[:, pair] / plain[pair], color=color, label=f"pair {pair}: {plain[pair]:.2g} rad/token")
        change.plot(times, 100 * (learned[:, pair] / started[:, pair] - 1), color=color)
    axes.set(
        xlabel="length factor t", ylabel="frequency over plain RoPE's", yscale="log", title="Frequencies learned here"
    )
    for panel in (axes, change):
        panel.set_xticks([1, *range(4, config.max_factor + 1, 4)])
    change.set(xlabel="length factor t", ylabel="change in frequency (%)", title="What training added to NTK scaling")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    save(figure, path)


def plot_overheads(overheads: Sequence[Overhead], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.2 + 0.55 * len(overheads)))
    rows = range(len(overheads))
    bars = axes.barh(rows, [o.ratio for o in overheads], color=OURS, height=0.6)
    axes.bar_label(bars, [f"{o.ratio:.2f}x" for o in overheads], label_type="center", color="white")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(rows, [o.name.replace(": ", ":\n", 1) for o in overheads], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="time over the same call with fixed frequencies", title="Overhead over plain RoPE")
    save(figure, path)


def plot_layer(costs: Mapping[int, LayerCost], goals: Sequence[float], path: Path) -> None:
    """By length, what a layer with CLEX takes over frozen frequencies and over transformers; `goals` are for time."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for axes, quantity, title in zip(panels, ("seconds", "peak_bytes"), ("Latency", "Peak memory"), strict=True):
        ratios = zip(*(cost.over(quantity) for cost in costs.values()), strict=True)
        for color, against, ratio in zip((OURS, THEIRS), ("frozen frequencies", "transformers"), ratios, strict=True):
            axes.plot(list(costs), ratio, "o-", color=color, label=f"CLEX over {against}")
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set(xlabel="length (tokens)", ylabel="ratio", xscale="log", title=f"{title}, forward and backward")
        axes.set_xticks(list(costs), [f"{length >> 10}K" for length in costs])
        axes.minorticks_off()
        axes.set_ylim(0.0, 1.3 * max(1.0, axes.dataLim.y1))
    for color, goal in zip((OURS, THEIRS), goals, strict=False):
        panels[0].axhline(goal, color=color, linewidth=1, linestyle=":", label=f"goal: {goal}")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_decode(drift: dict[str, Any], path: Path) -> None:
    """Error of a decode step by cached tokens; drift as of rotated_cache.Drift, the errors worst first."""
    figure, axes = plt.subplots(figsize=SIZE)
    for change in drift["changes"]:
        axes.axvline(change, color=FAINT, linewidth=0.6, alpha=0.5, zorder=0)
    for color, (name, errors) in zip((THEIRS, BETWEEN, OURS), drift["errors"].items(), strict=True):
        axes.plot(drift["tokens"], errors, color=color, label=name)
    axes.plot([], [], color=FAINT, linewidth=0.6, label="the length factor t changes, and every frequency with it")
    axes.set(
        xlabel="tokens in the cache",
        ylabel="largest error of the output / largest output",
        yscale="log",
        title="Why keys stay raw: error of one decode step as the cache grows",
        xlim=(0, drift["tokens"][-1]),
    )
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=True, edgecolor="none", framealpha=1.0, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.6))
    save(figure, path)


def plot_errors(end_to_end: dict[str, Any], tables: dict[str, Any], goals: dict[float, float], path: Path) -> None:
    """Largest error of cos and sin against position; `goals` maps a number of positions to its bound."""
    figure, axes = plt.subplots(figsize=SIZE)
    for style, kind, curves in (("-", "weights to table", end_to_end), ("--", "table alone", tables)):
        for color, (name, curve) in zip((OURS, THEIRS), sorted(curves.items(), key=best_last), strict=True):
            axes.plot(curve["positions"], curve["errors"], style, color=color, label=f"{kind}: {name}")
    axes.scatter(list(goals), list(goals.values()), marker="v", color="black", zorder=3, label="goal, weights to table")
    axes.set(
        xlabel="position (tokens)",
        ylabel="largest |cos or sin - fp64|",
        xscale="log",
        yscale="log",
        title="Error against position, fp32 tables",
    )
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def best_last(item: tuple[str, dict[str, list[float]]]) -> float:
    return item[1]["errors"][-1]
