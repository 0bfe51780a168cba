"""The whole of `make gpu` on a CPU, with only the device's own layer replaced: checks, times, reports, exit status."""

import copy
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("torchdiffeq")

import gpu_measured_packages
from gpu_measured_mock import SIZES, TUNED, Cpu, run_here

from benchmarks import formulations, gpu_measured, summary
from benchmarks.on_gpu import checks, report, rivals, rotary_checks, running, stages
from benchmarks.on_gpu.case import ERROR, OVER_FLOOR, OVER_RIVAL, run_case
from benchmarks.on_gpu.checks import Check
from benchmarks.on_gpu.floors import Floors
from benchmarks.on_gpu.sizes import FULL
from benchmarks.on_gpu.timing import OUT_OF_TIME, Rival
from benchmarks.on_gpu.tune_subjects import SUBJECTS
from clex_kernels import reference

FORMS = (
    formulations.for_q_and_k,
    formulations.with_frequencies,
    formulations.attend,
    formulations.attend_with_frequencies,
    formulations.compiled_whole,
)


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """torch.compile does nothing, as compiling for a CPU would take longest; what it was asked for stays eager."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        for form in FORMS:
            form.cache_clear()
        yield
        for form in FORMS:
            form.cache_clear()


@pytest.fixture(scope="module")
def fewer_rounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CASE_SECONDS", 0.0)
        patch.setattr(stages, "CASE_ROUNDS", (3, 3))
        patch.setattr(rotary_checks, "ROWS_FAR", 1 << 14)
        authors = reference.frequencies

        def with_long_steps(*arguments: Any) -> torch.Tensor:
            *weights, config = arguments
            return authors(*weights, replace(config, step_size=2.5))

        # 1500 steps would take longer than all else.
        patch.setattr(reference, "frequencies", with_long_steps)
        yield


@pytest.fixture(scope="module")
def document(eager: None, fewer_rounds: None) -> dict[str, Any]:
    return running.measure(run_here, 3600.0)


def test_every_check_passes_and_every_way_of_ours_is_right(document: dict[str, Any]):
    assert report.failures(document) == []
    kernels = {check["name"].split(":")[0] for check in document["checks"]}
    assert kernels == {"rotary", "frequencies", "tables", "attention", "decode", "append_kv", "qkv_rotary"}
    assert all("problem" in check for check in document["checks"])


def test_every_case_has_times_floors_and_ratios(document: dict[str, Any]):
    assert {case["section"] for case in document["cases"]} == set(report.SECTIONS)
    for case in document["cases"]:
        for name in case["own"]:
            assert case["seconds"][name] > 0, (case["name"], name)
            assert case["rounds"][name] == 3 == len(case["all_seconds"][name])
            assert case["errors"][name], name
        assert case["floor_seconds"] > 0
        assert case["over_floor"] == pytest.approx(case["seconds"][case["ours"]] / case["floor_seconds"])
        if case["without"]:
            assert case["over_without"] == pytest.approx(
                case["seconds"][case["ours"]] / case["seconds"][case["without"]]
            )
        assert case["rival"] == min(
            (name for name in case["rivals"] if name in case["seconds"]), key=case["seconds"].get, default=None
        )


def test_rivals_that_are_not_here_are_listed_as_such(document: dict[str, Any]):
    reasons = {name: reason for case in document["cases"] for name, reason in case["reasons"].items()}
    for module in ("flash_attn", "flashinfer"):
        assert any(reason.startswith("not installed") and module in reason for reason in reasons.values())
    assert set(document["device"]["libraries"]) == set(rivals.LIBRARIES)
    assert reasons["torch.compile rotary + SDPA by cuDNN"].startswith("raised RuntimeError")
    # of all that can run here, only what has no kernel for a CPU did not.
    for name, reason in reasons.items():
        assert reason.startswith("not installed") or "cuDNN" in name or "Liger" in name, (name, reason)


def test_the_report_is_written_with_everything_in_it(document: dict[str, Any], tmp_path: Path, capsys):
    assert running.write_report(document, tmp_path) == 0
    kept = json.loads((tmp_path / "measured.json").read_text())
    assert len(kept["cases"]) == len(document["cases"])
    text = (tmp_path / "index.md").read_text()
    assert "a CPU instead" in text
    assert "GB/s" in text
    for case in document["cases"]:
        assert f"**{case['row']}** ({case['case']}; measured)" in text
        for name, reason in case["reasons"].items():
            assert f"- {name}: {reason}" in text
    for title in report.SECTIONS.values():
        assert f"## {title}\n" in text
    assert "Not measured in this run" not in text
    assert re.search(r"\| rotary \| \d+ \| \d+ \| 0 \| 0 \|", text)
    assert "0 failures" in capsys.readouterr().out


def change(document: dict[str, Any], **cases: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    changed["cases"][0].update(cases)
    return changed


def test_a_wrong_kernel_fails_the_run_but_a_wrong_rival_does_not(document: dict[str, Any], tmp_path: Path):
    case = document["cases"][0]
    wrong = {"seconds": {}, "reasons": {case["ours"]: "wrong: error of out: 9.0e-01, expected at most 0.05"}}
    other = change(document, **wrong)
    assert report.failures(other) == [f"benchmark {case['name']}: {case['ours']}: {wrong['reasons'][case['ours']]}"]
    assert running.write_report(other, tmp_path) == 1
    assert "**benchmark" in (tmp_path / "index.md").read_text()
    late = change(document, reasons={case["ours"]: OUT_OF_TIME})
    assert report.failures(late) == []
    assert f"{case['name']}: {case['ours']}: {OUT_OF_TIME}" in report.index(late)
    assert report.failures(change(document, reasons={case["rivals"][0]: "wrong: error"})) == []
    assert report.failures(change(document, failed="ValueError: no")) == [f"benchmark {case['name']}: ValueError: no"]


@pytest.mark.parametrize("outcome", ["problem", "failed", "not_run"])
def test_a_check_that_fails_or_does_not_run_fails_the_run(outcome: str, document: dict[str, Any], tmp_path: Path):
    changed = copy.deepcopy(document)
    check = changed["checks"][5]
    check[outcome] = "out: error 1.0 over the bound 0.1"
    assert running.write_report(changed, tmp_path) == 1
    assert report.failures(changed) == [f"check {check['name']}: {check[outcome]}"]
    counts = "| 0 | 1 |" if outcome == "not_run" else "| 1 | 0 |"
    assert counts in report.check_table(changed["checks"])


def test_cases_that_time_did_not_reach_are_listed(fewer_rounds: None, tmp_path: Path):
    late = {"name": "x", "not_run": OUT_OF_TIME}
    results = run_here("cases", time.time() - 1, "")
    assert len(results) == len(stages.all_cases(SIZES))
    assert all(result["not_run"] == OUT_OF_TIME for result in results)
    device = {"about": {}, "libraries": {}, "floors": {"bandwidth": 1.0, "rate": 1.0}, "tables": "sm_80"}
    text = report.index({"device": device, "checks": [], "cases": [late], "seconds": 1.0})
    assert f"- benchmark x: {OUT_OF_TIME}" in text
    assert text.count("Not measured in this run") == len(report.SECTIONS)


def test_a_kernel_that_is_wrong_fails_its_checks(monkeypatch: pytest.MonkeyPatch):
    right = rotary_checks.apply_rotary

    def slightly_wrong(q: torch.Tensor, k: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        q, k = right(q, k, *arguments, **options)
        return q * 1.05, k

    monkeypatch.setattr(rotary_checks, "apply_rotary", slightly_wrong)
    found = [checks.run_check(Cpu(), check, {}, lambda name: None) for check in stages.rotary_checks(SIZES)]
    assert all(record["problem"] for record in found if record["kernel"] == "rotary")
    assert not any(record["problem"] for record in found if record["kernel"] != "rotary")


def test_a_check_that_lost_its_process_has_failed():
    check = Check("rotary", "x", lambda gpu: None)
    record = checks.run_check(Cpu(), check, {check.name: "lost the device: CUDA error"}, lambda name: None)
    assert record["problem"] == "lost the device: CUDA error"


def test_checks_cover_every_head_with_every_dtype_and_feature():
    features = ("a", "b", "c", "d")
    covered = checks.spread_over(features, FULL.heads)
    assert {(feature, head) for feature, head, _ in covered} == {(f, h) for f in features for h in FULL.heads}
    assert {(feature, dtype) for feature, _, dtype in covered} == {(f, d) for f in features for d in checks.DTYPES}
    names = [check.name for check in stages.all_checks(FULL, Cpu)]
    assert len(set(names)) == len(names)
    for kernel in ("attention: causal", "decode: one token", "rotary: rows of a table"):
        for dims, pairs in ((64, 32), (80, 16), (128, 64), (256, 128)):
            for dtype in ("bf16", "fp16", "fp32"):
                assert f"{kernel}, D {dims}, R {pairs}, {dtype}" in names


def test_names_are_found_without_the_device_and_are_unique():
    assert stages.names_of("floors", "") == ["floors"]
    for stage in ("checks", "cases", "tune"):
        names = stages.names_of(stage, "sm_90")
        assert len(set(names)) == len(names) > 30
    assert {name.split(",")[0] for name in stages.names_of("tune", "sm_90")} == set(SUBJECTS)
    with_device = stages.tasks_of("cases", Cpu(), SIZES, TUNED, 0.0)
    assert list(with_device) == [case.full_name for case in stages.all_cases(SIZES)]


CASE = {
    "seconds": {"ours": 2.0, "bare": 1.6, "fast": 4.0, "slow": 9.0},
    "errors": {"ours": {"a": 1e-3, "b": 2e-3}},
    "ours": "ours",
    "own": ["ours", "bare"],
    "rivals": ["slow", "fast", "absent"],
    "without": "bare",
    "bytes": 10,
    "operations": 400,
    "aims": [
        {"over": OVER_FLOOR, "bound": 0.6, "what": "floor"},
        {"over": OVER_RIVAL, "bound": 0.4, "what": "rival"},
        {"over": "bare", "bound": 1.25, "what": "bare"},
        {"over": ERROR, "bound": 1e-3, "what": "error"},
        {"over": "absent", "bound": 1.0, "what": "absent"},
    ],
}


def test_ratios_and_goals_follow_from_times_and_floors():
    case = report.finish(CASE, Floors(bandwidth=5.0, rate=100.0))
    assert (case["floor_seconds"], case["floor_bound"]) == (4.0, "products")
    assert (case["rival"], case["over_rival"], case["over_floor"], case["over_without"]) == ("fast", 0.5, 0.5, 1.25)
    assert [(goal["what"], goal["met"]) for goal in case["goals"]] == [
        ("floor", True),
        ("rival (fast)", False),
        ("bare", True),
        ("error", False),
        ("absent", False),
    ]
    assert summary.number(case["goals"][4]["found"], "x") == "not found"


def test_a_case_without_our_time_has_no_goals_and_no_ratios():
    case = report.finish({**CASE, "seconds": {"fast": 4.0}}, Floors(5.0, 100.0))
    assert (case["goals"], case["over_rival"], case["over_floor"], case["over_without"]) == ([], None, None, None)


def test_a_case_without_the_memory_for_it_is_not_run():
    def too_large(gpu: Cpu) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    case = stages.Case("decode", "decode step", "x", too_large)
    record = run_case(Cpu(), case, 0.0, time.time(), (1, 1), {}, lambda name: None)
    assert record == {"not_run": "not run: OutOfMemoryError: tried to allocate 80 GiB"}


def test_calls_of_other_packages_are_what_these_packages_take(
    eager: None, fewer_rounds: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rivals, "import_module", gpu_measured_packages.import_module)
    monkeypatch.setattr(Rival, "missing", None)
    gpu_measured_packages.called.clear()
    for stem in ("attention_cases", "decode_cases", "rotary_cases", "projection_cases"):
        for case in getattr(stages, stem)(SIZES):
            record = run_case(Cpu(), case, 0.0, time.time() + 3600, (1, 1), {}, lambda name: None)
            packages = ("FlashInfer", "Liger", "flash-attn ", "+ flash-attn")
            failed = {
                name: reason
                for name, reason in record["reasons"].items()
                if any(package in name for package in packages) and "flash-attn 3" not in name
            }
            assert failed == {}, case.full_name
    assert set(gpu_measured_packages.called) == {
        "flash-attn rotary",
        "flash_attn_func",
        "flash_attn_with_kvcache",
        "Liger rotary",
        "FlashInfer rotary",
        "FlashInfer prefill",
        "FlashInfer decode, NONE",
        "FlashInfer decode, ROPE_LLAMA",
        "FlashInfer paged decode",
    }


def test_without_a_device_it_says_what_was_found_and_ends_with_1(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_measured.main(["--out", str(tmp_path / "x")], run_here) == 1
    assert f"found torch {torch.__version__}, which is no CUDA build" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu_measured.main([], run_here) == 1
    assert "built for CUDA 13.0, but it sees no device" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_without_the_packages_it_needs_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_measured, "missing_cuda", lambda: None)
    monkeypatch.setattr(gpu_measured.importlib.util, "find_spec", lambda name: None)
    assert gpu_measured.main([], run_here) == 1
    assert "found no triton and no torchdiffeq" in capsys.readouterr().err


def test_the_command_measures_and_writes_where_it_is_told(document, tmp_path: Path, monkeypatch):
    stored = {"floors": [{"name": "floors", **document["device"]}], "checks": document["checks"], "cases": []}
    asked = []

    def run(stage: str, until: float, tables: str) -> list[dict[str, Any]]:
        asked.append((stage, until - began))
        return stored[stage]

    monkeypatch.setattr(gpu_measured, "missing_cuda", lambda: None)
    began = time.time()
    assert gpu_measured.main(["--out", str(tmp_path), "--seconds", "100"], run) == 0
    assert [stage for stage, _ in asked] == ["floors", "checks", "cases"]
    assert [seconds for _, seconds in asked] == pytest.approx([100, 45, 100], abs=1)
    assert (tmp_path / "index.md").exists()
    assert (tmp_path / "measured.json").exists()
