"""The experiment's table and figure, from what it found."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from examples.figures import save
from examples.live_cache.decoding import KEPT, RECOMPUTED, STOCK
from examples.live_cache.models import DYNAMIC, LONG, Setting

# colour and label of the ways that are drawn.
STYLES = {
    STOCK: ("#b5473c", "transformers: rotated keys"),
    KEPT: ("#c9902c", "raw keys, values kept"),
    RECOMPUTED: ("#0b6e4f", "raw keys, recomputed at a change"),
}
# of the axis, and where between the lines a word has room.
BOTTOM, TOP, FREE = 1e-7, 3.0, 6e-5
GREY = "#52606d"
CHANGES = {LONG: "frequencies change once, here", DYNAMIC: "frequencies change with every token from here"}
COLUMNS = ("max error", "mean KL", "top-1 same", "perplexity", "ms to L0", "ms at L0+1", "ms past it")
NAME_WIDTH = 26


def header(title: str, setting: Setting) -> str:
    """What comes before the rows of a model."""
    about = (
        f"\n{title}, trained at L0 = {setting.train_length} bytes; {setting.texts} texts in a batch, read one byte at a"
        f" time up to {setting.length}.\nLogits of n > {setting.train_length} bytes against one pass over them:"
    )
    return f"{about}\n{'':{NAME_WIDTH}}" + "".join(f"{name:>12}" for name in COLUMNS)


def row(name: str, scores: dict[str, float]) -> str:
    """One way's line of the table."""
    cells = (
        f"{scores['error']:.1e}",
        f"{scores['divergence']:.1e}",
        f"{scores['agreement']:.1%}",
        f"{scores['perplexity']:.3f}",
        *(f"{scores[when]:.2f}" for when in ("before_ms", "switch_ms", "after_ms")),
    )
    return f"{name:{NAME_WIDTH}}" + "".join(f"{cell:>12}" for cell in cells)


def plot_errors(found: dict[str, dict[str, Any]], setting: Setting, path: Path) -> None:
    """Per model a panel: error of the logits against the number of bytes read."""
    figure, grid = plt.subplots(1, len(found), figsize=(9.0, 4.0), sharey=True)
    lengths = range(setting.prompt, setting.length + 1)
    for axes, (title, ways) in zip(grid, found.items(), strict=True):
        for name, (colour, label) in STYLES.items():
            axes.plot(lengths, ways[name]["errors"], color=colour, linewidth=1.1, label=label)
        axes.axvline(setting.train_length + 0.5, color=GREY, linewidth=1, linestyle=":")
        axes.set(yscale="log", title=title, xlabel="tokens read", xlim=(setting.prompt, setting.length))
        axes.set_ylim(BOTTOM, TOP)
        axes.minorticks_off()
        change = (setting.train_length + 0.5, FREE)
        axes.annotate(CHANGES[title], change, xytext=(5, 0), textcoords="offset points", fontsize=9, color=GREY)
    grid[0].set_ylabel("largest logit error / largest logit")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    save(figure, path)
