"""The static figures as Markdown."""

from collections.abc import Iterable

from benchmarks.compiled.cases import CASES
from benchmarks.compiled.counts import Counts
from benchmarks.compiled.document import REPORTED, Static
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.model import Model, model, occupancy
from benchmarks.compiled.overhead import Overhead, loop_goals, overhead_of, overheads, prefill_call, projection_call
from benchmarks.compiled.peers import PEERS
from benchmarks.compiled.sass import CLASSES
from benchmarks.compiled.traffic_figures import Figure, goals
from benchmarks.measure import Goal
from benchmarks.summary import markdown_table, number

# what the overview compares: ours, then the pattern of the tutorials.
COMPARED = {
    "prefill, D 64": "attention_fwd-bfloat16-D64-R32",
    "prefill, D 80, 32 of them rotated": "attention_fwd-bfloat16-D80-R16",
    "prefill, D 128": "attention_fwd-bfloat16-D128-R64",
    "prefill, D 256": "attention_fwd-bfloat16-D256-R128",
    "attention backward, dq": "attention_bwd_dq-bfloat16-D128-R64",
    "attention backward, dk and dv": "attention_bwd_dkv-bfloat16-D128-R64",
    "decode over raw keys": "decode-bfloat16-D128-R64",
    "QKV projection, 8192 rows": "qkv_rotary-bfloat16-D128-R64-rows8192",
    "QKV projection, 16 rows": "qkv_rotary-bfloat16-D128-R64-rows16",
    "tutorials' way: rotary in the loop over keys": "tutorial-attention-causal-float32-tables",
}
ABOUT = """\
Nothing here was measured: no kernel of this table has run. *Counted* figures are read from the kernels as they compile
ahead of time for a target: registers and spills from ptxas, instructions of the main loop from the SASS. The main loop
is the one that does the work; of attention that of keys which every query sees. *Modelled* figures say how many clocks
a trip through it keeps the busiest pipe of a multiprocessor busy, and what the result itself would: its multiply-adds
on tensor cores (fp32: on the fp32 pipe) or its bytes from memory. Latency, barriers, bank conflicts, tensor memory and
what tensor cores fetch from shared memory by themselves are not modelled: a model's figure is no forecast."""
BYTES_ABOUT = """\
Bytes that one call moves, *counted* from the addresses of every load and store as the kernel runs in Triton's
interpreter, with sm_80's tiles. Memory delivers each 32-byte sector once in a call, if L2 holds what programs share;
requested is what multiprocessors ask of L2, each distinct byte once a program. transformers' operators are counted one
by one, as if nothing stayed in L2 from one to the next. Attention's loops are of one program, which L2 may serve."""
PEERS_ABOUT = """\
Counted and modelled as ours. What differs: Liger-Kernel rotates in place, with a program per token and no loop, where
ours takes up to 4 tokens and loops over heads, so that instructions are not of the same work; its backward has no
gradient of the frequencies, and stands beside our forward kernel, which is ours for that. The tutorials' attention has
one tile, 128 queries by 64 keys, where ours has 128 keys on sm_90 and sm_100: loops compare within a peer, with rotary
against without, and not theirs with ours. That ours rotates k in a pass of its own is in no loop, but in the whole
prefill above."""
MODEL_ABOUT = """\
Rates per clock and multiprocessor; clocks are those at which the data sheets' tensor rates hold. Simplified are:

- integer instructions all count at one pipe's rate, though multiply-adds and uniform ones have pipes of their own:
  where integers are the busiest pipe, the model is too slow;
- comparisons, choices and maxima of fp32 count at the rate of multiply-adds: too fast;
- products count once by their padded tile, even where warps repeat some of it: too fast;
- L2 is what one multiprocessor can take, not its share of what L2 can give: too fast."""


def model_of(static: Static, target: str, name: str) -> Model | None:
    """None for kernels without a loop, or of which no work is known."""
    case = CASES[name] if name in CASES else PEERS[name].case
    counts = static.of(target, name)
    if case.work is None or counts.main_loop is None:
        return None
    return model(counts, case.work(counts.constants), case.itemsize, target)


def sign(extra: int) -> str:
    return f"{extra:+d}" if extra else "0"


def overview(static: Static) -> str:
    """Instructions that rotary adds to a loop, by target, and the modelled time of a trip over that without."""
    rows = []
    for label, name in COMPARED.items():
        found = {overhead.target: overhead for overhead in overheads(static, [name])}
        rows.append([label, *(overview_cell(found[target]) for target in HARDWARE)])
    for label, call in (
        ("whole prefill of 4096 tokens, with the pass over k: instructions", prefill_call),
        ("whole block of the QKV projection, with its epilogue: instructions", projection_call),
    ):
        rows.append([label, *(number(call(static, target), "x") for target in HARDWARE)])
    return markdown_table(["kernel, bf16", *HARDWARE], rows)


def overview_cell(overhead: Overhead) -> str:
    return f"{sign(overhead.extra)} of {overhead.instructions[1]} ({number(overhead.time, 'x')})"


