"""From the benchmarks' JSON to the words and tables of the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Info = dict[str, Any]

MEDIAN_NOTE = "median of alternating rounds"


@dataclass(frozen=True)
class Verdict:
    """One goal of the design beside what was found."""

    row: str
    case: str
    weights: str
    what: str
    goal: str
    found: str
    label: str
    met: bool

    @property
    def word(self) -> str:
        return "met" if self.met else "MISSED"


@dataclass(frozen=True)
class Overhead:
    """Time with CLEX over the time of the same operation with plain RoPE's fixed frequencies."""

    name: str
    ratio: float
    label: str


@dataclass(frozen=True)
class LayerCost:
    """An attention layer, forward and backward, at one length; each of [CLEX, frozen, transformers-style]."""

    seconds: tuple[float, ...]
    peak_bytes: tuple[float, ...]
    rounds: int

    def over(self, quantity: str) -> tuple[float, float]:
        """What CLEX takes over this package with frozen frequencies, and over transformers' way with plain RoPE."""
        clex, frozen, transformers = getattr(self, quantity)
        return clex / frozen, clex / transformers


def infos(document: dict[str, Any]) -> list[Info]:
    """What every benchmark recorded about itself, in the order they ran."""
    return [benchmark["extra_info"] for benchmark in document["benchmarks"] if benchmark["extra_info"]]


def verdicts(cases: Iterable[Info]) -> list[Verdict]:
    return [
        Verdict(
            row=info["row"],
            case=info["case"],
            weights=info["weights"],
            what=goal["what"],
            goal=f"{goal['sense']} {goal['bound']:,g}{goal['unit']}",
            found=number(goal["found"], goal["unit"]),
            label=goal["label"],
            met=holds(goal),
        )
        for info in cases
        for goal in info["goals"]
    ]


def holds(goal: dict[str, Any]) -> bool:
    """Judged again from the figures: the report doesn't repeat a stored verdict. NaN is a miss."""
    found, bound = float(goal["found"]), float(goal["bound"])
    return found <= bound if goal["sense"] == "at most" else found >= bound


def overheads(cases: Iterable[Info]) -> list[Overhead]:
    found = []
    for info in cases:
        if info["overhead"]:
            with_clex, plain = (info["seconds"][name] for name in info["overhead"])
            found.append(Overhead(f"{info['row']}: {info['case']}", with_clex / plain, info["label"]))
    return found


def layer_costs(cases: Iterable[Info], device: str) -> dict[int, LayerCost]:
    """Length -> cost, of the lengths that were measured on the device, shortest first."""
    costs = {}
    for info in cases:
        if info["section"] == "layer" and info["curves"]["device"] == device:
            ways = (*info["overhead"], info["rival"])
            seconds, peaks = (
                tuple(values[way] for way in ways) for values in (info["seconds"], info["curves"]["peak_bytes"])
            )
            costs[info["positions"]] = LayerCost(seconds, peaks, min(info["rounds"][way] for way in ways))
    return dict(sorted(costs.items()))


def layer_table(costs: Mapping[int, LayerCost], lengths: Iterable[int], quantity: str) -> str:
    """The seconds or peak_bytes of a layer by length, with ratios; a length that was not measured shows as such."""
    shown = {"seconds": duration, "peak_bytes": size}[quantity]
    header = ["length", "CLEX", "frozen", "transformers-style", "CLEX over frozen", "CLEX over transformers", "rounds"]
    rows = []
    for length in lengths:
        if length not in costs:
            rows.append([f"{length:,}", "not measured", *["-"] * (len(header) - 2)])
            continue
        cost = costs[length]
        values = [shown(value) for value in getattr(cost, quantity)]
        ratios = [number(ratio, "x") for ratio in cost.over(quantity)]
        rows.append([f"{length:,}", *values, *ratios, str(cost.rounds) if quantity == "seconds" else "1"])
    return markdown_table(header, rows)


def model_table(cases: Iterable[Info]) -> str:
    """Whole steps of a model, in the order they ran: what CLEX takes over frozen frequencies and over plain RoPE."""
    rows = []
    for info in cases:
        if info["section"] == "whole model":
            names = (*info["overhead"], info["curves"]["stock"], info["rival"])
            clex, *others = (info["seconds"][name] for name in names)
            rows.append(
                [
                    f"{info['row']}: {info['case']}",
                    *(duration(seconds) for seconds in (clex, *others)),
                    *(number(clex / seconds, "x") for seconds in others),
                    info["rival"],
                ]
            )
    header = ["step", "CLEX", "frozen", "transformers", "its fastest form", "CLEX over frozen", "over transformers"]
    return markdown_table([*header, "over its fastest form", "which is"], rows)


def raw_key_table(cases: Iterable[Info]) -> str:
    """Decode steps of models on their own RoPE, in the order they ran: raw keys and transformers as it is."""
    rows = []
    for info in cases:
        if info["section"] == "raw key cache" and "stock" in info["curves"]:
            names = (info["ours"], info["curves"]["stock"], info["rival"])
            ours, *others = (info["seconds"][name] for name in names)
            latencies = (duration(seconds) for seconds in (ours, *others))
            ratios = (number(ours / seconds, "x") for seconds in others)
            rows.append([info["case"], *latencies, *ratios, info["rival"]])
    header = ["decode step", "raw keys", "transformers", "its fastest form", "over transformers"]
    return markdown_table([*header, "over its fastest form", "which is"], rows)


