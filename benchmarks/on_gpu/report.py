"""From the records of a run on a GPU to its verdict and its Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.measure import Goal
from benchmarks.on_gpu.case import ERROR, OVER_FLOOR, OVER_RIVAL
from benchmarks.on_gpu.floors import Cost, Floors
from benchmarks.on_gpu.timing import OUT_OF_TIME
from benchmarks.summary import Info, duration, error_text, goal_table, markdown_table, number, verdicts

Document = dict[str, Any]
SECTIONS = {
    "attention": "Attention",
    "decode": "Decoding",
    "rotary": "Rotary",
    "qkv": "Projection to q, k and v",
    "layer": "Attention layer",
    "frequencies": "Frequencies",
    "tables": "Tables",
}
RULES = """\
Times are *measured*: CUDA events around every single call, medians over rounds in which all ways of a case run once, in
another order every round. Before a timed call its inputs are replaced by those of another set, the L2 cache is flushed
by writing twice its size, and the GPU is kept busy until the host has handed the call over: the time is the GPU's own,
and the host's stands beside it. What a call displaces from the cache has then to be written back, up to the cache's
size in its own time; a short call that only reads is further from its floor for that. After each call, untimed, its
result is compared with fp64. A way that raises or is wrong shows as such. The *measured floor* is the longer of two
times: of the bytes that the shapes ask for at the bandwidth of a large copy, and of the operations at the rate of a
large bf16 product. Over no rotary: over this package's own call on what was rotated beforehand, or, of a layer, with
frozen frequencies. Ratios are of times, those below 1 are faster. The spread is the distance of the quartiles over the
median."""


def problem_of(record: Info) -> str | None:
    """Why a task has nothing good to say; None if it has."""
    return record.get("problem") or record.get("failed") or record.get("not_run")


def failures(document: Document) -> list[str]:
    """What makes the run fail, in words: a kernel that is wrong or raises, and a check that did not run."""
    found = [f"check {check['name']}: {problem}" for check in document["checks"] if (problem := problem_of(check))]
    for case in document["cases"]:
        if "failed" in case:
            found.append(f"benchmark {case['name']}: {case['failed']}")
        reasons = case.get("reasons", {})
        for name in case.get("own", []):
            if reasons.get(name, OUT_OF_TIME) != OUT_OF_TIME:
                found.append(f"benchmark {case['name']}: {name}: {reasons[name]}")
    return found


def finish(case: Info, floors: Floors) -> Info:
    """The record with what follows from it: floor, fastest rival, ratios, goals."""
    if "seconds" not in case:
        return case
    cost, seconds = Cost(case["bytes"], case["operations"]), case["seconds"]
    ours = seconds.get(case["ours"])
    timed = [name for name in case["rivals"] if name in seconds]
    rival = min(timed, key=seconds.__getitem__) if timed else None
    floor = floors.seconds(cost)

    def over(name: str | None) -> float | None:
        return ours / seconds[name] if ours and name in seconds else None

    goals = [goal_of(aim, case, ours, floor, rival) for aim in case["aims"]] if ours else []
    return {
        **case,
        "weights": "synthetic",
        "floor_seconds": floor,
        "floor_bound": floors.bound(cost),
        "rival": rival,
        "over_rival": over(rival),
        "over_floor": ours / floor if ours else None,
        "over_without": over(case["without"]),
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
    }


def goal_of(aim: Mapping[str, Any], case: Info, ours: float, floor: float, rival: str | None) -> Goal:
    """NaN, a miss, where it could not be found."""
    bound, missing = aim["bound"], float("nan")
    if aim["over"] == ERROR:
        worst = max(case["errors"].get(case["ours"], {}).values(), default=missing)
        return Goal(aim["what"], worst, "at most", bound, unit="")
    base = {OVER_FLOOR: floor, OVER_RIVAL: case["seconds"].get(rival)}.get(
        aim["over"], case["seconds"].get(aim["over"])
    )
    what = f"{aim['what']} ({rival})" if aim["over"] == OVER_RIVAL and rival else aim["what"]
    return Goal(what, ours / base if base else missing, "at most", bound)


def shown(case: Info, name: str) -> str:
    """A way's time, or why it has none in a word or two."""
    if name in case["seconds"]:
        return duration(case["seconds"][name])
    reason = case["reasons"].get(name, "-")
    return next((word for word in ("raised", "wrong", "not installed", OUT_OF_TIME) if reason.startswith(word)), reason)


def ratio(value: float | None) -> str:
    return "-" if value is None else number(value, "x")


def row_table(cases: Sequence[Info]) -> str:
    """Cases of one operation: ours, each rival, and ratios."""
    rivals = list(dict.fromkeys(name for case in cases for name in case["rivals"]))
    header = ["case", "ours", *rivals, "measured floor", "over the fastest rival", "over the floor", "over no rotary"]
    rows = [
        [
            case["case"],
            shown(case, case["ours"]),
            *(shown(case, name) if name in case["rivals"] else "-" for name in rivals),
            f"{duration(case['floor_seconds'])} ({case['floor_bound']})",
            *(ratio(case[key]) for key in ("over_rival", "over_floor", "over_without")),
        ]
        for case in cases
    ]
    return markdown_table(header, rows)


