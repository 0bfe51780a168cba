from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.compiled import choose, counts  # noqa: E402
from benchmarks.compiled.candidates import CANDIDATES, TABLES, candidates, exchanged, near, render_table  # noqa: E402
from benchmarks.compiled.cases import Case  # noqa: E402
from benchmarks.compiled.choose import (  # noqa: E402
    LATENCY,
    MODELLED,
    Trial,
    attempt,
    case_of,
    judge,
    program_count,
    select,
)
from benchmarks.compiled.compiling import compiling  # noqa: E402
from benchmarks.compiled.counts import Counts, Loop  # noqa: E402
from benchmarks.compiled.work import Work  # noqa: E402
from clex_kernels.kernels import launch_tables  # noqa: E402
from clex_kernels.kernels.attention_launch import launch_config  # noqa: E402
from clex_kernels.kernels.launch_tables import ANY, ARCHITECTURES, ProjectionTile, StreamTile, Tile  # noqa: E402

TODAY, OTHER = Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)
CASE = Case("a", "attention_fwd_kernel", lambda: None, lambda c: 1, 2, is_product=True, work=lambda c: Work(*WORK))
WORK = (2 * 64 * 64 * 128, 2 * 64 * 64 * 128, 0, 1.0)


def fake_counts(instructions: int = 200, warps: int = 8, **changes: Any) -> Counts:
    classes = {"tensor": 40, "fp32": instructions - 40}
    loop = Loop(instructions, classes, 0, {}, {"128": 4}, {}, 0.0, 0.0, 1, 1)
    counted = Counts("a", "", "a", {"BLOCK_L": 64}, warps, 1 << 15, 0, 64, 0, 900, 0, [instructions], [loop])
    return replace(counted, **changes)


def test_candidates_start_with_todays_and_are_few_and_different() -> None:
    for name, table in TABLES.items():
        for architecture, kinds in table.items():
            for kind, rows in kinds.items():
                for size, entry in rows.items():
                    found = candidates(name, architecture, kind, size)
                    assert found[0] == entry
                    assert len(set(found)) == len(found) <= 10
                    assert {type(other) for other in found} == {type(entry)}
        assert set(CANDIDATES[name]) == set(table["sm_80"])
        assert all(5 <= len(entries) <= 10 for entries in CANDIDATES[name].values())


def test_candidates_are_of_a_like_size() -> None:
    assert near(OTHER, TODAY)
    assert not near(Tile(128, 256, 8, 2), TODAY)
    few, many = ProjectionTile(16, 32, 256, 1, 4, 4), ProjectionTile(128, 256, 64, 8, 8, 3)
    assert not near(many, few)
    assert near(many, many._replace(block_n=64))
    assert not near(StreamTile(16, 4096, 4), StreamTile(1, 4096, 4))
    assert near(StreamTile(16, 4096, 4), StreamTile(4, 4096, 4))
    assert all(entry.num_stages <= 2 for entry in candidates("decode", "gfx942", "half", 128))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_entry_is_exchanged_for_the_launch_and_restored(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tables, "architecture_of", lambda _: architecture)
    table, q = TABLES["attention_bwd_dq"], torch.empty(2, 64, 4, 128, dtype=torch.bfloat16, device="meta")
    before = launch_config(table, q, 64)
    with pytest.raises(RuntimeError, match="stop"), exchanged(table, architecture, "half", 128, Tile(16, 128, 2, 5)):  # noqa: PT012
        tried = launch_config(table, q, 64)
        raise RuntimeError("stop")
    assert (tried["BLOCK_L"], tried["BLOCK_S"], tried["num_warps"], tried["num_stages"]) == (16, 128, 2, 5)
    assert launch_config(table, q, 64) == before != tried


@pytest.mark.parametrize("name", TABLES)
def test_a_rendered_table_is_the_source_and_evaluates_to_the_table(name: str) -> None:
    text = render_table(name, TABLES[name])
    assert f"\n{text}\n" in Path(launch_tables.__file__).read_text()
    scope = dict(vars(launch_tables))
    exec(text, scope)
    assert scope[name.upper()] == TABLES[name]
    assert scope[name.upper()] is not TABLES[name]


def test_a_rendered_table_has_the_exchanged_entry_and_keeps_to_the_columns() -> None:
    with exchanged(TABLES["attention_fwd"], "sm_80", "half", 64, Tile(1024, 1024, 16, 3)):
        text = render_table("attention_fwd", TABLES["attention_fwd"])
    assert text.count("64: Tile(1024, 1024, 16, 3)") == 1
    assert max(map(len, text.splitlines())) <= 120
    assert str(ANY) not in render_table("rotary", TABLES["rotary"])


def test_every_modelled_size_of_halves_has_a_case() -> None:
    for name in MODELLED:
        for size in TABLES[name]["sm_90"]["half"]:
            case = case_of(name, "half", size)
            assert case is not None, (name, size)
            assert case.kernel == f"{name}_kernel"
            assert case.is_product


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared_bytes": 1 << 20}, "bytes of shared memory"),
        ({"tensor_columns": 513}, "513 columns of tensor memory"),
        ({"loops": [replace(fake_counts().loops[0], classes={"tensor": 40, "spill": 2})]}, "2 spills in a loop"),
    ],
)
def test_an_infeasible_candidate_is_dropped(changes: dict, reason: str) -> None:
    trial = judge(TODAY, CASE, fake_counts(**changes), "sm_100")
    assert len(trial.dropped) == 1
    assert reason in trial.dropped[0]
    assert reason in str(trial)
    assert select([judge(OTHER, CASE, fake_counts(), "sm_100"), trial]).entry == OTHER


