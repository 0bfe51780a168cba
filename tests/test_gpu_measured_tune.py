"""Tuning the launch tables, on a CPU through Triton's interpreter: what is tried, what is chosen, what is printed."""

import copy
import importlib
import pkgutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from gpu_measured_mock import TUNED, Cpu
from interpreter import interpreted

from benchmarks import gpu_measured
from benchmarks.compiled.candidates import TABLES, candidates
from benchmarks.on_gpu import timing, tune, tune_subjects
from benchmarks.on_gpu.timing import OUT_OF_TIME
from benchmarks.on_gpu.tune import Slot, chosen, replacement, slots_of, try_slot, tuning_text
from benchmarks.on_gpu.tune_subjects import SUBJECTS
from clex_kernels import kernels
from clex_kernels.kernels import launch_tables
from clex_kernels.kernels.launch_tables import ANY

TODAY = copy.deepcopy(TABLES)
# one place of every table, small enough for the interpreter.
SLOTS = [
    Slot("attention_fwd", "half", 64),
    Slot("attention_bwd_dq", "float32", 128),
    Slot("attention_bwd_dkv", "half", 64),
    Slot("decode", "half", 128),
    Slot("qkv_rotary", "half", 16),
    Slot("rotary", "half", ANY),
    Slot("rotary_bwd", "half", 64),
    Slot("append", "float32", 64),
    Slot("attention_fwd_keys", "half", ANY),
    Slot("attention_bwd_delta", "half", ANY),
    Slot("attention_bwd_dfreq", "float32", ANY),
    Slot("decode_combine", "float32", ANY),
]


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Entries that launchers found, and the interpreter to launch with."""
    found: list[tuple[int, ...]] = []
    find = launch_tables.find_entry

    def spy(*arguments: Any) -> tuple[int, ...]:
        found.append(find(*arguments))
        return found[-1]

    for module in pkgutil.iter_modules(kernels.__path__):
        loaded = importlib.import_module(f"clex_kernels.kernels.{module.name}")
        if hasattr(loaded, "find_entry"):
            monkeypatch.setattr(loaded, "find_entry", spy)
    monkeypatch.setattr(tune, "ROUNDS", (1, 1))
    monkeypatch.setattr(timing, "WARM_TURNS", (0,))
    with interpreted():
        yield found
    assert TABLES == TODAY


def few(name: str, architecture: str, kind: str, size: int) -> list[tuple[int, ...]]:
    """Today's entry, and the candidate that is most unlike it."""
    all_of_them = candidates(name, architecture, kind, size)
    return list(dict.fromkeys([all_of_them[0], all_of_them[-1]]))


@pytest.mark.parametrize("slot", SLOTS, ids=lambda slot: slot.name)
def test_every_candidate_is_launched_in_its_place_and_is_right(slot: Slot, looked_up, monkeypatch):
    monkeypatch.setattr(tune, "candidates", few)
    entries = [repr(entry) for entry in few(slot.table, "sm_80", slot.kind, slot.size)]
    tried: list[str] = []
    record = try_slot(Cpu(), "sm_80", slot, TUNED, time.time() + 3600, {}, tried.append)
    assert record["reasons"] == {}
    assert list(record["seconds"]) == list(record["entries"]) == list(dict.fromkeys(tried)) == entries
    assert {repr(entry) for entry in looked_up} >= set(tried)


def test_every_table_has_a_subject_and_each_of_its_places_is_tried():
    assert set(SUBJECTS) == set(TABLES)
    for architecture in launch_tables.ARCHITECTURES:
        slots = slots_of(architecture)
        assert len(slots) == sum(len(rows) for table in TABLES.values() for rows in table[architecture].values())
        assert [slot.kind for slot in slots[:5]] == ["half"] * 5


def test_the_sizes_tuned_are_those_their_places_are_for():
    """At full size, too, a subject must look up the entry that is exchanged."""
    full = tune_subjects.TUNE
    for kind in ("half", "float32"):
        assert 2 * full.lengths[kind] > max(size for size in TABLES["qkv_rotary"]["sm_90"][kind] if size != ANY)
        assert full.lengths[kind] > max(size for size in TABLES["rotary"]["sm_90"][kind] if size != ANY)


