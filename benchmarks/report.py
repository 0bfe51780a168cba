"""Trains, benchmarks the trained weights, and writes the report: `python -m benchmarks.report`.

The report lies in build/report: index.md, its plots, and the figures behind them as JSON. A missed goal is reported as
missed and does not fail the run; a benchmark that raises does.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import gpu_static, plots, summary
from benchmarks.compiled import document, tables
from benchmarks.measure import machine
from benchmarks.shapes import LAYER_GOALS, LAYER_LENGTHS
from examples.train_tiny import CONFIG, Trainer, TrainingRun, train

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "triton", "transformers", "torchdiffeq", "pytest-benchmark")
SECTIONS = {
    "whole model": "Whole model",
    "raw key cache": "Raw key cache",
    "frequencies": "Frequencies",
    "tables": "Tables",
    "end to end": "Weights to cos and sin",
    "rotary": "Rotary",
    "qkv": "QKV projection",
    "attention": "Attention",
    "layer": "Attention layer",
    "decode": "Decode",
    "training": "Training step",
}
MODEL_TEXT = """\
A small Llama of transformers: a training step with its optimizer, and a decode step over a filled cache. CLEX is
apply_clex: in training with t and positions drawn anew and gradients to the ODE, in decoding with t by length. Frozen
is the same patched model over raw keys with plain RoPE's frequencies; transformers is the model as it is, with plain
RoPE, eager rotary and sdpa; its fastest form is that of several, named in the last column. Caches are dynamic ones, but
where that column says otherwise: torch.cat copies transformers' whole at every step, and raw keys' grow in place."""
RAW_KEY_TEXT = """\
Small models of transformers on the RoPE that they have, past the length of training: dynamic NTK, whose frequencies
change with every token, LongRoPE, whose changed once, and YaRN, whose never do. Raw keys are apply_raw_key_cache with
its defaults; transformers is the model as it is, with sdpa and a dynamic cache, whose keys are given rotated by this
step's frequencies: a live cache has them so for YaRN alone."""
SWITCH_TEXT = """\
Where LongRoPE's frequencies change, one step passes all cached tokens through the model again. transformers' Phi-3 does
the same inside generate(), which drops the cache there; plain forward calls do nothing and are wrong from then on."""
LAYER_DEVICES = ("cpu", "cuda")
LAYER_TEXT = """\
Projections, attention and output projection, forward and backward, bf16. CLEX has sampled positions and gradients to
the frequencies (drawing them and solving the ODE, once a step for all layers, is in the training step below); frozen is
the same layer with one fixed table of plain RoPE; transformers-style is three linear layers, eager rotate-half and
scaled_dot_product_attention with plain RoPE. At great lengths all three spend their time in PyTorch's attention, and on
the CPU it is the same one."""
DECODE_TEXT = """\
One new token over cached keys that are rotated as they are read, by the frequencies of this very step: H 32, G 8,
D 128, head-major caches. The rival is the fastest of SDPA, softmax(q k^T) v and split-KV SDPA over a cache whose keys
were rotated beforehand, at no cost to it; no rotation is this package's kernel over the same; the floor reads K and V
once."""
QKV_TEXT = """\
q, k and v from hidden states, q and k rotated by CLEX's frequencies at t = 16, forward; Mixtral-8x7B has the sizes of
Llama-3-8B, and Phi-2 rotates 32 of 80 channels and has biases. The linears rotate nothing: one has q, k and v in one
weight and is the floor. The rival is the fastest of that linear followed by eager rotate-half as in transformers, of
the same followed by a compiled rotary, and of both compiled together. At one token the time is that of reading the
weights, at many that of the product."""
DRIFT_TEXT = """\
Keys rotated once by the frequencies of their own time don't fit a query of another t: from the first change of t on,
the output is wrong. Re-rotating a bf16 cache at every new t mends that but rounds all keys once more each time, while
raw keys are never rounded again (random keys and queries, synthetic weights, against fp64)."""
RULES = """\
Every figure is labelled: *measured* on the machine above in this run, *counted*, or *modelled*. All ways of a case
run in one process and alternate round by round; times are medians over rounds, and ratios are of medians. Before
each timed call, untimed, other inputs (or other weights) are written into the tensors that the call reads, or for a
decode step another cache is taken, which the CPU's caches hold nothing of; a QKV projection keeps its weights, as a
model does, but finds them out of the caches. After it, untimed, its output is compared with fp64 (frequencies:
torchdiffeq dopri8 at 1e-13), and the largest error of all its calls is shown; of attention and of the QKV projection,
at sampled rows, as their tables say; of a whole model, of its logits, by the same weights in fp64. The rival is the
fastest of the formulations listed with it; of a decode step, over keys rotated beforehand. The floor is a copy of the
bytes that the operation writes; of attention, PyTorch's own on q and k rotated beforehand; of the QKV projection, one
linear with nothing rotated; of a decode step, the fastest of several ways to read K and V once. Peak memory is the
most bytes of tensors held at once beside inputs and weights, in one call. Threads and memory policy stand under each
table. The ratio to the authors' way is no headline: it says how
slow eager mode is; the floor and plain RoPE say what is left to gain."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="wall time to train for")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "report", help="folder of the report")
    arguments = parser.parse_args()
    started = time.perf_counter()
    about = machine() | {name: importlib.metadata.version(name) for name in LIBRARIES if installed(name)}
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    print(f"1/4 train a tiny Llama with ClexAttention for {arguments.seconds:.0f} s", flush=True)
    torch.manual_seed(0)
    run = train(Trainer(), arguments.seconds)
    save_run(run, out)

    print("2/4 benchmark the weights it learned, then synthetic ones", flush=True)
    status = run_benchmarks(out / "weights.pt", out / "benchmarks.json")
    cases = summary.infos(json.loads((out / "benchmarks.json").read_text()))
    cases.sort(key=lambda info: list(SECTIONS).index(info["section"]))

    print("3/4 plot", flush=True)
    draw_plots(run, cases, out)
    static = document.read()
    gpu_static.draw(static, out)
    (out / "gpu_static.md").write_text(tables.full_report(static, []))

    print("4/4 write", flush=True)
    elapsed = time.perf_counter() - started
    (out / "index.md").write_text(index(about, run, cases, elapsed, status == 0))
    print(summary.printed_summary(summary.verdicts(cases), summary.overheads(cases)))
    print(f"report: {out / 'index.md'} ({elapsed:.0f} s)")
    sys.exit(status)


def save_run(run: TrainingRun, out: Path) -> None:
    """The weights for the benchmarks, the rest for whoever wants to plot it."""
    torch.save({"config": dataclasses.asdict(CONFIG), "up": run.up, "down": run.down}, out / "weights.pt")
    figures = {"losses": run.losses, "factors": run.factors, "held_out": run.held_out, "seconds": run.seconds}
    (out / "training.json").write_text(json.dumps(figures))


def run_benchmarks(weights: Path, results: Path) -> int:
    """Runs pytest in a process of its own, one progress step per case; returns its exit status."""
    options = ["--benchmark-only", f"--benchmark-json={results}", f"--weights={weights}", "-vv", "--color=no"]
    # pytest's log capture would make torch.compile write its whole trace log.
    command = [sys.executable, "-m", "pytest", "benchmarks", *options, "-p", "no:logging", "-p", "no:cacheprovider"]
    output: list[str] = []
    with (
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        tqdm(desc="benchmarks", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} cases, {elapsed} {postfix}") as bar,
    ):
        for line in process.stdout or ():
            output.append(line)
            if collected := re.search(r"collected (\d+) items", line):
                bar.reset(total=int(collected[1]))
            elif case := re.match(r"\S+::(\S+)", line):
                bar.set_postfix_str(case[1])
            # the verdict ends the line of a case, or starts the next one where the case printed something.
            if re.search(r"\b(PASSED|FAILED|ERROR)\b.*\[ *\d+%\]", line):
                bar.update()
    if process.returncode:
        print("".join(output[-60:]), file=sys.stderr)
    if not results.exists():
        sys.exit(f"the benchmarks left no {results.name}: pytest ended with status {process.returncode}")
    return process.returncode


def draw_plots(run: TrainingRun, cases: list[summary.Info], out: Path) -> None:
    plots.plot_loss(run.losses, run.seconds, out / "loss.png")
    plots.plot_frequencies(run.up, run.down, CONFIG, out / "frequencies.png")
    if extra := summary.overheads(cases):
        plots.plot_overheads(extra, out / "overhead.png")
    for device in LAYER_DEVICES:
        if costs := summary.layer_costs(cases, device):
            plots.plot_layer(costs, LAYER_GOALS, out / f"layer_{device}.png")
    if drift := drift_of(cases):
        plots.plot_decode(drift, out / "decode.png")
    whole, table = (first_curves(cases, section) for section in ("end to end", "tables"))
    if whole and table:
        plots.plot_errors(whole, table, error_goals(cases), out / "error.png")


def static_parts(static: document.Static) -> list[str]:
    """What is known of GPUs without one, from the figures that are kept."""
    return [
        "## On a GPU: counted and modelled",
        "From the figures kept in benchmarks/gpu_static.json, which `make gpu-static` counts anew; [gpu_static.md]"
        "(gpu_static.md) has every configuration, peers, bytes and assumptions.",
        *tables.summary_parts(static),
    ]


def first_curves(cases: list[summary.Info], section: str) -> dict[str, Any]:
    return next((info["curves"] for info in cases if info["section"] == section and info["curves"]), {})


def error_goals(cases: list[summary.Info]) -> dict[float, float]:
    """Number of positions -> bound on the error, from the end-to-end cases."""
    return {info["positions"]: info["goals"][0]["bound"] for info in cases if info["section"] == "end to end"}


def model_parts(cases: list[summary.Info]) -> list[str]:
    """The headline: what CLEX costs in a whole model."""
    measured = any(info["section"] == "whole model" for info in cases)
    figures = ["Median time, *measured*:", summary.model_table(cases)] if measured else ["Not measured in this run."]
    return ["## Overhead of CLEX in the whole model", MODEL_TEXT, *figures]


def raw_key_parts(cases: list[summary.Info]) -> list[str]:
    """What raw keys cost a model on its own RoPE: every step, and the one that computes its cache anew."""
    curves = [info["curves"] for info in cases if info["section"] == "raw key cache"]
    parts = ["## Models on their own RoPE over raw keys", RAW_KEY_TEXT]
    if not curves:
        return [*parts, "Not measured in this run."]
    if any("stock" in shown for shown in curves):
        parts += ["Median time, *measured*:", summary.raw_key_table(cases)]
    if any("after" in shown for shown in curves):
        parts += [SWITCH_TEXT, "Median time, *measured*:", summary.switch_table(cases)]
    return parts


def layer_parts(cases: list[summary.Info]) -> list[str]:
    """What CLEX adds to an attention layer: latency and peak memory by length, for every device that ran."""
    parts = []
    for device in LAYER_DEVICES:
        if costs := summary.layer_costs(cases, device):
            parts += [
                f"Median latency, {device}, *measured*:",
                summary.layer_table(costs, LAYER_LENGTHS, "seconds"),
                f"Peak memory, {device}, *measured*:",
                summary.layer_table(costs, LAYER_LENGTHS, "peak_bytes"),
                f"![latency and peak memory over plain RoPE](layer_{device}.png)",
            ]
    return ["## What CLEX adds to an attention layer", LAYER_TEXT, *(parts or ["Not measured in this run."])]


def qkv_parts(cases: list[summary.Info]) -> list[str]:
    """What rotating costs where q and k are made, by shape and tokens."""
    measured = any(info["section"] == "qkv" and info["curves"] for info in cases)
    figures = ["Median latency, *measured*:", summary.qkv_table(cases)] if measured else ["Not measured in this run."]
    return ["## From hidden states to rotated q and k", QKV_TEXT, *figures]


def drift_of(cases: list[summary.Info]) -> dict[str, Any] | None:
    return next((info["curves"]["drift"] for info in cases if "drift" in info["curves"]), None)


def decode_parts(cases: list[summary.Info]) -> list[str]:
    """What a decode step over raw keys takes, and why keys are raw."""
    parts = ["## Decoding over raw keys", DECODE_TEXT]
    if any(info["section"] == "decode" for info in cases):
        parts += ["Median latency, *measured*:", summary.decode_table(cases)]
    else:
        parts.append("Not measured in this run.")
    if drift_of(cases):
        parts += [DRIFT_TEXT, "![error of a decode step against cached tokens](decode.png)"]
    return parts


def index(about: dict[str, str], run: TrainingRun, cases: list[summary.Info], elapsed: float, complete: bool) -> str:
    """The report as Markdown."""
    verdicts = summary.verdicts(cases)
    met = sum(verdict.met for verdict in verdicts)
    parts = [
        "# clex_kernels: what it costs and how exact it is",
        f"One run of `make report`, {elapsed:.0f} s. {met} of {len(verdicts)} goals met.",
        summary.markdown_table(["machine", ""], [[key, value] for key, value in about.items()]),
    ]
    if not complete:
        parts.append("**Some benchmarks failed: their rows are missing below.**")
    parts += [
        *model_parts(cases),
        *raw_key_parts(cases),
        "## Overhead over plain RoPE",
        "Time with frequencies that change or are learned, over the same operation by this package with fixed ones. "
        "Without a gradient it is the same kernel over another table: there, the distance from 1 is this run's noise. "
        "A decode step with fixed ones has nothing to rotate: its keys were rotated when they were cached.",
        summary.markdown_table(
            ["operation", "time over plain RoPE", "label"],
            [[o.name, summary.number(o.ratio, "x"), o.label] for o in summary.overheads(cases)],
        ),
        "![overhead over plain RoPE](overhead.png)",
        *layer_parts(cases),
        *qkv_parts(cases),
        *decode_parts(cases),
        *static_parts(document.read()),
        "## Goals",
        summary.goal_table(verdicts),
        "## Error against position",
        "![error against position](error.png)",
        "## The training run",
        training_text(run),
        "![loss](loss.png)",
        "![frequencies over t](frequencies.png)",
        "## How it was measured",
        RULES,
    ]
    for section, title in SECTIONS.items():
        parts.append(f"## {title}")
        parts += [summary.case_section(info) for info in cases if info["section"] == section]
    return "\n\n".join(parts) + "\n"


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def training_text(run: TrainingRun) -> str:
    held_out = summary.markdown_table(
        ["window (bytes)", "held-out loss (nats per byte)"],
        [[str(length), f"{loss:.3f}"] for length, loss in run.held_out.items()],
    )
    return (
        "A byte-level Llama on pydoc topics and standard-library docstrings, split by document: "
        f"{len(run.losses)} steps in {run.seconds:.0f} s at {CONFIG.train_length} bytes, t drawn from "
        f"1..{CONFIG.max_factor}, positions in runs. It shows that training through the op works; it is too short to "
        f"say how well CLEX extrapolates.\n\n{held_out}"
    )


if __name__ == "__main__":
    main()