def switch_table(cases: Iterable[Info]) -> str:
    """Steps that compute a cache anew: what that takes in passes over all tokens, and in steps."""
    rows = []
    for info in cases:
        if info["section"] == "raw key cache" and "after" in info["curves"]:
            names = (info["ours"], info["rival"], info["curves"]["after"])
            ours, *others = (info["seconds"][name] for name in names)
            latencies = (duration(seconds) for seconds in (ours, *others))
            rows.append([info["case"], *latencies, *(number(ours / seconds, "x") for seconds in others)])
    header = ["step at the switch", "recompute", "transformers' pass over all tokens", "a step past the switch"]
    return markdown_table([*header, "over that pass", "over a step"], rows)


def decode_table(cases: Iterable[Info]) -> str:
    """Decode steps that have a rival, in the order they ran: latencies, and what they move."""
    rows = []
    for info in cases:
        if info["section"] == "decode" and info["rival"]:
            ours, plain = (info["seconds"][name] for name in info["overhead"])
            floor, moved = info["seconds"].get(info["floor"]), info["curves"]["bytes"]
            latencies = (ours, plain, info["seconds"][info["rival"]], math.nan if floor is None else floor)
            ratios = (info["ratio"], ours / plain, None if floor is None else ours / floor)
            rows.append(
                [
                    info["case"],
                    *(duration(seconds) for seconds in latencies),
                    *("-" if ratio is None else number(ratio, "x") for ratio in ratios),
                    f"{moved / info['curves']['tokens']:,.0f}",
                    f"{moved / ours / 1e9:.3g}",
                ]
            )
    header = ["case", "raw keys", "no rotation", "rival", "floor", "faster than the rival", "over no rotation"]
    return markdown_table([*header, "over the floor", "bytes per key (counted)", "GB/s"], rows)


def qkv_table(cases: Iterable[Info]) -> str:
    """Projections with rotary, forward, in the order they ran: latencies, and how near they come to the machine's."""
    rows = []
    for info in cases:
        if info["section"] == "qkv" and info["curves"]:
            curves, names = info["curves"], (info["ours"], info["floor"], info["curves"]["three"], info["rival"])
            latencies = [info["seconds"].get(name, math.nan) for name in names]
            ours, floor, three, _ = latencies
            rows.append(
                [
                    info["case"],
                    *(duration(seconds) for seconds in latencies),
                    *(number(ratio, "x") for ratio in (ours / floor, ours / three, info["ratio"])),
                    *(f"{curves[count] / ours / 1e9:.3g}" for count in ("operations", "bytes")),
                ]
            )
    header = ["case", "qkv_rotary", "one linear", "three linears", "rival", "over one linear", "over three linears"]
    return markdown_table([*header, "faster than the rival", "GFLOP/s", "GB/s of weights"], rows)


def number(value: float, unit: str = "") -> str:
    """Short and readable: 0.708x, 1,043x, 3.1e-13, 172."""
    if not math.isfinite(value):
        return "not found"
    if unit != "x":
        return f"{value:,.0f}" if value == round(value) else f"{value:.1e}"
    # three decimals near 1, where a goal of 1.03x is decided; none where they are noise.
    decimals = 3 if value < 2 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}x"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def error_text(errors: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in errors.items()) or "-"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def goal_table(found: Iterable[Verdict]) -> str:
    return markdown_table(
        ["operation", "case", "weights", "figure", "goal", "found", "label", "goal met"],
        [[v.row, v.case, v.weights, v.what, v.goal, v.found, v.label, "met" if v.met else "**missed**"] for v in found],
    )


def case_section(info: Info) -> str:
    """One benchmark: every way with its time, its ratios and its error against fp64."""
    ours = info["seconds"][info["ours"]]
    floor = info["seconds"].get(info["floor"])
    rows = []
    for name, seconds in sorted(info["seconds"].items(), key=lambda item: item[1]):
        shown = f"**{name}**" if name == info["ours"] else f"{name} (the rival)" if name == info["rival"] else name
        rows.append(
            [
                shown,
                duration(seconds),
                number(seconds / ours, "x"),
                number(seconds / floor, "x") if floor else "-",
                error_text(info["errors"].get(name, {})),
                str(info["rounds"][name]),
            ]
        )
    table = markdown_table(["way", "median time", "time over ours", "time over the floor", "error", "rounds"], rows)
    facts = [
        f"{number(info['ratio'], 'x')} faster than the rival" if info["rival"] else "no rival",
        f"weights: {info['weights']}",
        f"threads: {info['threads']}",
        f"memory: {info['memory']}",
        f"error: {info['error_unit']}",
        *info["notes"],
    ]
    return f"**{info['row']}** ({info['case']}; {info['label']})\n\n{table}\n\n" + "; ".join(facts) + "."


def printed_summary(found: Sequence[Verdict], extra: Sequence[Overhead]) -> str:
    """For the terminal: the headline, then one line per goal."""
    lines = ["overhead over plain RoPE (same operation, fixed frequencies):"]
    lines += [f"  {number(o.ratio, 'x'):>8}  {o.name}" for o in extra]
    lines.append("goals:")
    for v in found:
        lines.append(f"  {v.word:<6} {v.found:>9} ({v.goal}, {v.label})  {v.row} [{v.case}; {v.weights}]: {v.what}")
    met = sum(v.met for v in found)
    lines.append(f"{met} of {len(found)} goals met")
    return "\n".join(lines)