def test_a_candidate_that_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Counts:
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(counts, "count", fail)
    trial = attempt("attention_fwd", "sm_90", "half", 128, OTHER, CASE)
    assert trial.dropped == ("does not compile: PassManager::run failed",)


def test_candidates_are_counted_in_the_tables_place(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = TABLES["attention_fwd"]["sm_90"]["half"]
    before, seen = dict(entries), []

    def count(*_: object) -> Counts:
        seen.append(entries[128])
        return fake_counts()

    monkeypatch.setattr(counts, "count", count)
    assert attempt("attention_fwd", "sm_90", "half", 128, OTHER, CASE).entry == OTHER
    assert seen == [OTHER]
    assert entries == before


def test_the_model_ranks_and_a_move_needs_five_percent_and_warps() -> None:
    today = judge(TODAY, CASE, fake_counts(400), "sm_90")
    faster, hardly = (judge(OTHER, CASE, fake_counts(n), "sm_90") for n in (300, 390))
    # instructions of 8 warps, of which a multiprocessor starts 4 a clock.
    assert (today.bound, today.clocks) == ("issue", pytest.approx(1000 * 400 * 8 / 4 / WORK[0]))
    assert (today.warps, faster.clocks) == (32, pytest.approx(0.75 * today.clocks))
    assert select([today, hardly, faster]) is faster
    assert select([today, hardly]) is today
    assert select([today, replace(faster, warps=4)]) is today
    few, many = (replace(faster, counts=fake_counts(300, spill_bytes=4 * n)) for n in (30, 31))
    assert [select([today, few]), select([today, many])] == [few, today]
    assert select([replace(today, counts=fake_counts(400, spill_bytes=200)), many]) is many
    # any serves where today's doesn't.
    out = Trial(TODAY, dropped=("spills",))
    assert select([out, replace(hardly, warps=4)]).entry == OTHER
    assert select([out]) is out


def test_few_programs_leave_multiprocessors_idle_and_memory_waiting() -> None:
    many, uneven = (judge(TODAY, CASE, fake_counts(), "sm_90", programs) for programs in (132_000, 198))
    assert uneven.clocks == pytest.approx(many.clocks * 2 / 1.5, rel=1e-3)
    read = replace(CASE, work=lambda c: Work(1000, 1000, 64, 1.0))
    few = judge(TODAY._replace(num_stages=3), read, fake_counts(2), "sm_90", 66)
    assert (few.bound, few.clocks) == ("latency", pytest.approx(LATENCY / (2 * 0.5)))
    sizes = {"H": 32, "G": 8, "D": 128, "BLOCK_M": 64, "BLOCK_N": 128}
    assert program_count("qkv_rotary", 512, fake_counts(constants=sizes)) == 8 * 24
    assert program_count("qkv_rotary", ANY, fake_counts(constants=sizes)) == 128 * 24
    assert program_count("qkv_rotary", 64, fake_counts(constants=sizes | {"H": 1, "G": 1})) == 2


def test_a_choice_that_spills_in_another_case_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TABLES["attention_fwd"]
    monkeypatch.setitem(table["sm_90"], "half", {128: TODAY})
    best, second = Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)
    monkeypatch.setitem(choose.CANDIDATES["attention_fwd"], "half", [best, second])

    def attempt(name: str, architecture: str, kind: str, size: int, entry: Tile, case: Case) -> Trial:
        assert case.itemsize == 2
        if entry == best and "softcap" in case.name:
            return Trial(entry, dropped=("spills",))
        return Trial(entry, fake_counts(), clocks={best: 1.0, second: 2.0}.get(entry, 3.0), warps=8)

    monkeypatch.setattr(choose, "attempt", attempt)
    choose.choose("attention_fwd", "sm_90", "half")
    assert table["sm_90"]["half"] == {128: second}


@pytest.mark.parametrize(("size", "widest"), [(128, False), (512, True)])
def test_an_entry_for_wide_heads_is_checked_with_the_widest(
    size: int, widest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(choose, "attempt", lambda *given: seen.append(given[-1]) or Trial(OTHER))
    assert choose.faults("decode", "sm_80", "half", size, OTHER) == ()
    assert [case.name == "decode_kernel of D256-R48" for case in seen] == [False] * (len(seen) - 1) + [widest]
    with compiling("sm_80", "no kernel"):
        seen[-1].launch()


def test_the_command_prints_what_it_found_and_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLES["attention_bwd_dq"]
    monkeypatch.setitem(table["sm_90"], "half", dict(table["sm_90"]["half"]))
    best = Tile(64, 32, 8, 2)
    monkeypatch.setattr(choose, "faults", lambda *_: ())
    monkeypatch.setattr(
        *(choose, "attempt"),
        lambda name, architecture, kind, size, entry, case: Trial(
            entry, fake_counts(), clocks=1.0 if entry == best else 2.0, bound="issue", warps=16
        ),
    )
    monkeypatch.setattr(
        "sys.argv", ["choose", "--architecture", "sm_90", "--kernel", "attention_bwd_dq", "--kind", "half"]
    )
    choose.main()
    printed = capsys.readouterr().out
    assert f"-> {best}, modelled 50% faster" in printed
    assert "512: Tile(64, 32, 8, 2)" in printed
    assert render_table("attention_bwd_dq", table) in printed
