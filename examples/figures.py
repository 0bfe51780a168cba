"""How figures look, and that they are closed once they are written."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 10,
    }
)


def save(figure: plt.Figure, path: Path, dpi: int = 130) -> None:
    """Write `figure` to `path` and close it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