def detail_part(case: Info) -> str:
    """Every way of a case, and what kept others from a time."""
    ours, rows = case["seconds"].get(case["ours"]), []
    for name, seconds in sorted(case["seconds"].items(), key=lambda item: item[1]):
        mark = f"**{name}**" if name == case["ours"] else f"{name} (the rival)" if name == case["rival"] else name
        rows.append(
            [
                mark,
                duration(seconds),
                f"{case['spreads'][name]:.1%}",
                duration(case["host_seconds"][name]),
                ratio(seconds / ours if ours else None),
                ratio(seconds / case["floor_seconds"]),
                error_text(case["errors"].get(name, {})),
                str(case["rounds"][name]),
            ]
        )
    header = ["way", "median time", "spread", "host", "over ours", "over the floor", "error", "rounds"]
    parts = [f"**{case['row']}** ({case['case']}; {case['label']})", markdown_table(header, rows)]
    if case["reasons"]:
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in case["reasons"].items()))
    facts = [*case["notes"], f"error: {case['error_unit']}"]
    if case["peak_bytes"]:
        peaks = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in case["peak_bytes"].items())
        facts.append(f"most memory held beside inputs and weights: {peaks}")
    return "\n\n".join([*parts, "; ".join(facts) + "."])


def check_table(checks: Sequence[Info]) -> str:
    """By kernel: how many comparisons, and what came of them."""
    rows = []
    for kernel in dict.fromkeys(kernel_of(check) for check in checks):
        own = [check for check in checks if kernel_of(check) == kernel]
        missed = sum("not_run" in check for check in own)
        wrong = sum(problem_of(check) is not None for check in own) - missed
        counts = (len(own), len(own) - missed - wrong, wrong, missed)
        rows.append([kernel, *map(str, counts)])
    return markdown_table(["kernel", "comparisons with fp64", "passed", "failed", "not run"], rows)


def kernel_of(check: Info) -> str:
    return check["name"].split(":")[0]


def facts_table(title: str, facts: Mapping[str, str]) -> str:
    return markdown_table([title, ""], [[key, value] for key, value in facts.items()])


def feature_parts(cases: Iterable[Info]) -> list[str]:
    """A section per feature, in it a table per operation."""
    parts, ran = [], [case for case in cases if "seconds" in case]
    for section, title in SECTIONS.items():
        rows = dict.fromkeys(case["row"] for case in ran if case["section"] == section)
        parts.append(f"## {title}")
        parts += [f"{row}:\n\n{row_table([case for case in ran if case['row'] == row])}" for row in rows]
        if not rows:
            parts.append("Not measured in this run.")
    return parts


def summary_lines(document: Document) -> list[str]:
    """The verdict: counts, then every failure, and every benchmark or way that time did not reach."""
    cases, found = document["cases"], failures(document)
    goals = verdicts(case for case in cases if "goals" in case)
    late = [f"benchmark {case['name']}: {case['not_run']}" for case in cases if "not_run" in case]
    late += [
        f"benchmark {case['name']}: {name}: {reason}"
        for case in cases
        for name, reason in case.get("reasons", {}).items()
        if reason == OUT_OF_TIME
    ]
    if any("not_run" in check for check in document["checks"]):
        late.append("compiled kernels are kept: another run gets further, and --seconds gives it more time")
    return [
        f"{len(document['checks'])} comparisons of kernels with fp64, {len(found)} failures, "
        f"{sum(goal.met for goal in goals)} of {len(goals)} goals met, in {document['seconds']:.0f} s.",
        *(f"- **{failure}**" for failure in found),
        *(f"- {line}" for line in late),
    ]


def index(document: Document) -> str:
    """The report as Markdown."""
    cases, device = document["cases"], document["device"]
    floors = Floors(**device["floors"])
    parts = [
        "# clex_kernels on a GPU, measured",
        "\n".join(summary_lines(document)),
        facts_table("device", device["about"]),
        facts_table("rivals' packages", device["libraries"]),
        facts_table(
            "measured floor",
            {
                "copy, bytes read and written": f"{floors.bandwidth / 1e9:,.0f} GB/s",
                "bf16 product": f"{floors.rate / 1e12:,.1f} TFLOP/s",
            },
        ),
        "## Correctness",
        check_table(document["checks"]),
        "## Goals",
        goal_table(verdicts(case for case in cases if "goals" in case)),
        *feature_parts(cases),
        "## How it was measured",
        RULES,
        "## Every way",
        *(detail_part(case) for case in cases if "seconds" in case),
    ]
    return "\n\n".join(parts) + "\n"