def test_a_candidate_that_is_wrong_raises_or_loses_the_device_is_out(looked_up, monkeypatch):
    slot = Slot("rotary", "half", 64)
    monkeypatch.setattr(tune, "candidates", lambda *where: candidates(*where)[:2])
    make = SUBJECTS["rotary"]

    def spoiled(*arguments: Any) -> tune_subjects.Subject:
        subject = make(*arguments)

        def run() -> None:
            subject.run()
            if TABLES["rotary"]["sm_80"]["half"][64].tokens == 2:
                # as a launch that reaches no further than its first tokens would leave it.
                subject.outputs[0][-1] = float("nan")

        return tune_subjects.Subject(run, subject.outputs, subject.errors)

    monkeypatch.setitem(SUBJECTS, "rotary", spoiled)
    record = try_slot(Cpu(), "sm_80", slot, TUNED, time.time() + 3600, {}, lambda name: None)
    (wrong,) = record["reasons"]
    assert "tokens=2" in wrong
    assert record["reasons"][wrong].startswith("wrong: error of q: nan")
    assert chosen(record) == record["today"]
    without = {record["today"]: "lost the device: it crashed"}
    again = try_slot(Cpu(), "sm_80", slot, TUNED, time.time() + 3600, without, lambda name: None)
    assert again["seconds"] == {}
    assert chosen(again) == again["today"]


def make_record(**changes: Any) -> dict[str, Any]:
    entries = {repr(entry): list(entry) for entry in candidates("attention_fwd", "sm_90", "half", 128)[:3]}
    today, other, third = entries
    record = {
        "name": "attention_fwd, half, up to 128",
        "table": "attention_fwd",
        "kind": "half",
        "size": 128,
        "architecture": "sm_90",
        "entries": entries,
        "today": today,
        "seconds": {today: 1.0, other: 0.9},
        "reasons": {third: "raised OutOfResources: shared memory"},
    }
    return record | changes


def test_the_fastest_entry_is_chosen_if_it_is_faster_by_more_than_noise():
    record = make_record()
    today, other, _ = record["entries"]
    assert chosen(record) == other
    assert chosen(make_record(seconds={today: 1.0, other: 0.98})) == today
    assert chosen(make_record(seconds={other: 5.0})) == other
    assert chosen(make_record(seconds={})) == today


def test_the_replacement_is_the_table_with_the_chosen_entries():
    record = make_record()
    source = replacement([record, {"name": "x", "not_run": OUT_OF_TIME}])
    scope: dict[str, Any] = {}
    exec(source, dict(vars(launch_tables)), scope)
    assert set(scope) == {"ATTENTION_FWD", "__annotations__"}
    expected = copy.deepcopy(TODAY["attention_fwd"])
    expected["sm_90"]["half"][128] = type(expected["sm_90"]["half"][128])(*record["entries"][chosen(record)])
    assert scope["ATTENTION_FWD"] == expected != TODAY["attention_fwd"] == TABLES["attention_fwd"]
    assert replacement([make_record(seconds={})]).startswith("# every entry")


def test_the_text_has_every_candidate_with_its_time_or_reason():
    text = tuning_text([make_record(), {"name": "decode, half, up to 64", "not_run": OUT_OF_TIME}])
    rows = [line for line in text.splitlines() if line.startswith("| Tile")]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["1 s", "1.000x", "today's |"],
        ["900 ms", "0.900x", "chosen |"],
        ["raised OutOfResources: shared memory", "-", " |"],
    ]
    assert f"## decode, half, up to 64\n\n{OUT_OF_TIME}" in text


@pytest.mark.parametrize("none_ran", [False, True])
def test_the_command_prints_tables_and_what_was_left_out(none_ran: bool, tmp_path: Path, monkeypatch, capsys):
    asked = []
    late = {"name": "decode, half, up to 64", "not_run": OUT_OF_TIME}

    def run(stage: str, until: float, tables: str) -> list[dict[str, Any]]:
        asked.append((stage, tables))
        if stage == "floors":
            return [{"name": "floors", "floors": {}, "tables": "sm_90", "about": {"GPU": "none"}}]
        return [late] if none_ran else [make_record(), late]

    monkeypatch.setattr(gpu_measured, "missing_cuda", lambda: None)
    status = gpu_measured.main(["--tune", "--out", str(tmp_path)], run)
    assert status == (1 if none_ran else 0)
    assert asked == [("floors", ""), ("compile", "sm_90"), ("tune", "sm_90")]
    printed = capsys.readouterr().out
    assert "left out: decode, half, up to 64\n" in printed
    assert ("ATTENTION_FWD: Table[Tile] = {" in printed) != none_ran
    assert {path.name for path in tmp_path.iterdir()} == {
        "launch_tables.json",
        "launch_tables.md",
        "launch_tables.py",
    }