def configuration_table(static: Static, target: str) -> str:
    """Every configuration on one target."""
    header = ["configuration", "warps", "registers", "spilled bytes", "shared KB", "blocks held (limit)", "occupancy"]
    shown = [name for name in CLASSES if name not in ("fp64", "spill")]
    header += ["loop", *shown, "added by rotary", "busiest pipe", "over the floor"]
    rows = []
    for name in REPORTED:
        counts, found = static.of(target, name), model_of(static, target, name)
        held = occupancy(counts, HARDWARE[target])
        cells = [*resources(counts), f"{held.blocks} ({held.limit})", f"{100 * held.share:.0f} %"]
        if found is None:
            rows.append([*cells, *["-"] * (len(shown) + 4)])
            continue
        loop, overhead = counts.main_loop, overhead_of(static, target, name)
        cells += [str(loop.instructions), *(str(loop.classes.get(name, 0)) for name in shown)]
        cells.append(sign(overhead.extra) if overhead else "-")
        rows.append([*cells, found.bound, f"{number(found.over_floor, 'x')} ({found.floor})"])
    return markdown_table(header, rows)


def resources(counts: Counts) -> list[str]:
    shared = f"{counts.shared_bytes / 1024:.3g}"
    return [counts.name, str(counts.warps), str(counts.registers), str(counts.spill_bytes), shared]


def bare_table(static: Static, target: str) -> str:
    """What is known of a target whose code is not read."""
    rows = [resources(counts) for counts in static.counts[target].values()]
    return markdown_table(["configuration", "waves", "VGPRs", "spilled bytes", "LDS KB"], rows)


def peer_table(static: Static) -> str:
    """Peers beside the configuration of ours that does the same, on every target with SASS."""
    rows = []
    for name, peer in PEERS.items():
        for target in HARDWARE:
            theirs, ours = static.of(target, name), static.of(target, peer.ours)
            overhead = overhead_of(static, target, name), overhead_of(static, target, peer.ours)
            rows.append(
                [
                    *(name, peer.ours, target),
                    *(f"{getattr(theirs, field)} / {getattr(ours, field)}" for field in ("registers", "spill_bytes")),
                    f"{theirs.instructions} / {ours.instructions}",
                    " / ".join(str(c.main_loop.instructions) if c.main_loop else "-" for c in (theirs, ours)),
                    " / ".join(sign(o.extra) if o else "-" for o in overhead),
                    " / ".join(number(o.time, "x") if o else "-" for o in overhead),
                ]
            )
    header = ["peer", "ours", "target", "registers, theirs / ours", "spilled bytes", "instructions", "loop"]
    return markdown_table([*header, "added by rotary", "modelled trip over that without"], rows)


def bytes_table(figures: Iterable[Figure]) -> str:
    rows = [
        [
            *(figure.name, figure.unit, f"{figure.floor:.4g}"),
            *(f"{value:.4g}" for value in (figure.total.memory, figure.total.requested)),
            number(figure.total.memory / figure.floor, "x"),
            ", ".join(f"{part} {moved.memory:.3g}" for part, moved in figure.parts.items()),
        ]
        for figure in figures
    ]
    header = ["call", "bytes for each", "floor", "memory", "requested of L2", "memory over the floor"]
    return markdown_table([*header, "of these"], rows)


def assumption_table() -> str:
    columns = {target: gpu.assumptions() for target, gpu in HARDWARE.items()}
    names = list(next(iter(columns.values())))
    return markdown_table(
        ["assumed", *columns], [[name, *(column[name] for column in columns.values())] for name in names]
    )


def all_goals(static: Static) -> list[Goal]:
    return [*loop_goals(static), *goals(static.traffic)]


def goal_table(found: Iterable[Goal]) -> str:
    rows = [
        [
            goal.what,
            f"{goal.sense} {goal.bound:,g}{goal.unit}",
            f"{goal.found:,.4g}{goal.unit}",
            goal.label,
            "met" if goal.met else "**missed**",
        ]
        for goal in found
    ]
    return markdown_table(["figure", "goal", "found", "label", "goal met"], rows)


def summary_parts(static: Static) -> list[str]:
    """What every report shows."""
    found = all_goals(static)
    missed = [goal for goal in found if not goal.met]
    parts = [
        ABOUT,
        "Instructions that rotary adds to a trip of the main loop, of those without it, *counted*, and in brackets the "
        "*modelled* time of a trip over that without:",
        overview(static),
        "![modelled time over the same without rotary](gpu_overhead.png)",
        "![roofline](gpu_roofline.png)",
        f"{len(found) - len(missed)} of {len(found)} static goals met.",
    ]
    return [*parts, goal_table(missed)] if missed else parts


def full_report(static: Static, notes: list[str]) -> str:
    """Everything, as one page."""
    parts = [
        "# What the kernels cost on a GPU, without one",
        f"Triton {static.triton}.",
        *notes,
        *summary_parts(static),
    ]
    parts += ["## Goals", goal_table(all_goals(static))]
    parts += ["## Beside others", PEERS_ABOUT, peer_table(static)]
    parts += ["## Bytes", BYTES_ABOUT, bytes_table(static.traffic)]
    for target, gpu in HARDWARE.items():
        parts += [f"## {target}", f"Modelled for {gpu.product}.", configuration_table(static, target)]
    for target in static.counts.keys() - HARDWARE.keys():
        parts += [f"## {target}", "Compiled; its code is not read, nothing is modelled.", bare_table(static, target)]
    parts += ["## What the model assumes", MODEL_ABOUT, assumption_table()]
    return "\n\n".join(parts) + "\n"
