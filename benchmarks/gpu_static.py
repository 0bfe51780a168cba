"""What the kernels cost on a GPU, as far as that is known without one: `python -m benchmarks.gpu_static [--refresh]`.

Every configuration is compiled ahead of time for every target and counted, which takes minutes the first time and
seconds after it. The report lies in build/gpu_static: index.md and its plots. What got worse since the figures that are
kept in benchmarks/gpu_static.json were counted ends the command with status 1; --refresh keeps the new ones.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.compiled import tables
from benchmarks.compiled.cases import CASES
from benchmarks.compiled.document import KEPT, Static, collect, compare, read, write
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.overhead import overheads
from benchmarks.compiled.peers import PEERS
from benchmarks.plots import FAINT, OURS, THEIRS
from examples.figures import save

OUT = Path(__file__).resolve().parent.parent / "build" / "gpu_static"
ROOFLINE = {
    "attention": ("attention_fwd-bfloat16-D128-R64", "o"),
    "attention backward, dq": ("attention_bwd_dq-bfloat16-D128-R64", "v"),
    "attention backward, dk and dv": ("attention_bwd_dkv-bfloat16-D128-R64", "^"),
    "decode": ("decode-bfloat16-D128-R64", "s"),
    "QKV projection, 16 rows": ("qkv_rotary-bfloat16-D128-R64-rows16", "<"),
    "QKV projection, 8192 rows": ("qkv_rotary-bfloat16-D128-R64-rows8192", ">"),
    "rotary": ("rotary-long-bfloat16-D128-R64", "D"),
    "rotary backward with dfreq": ("rotary_bwd-long-bfloat16-D128-R64", "d"),
    "attention's pass over k": ("attention_fwd_keys", "p"),
    "append": ("append-bfloat16-D128-long", "h"),
    "decode's merging": ("decode_combine", "*"),
    "sums of dfreq": ("attention_bwd_dfreq", "x"),
}

MARKERS = ("o", "s", "D", "^")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", action="store_true", help="keep these figures as those to compare with")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    started = time.perf_counter()
    static = collect()
    worse, changed = compare(read(), static) if KEPT.exists() else ([], ["everything: no figures were kept"])
    if arguments.refresh:
        write(static)
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(static, arguments.out)
    notes = [f"Worse than the figures kept: {'; '.join(worse)}."] if worse else []
    (arguments.out / "index.md").write_text(tables.full_report(static, notes))
    print_summary(static, worse, changed, arguments.refresh)
    print(f"report: {arguments.out / 'index.md'} ({time.perf_counter() - started:.0f} s)")
    sys.exit(bool(worse) and not arguments.refresh)


def print_summary(static: Static, worse: list[str], changed: list[str], refreshed: bool) -> None:
    goals = tables.all_goals(static)
    for goal in goals:
        if not goal.met:
            bound = f"{goal.sense} {goal.bound:g}{goal.unit}, {goal.label}"
            print(f"MISSED  {goal.found:.4g}{goal.unit} ({bound}): {goal.what}")
    print(f"{sum(goal.met for goal in goals)} of {len(goals)} static goals met")
    for what in worse:
        print(f"WORSE   {what}")
    if changed:
        print(f"{len(changed)} figures {'were refreshed' if refreshed else 'differ from those kept'}:")
        print("\n".join(f"  {what}" for what in changed))


def draw(static: Static, out: Path) -> None:
    """The two plots, in the folder."""
    plot_overheads(static, out / "gpu_overhead.png")
    plot_roofline(static, out / "gpu_roofline.png")


def plot_overheads(static: Static, path: Path) -> None:
    """A trip through a main loop over that without rotary, by target: instructions, and modelled time."""
    figure, panels = plt.subplots(1, 2, figsize=(11.0, 1.2 + 0.42 * len(tables.COMPARED)), sharey=True)
    quantities = {"instructions of a trip (counted)": "work", "time of a trip (modelled)": "time"}
    for axes, (label, quantity) in zip(panels, quantities.items(), strict=True):
        for row, name in enumerate(tables.COMPARED.values()):
            found = overheads(static, [name])
            ratios = [getattr(overhead, quantity) for overhead in found]
            color = THEIRS if name in PEERS else OURS
            for place, (ratio, marker) in enumerate(zip(ratios, MARKERS, strict=True)):
                axes.plot(ratio, row + 0.17 * (place - 1.5), marker, color=color, markersize=5)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(xlabel=f"{label}, over the same without rotary")
    panels[0].set_yticks(range(len(tables.COMPARED)), list(tables.COMPARED), fontsize=8)
    panels[0].invert_yaxis()
    handles = [plt.Line2D([], [], marker=marker, color=FAINT, linestyle="") for marker in MARKERS]
    names = [f"{target}: {gpu.product}" for target, gpu in HARDWARE.items()]
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle("What rotary adds to a kernel's loop (nothing ran on a GPU)")
    save(figure, path)


def plot_roofline(static: Static, path: Path) -> None:
    """Modelled speed of every kernel with a loop under the roofs of one product by target."""
    figure, panels = plt.subplots(2, 2, figsize=(10.5, 8.0), sharex=True, sharey=True)
    for axes, (target, gpu) in zip(panels.flat, HARDWARE.items(), strict=True):
        roof = np.logspace(-1, 4, 200)
        axes.plot(roof, np.minimum(gpu.tensor_tflops, roof * gpu.memory_gb_per_s / 1e3), color=FAINT)
        for label, (name, marker) in ROOFLINE.items():
            counts = static.of(target, name)
            work = CASES[name].work(counts.constants)
            found = tables.model_of(static, target, name)
            limit = min(gpu.tensor_tflops, work.intensity * gpu.memory_gb_per_s / 1e3)
            axes.plot(
                work.intensity, limit / found.over_floor, marker, color=OURS, alpha=0.8, label=label, markersize=6
            )
        axes.set(xscale="log", yscale="log", title=f"{target}: {gpu.product}")
        axes.set_xlabel("operations per byte of a call")
        axes.set_ylabel("modelled TFLOP/s")
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=4
    )
    figure.suptitle("Modelled speed under the roofs of memory and tensor cores (nothing ran on a GPU)")
    save(figure, path)


if __name__ == "__main__":
    main()
