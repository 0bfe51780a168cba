"""The static report: occupancy, model and overhead on counts made by hand, the kept figures, and the page."""

from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
pytest.importorskip("liger_kernel")

import triton

from benchmarks import gpu_static
from benchmarks.compiled import document, tables
from benchmarks.compiled.cases import CASES
from benchmarks.compiled.compiling import TARGETS, find_nvdisasm
from benchmarks.compiled.counts import TRITON, Counts, Loop
from benchmarks.compiled.document import Static, compare, count_bytes, count_target, read, regressions, write
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.model import model, occupancy
from benchmarks.compiled.overhead import overhead_of
from benchmarks.compiled.peers import PEERS
from benchmarks.compiled.work import Work, attention_work, projection_work

ABOVE = "expected the figures kept in benchmarks/gpu_static.json; if the change is meant: make gpu-static REFRESH=1"


def make_counts(**changes: object) -> Counts:
    loop = Loop(100, {"tensor": 32, "mufu": 8, "fp32": 40, "integer": 20}, 4, {}, {"128": 4}, {}, 0.0, 0.0, 8192, 2048)
    return replace(Counts("case", "", "kernel", {}, 4, 32 << 10, 0, 128, 0, 300, 190, [10, 100], [loop]), **changes)


# where many rows read one key head, what the ranges leave for the merging is much beside few bytes of keys.
EXCEPTIONS = [
    f"decode-bfloat16-D128-R64-{rows}: bytes per key at 32768 keys over its K and V"
    for rows in ("rows32", "page16-rows32")
]


@pytest.mark.parametrize(
    ("target", "changes", "blocks", "limit"),
    [
        # 65,536 registers hold 4 warps of 32 x 128 of them four times.
        ("sm_80", {}, 4, "registers"),
        ("sm_80", {"registers": 129}, 3, "registers"),
        ("sm_80", {"registers": 32, "shared_bytes": 0}, 16, "warps"),
        ("sm_120", {"registers": 32, "shared_bytes": 0}, 12, "warps"),
        ("sm_80", {"registers": 16, "shared_bytes": 0, "warps": 1}, 32, "blocks"),
        # of each block the hardware keeps 1 KB.
        ("sm_80", {"registers": 32, "shared_bytes": 81 << 10}, 2, "shared memory"),
        ("sm_80", {"registers": 32, "shared_bytes": (81 << 10) + 1}, 1, "shared memory"),
        ("sm_100", {"registers": 32, "shared_bytes": 1 << 10, "tensor_columns": 256}, 2, "tensor memory"),
    ],
)
def test_blocks_that_fit_a_multiprocessor(target: str, changes: dict[str, int], blocks: int, limit: str) -> None:
    counts = make_counts(**changes)
    held = occupancy(counts, HARDWARE[target])
    assert (held.blocks, held.limit, held.warps) == (blocks, limit, blocks * counts.warps)


def test_the_model_is_the_busiest_pipe_over_what_the_result_costs() -> None:
    found = model(make_counts(), Work(1 << 16, 1 << 17, 0, 1.0), 2, "sm_80")
    assert found.clocks == {
        "issue": 100,
        "tensor": 128,
        "mufu": 64,
        "fp32": (40 + 4) * 128 / 64,
        "fp64": 0,
        "conversion": 0,
        "integer": 40,
        "shared": 2048 * 4 / 128,
        "L2": 128,
        "memory": 0,
    }
    assert (found.bound, found.floor, found.floor_clocks, found.over_floor) == ("tensor", "tensor", 64, 2.0)


def test_the_model_of_a_memory_bound_kernel_counts_bytes_of_memory() -> None:
    bytes_of_trip = 64 * 512
    found = model(make_counts(), Work(64 * 2 * 4 * 128, 1 << 17, bytes_of_trip, 1.0), 2, "sm_90")
    share = HARDWARE["sm_90"].memory_gb_per_s / (HARDWARE["sm_90"].multiprocessors * HARDWARE["sm_90"].clock_ghz)
    assert (found.bound, found.floor, found.over_floor) == ("memory", "memory", 1.0)
    assert found.trip_clocks == pytest.approx(bytes_of_trip / share)


def test_fp32_has_its_floor_on_its_own_pipe_and_a_target_without_a_loop_is_refused() -> None:
    assert model(make_counts(), Work(1 << 16, 1 << 16, 0, 1.0), 4, "sm_80").floor == "fp32"
    with pytest.raises(ValueError, match="expected a counted loop"):
        model(make_counts(loops=None), Work(1, 1, 0, 1.0), 2, "sm_80")


def test_work_is_counted_by_hand() -> None:
    constants = {
        "BLOCK_L": 128,
        "BLOCK_S": 64,
        "D": 80,
        "BLOCK_D": 128,
        "R": 16,
        "BLOCK_R": 16,
        "TAIL": 48,
        "BLOCK_T": 64,
    }
    tile = 128 * 64
    work = attention_work("attention_bwd_dkv_kernel", constants, 2)
    # logits and dk' run in parts of 32 and 64 columns, dv and dout v^T in 128.
    assert (work.macs, work.padded_macs) == (4 * tile * 80, tile * (2 * 96 + 2 * 128))
    assert attention_work("attention_bwd_dq_kernel", constants, 2).padded_macs == tile * (2 * 96 + 128)
    # 2 operations for each of 2 products over q, out and, shared by 4 heads, k, v.
    assert attention_work("attention_fwd_kernel", constants, 2).intensity == 4 * 4096 * 4096 * 80 / (
        2.5 * 4096 * 80 * 2
    )
    projection = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_C": 256, "H": 32, "G": 8, "D": 128}
    few, many = (projection_work(projection, 2, rows) for rows in (3, 8192))
    assert (few.macs, few.padded_macs, few.memory_bytes) == (3 * 32 * 256, 16 * 32 * 256, 32 * 256 * 2)
    assert (many.macs, many.memory_bytes) == (16 * 32 * 256, 0)


def test_the_kept_figures_are_of_all_configurations_and_of_this_triton() -> None:
    static = read()
    assert static.triton == TRITON
    assert list(static.counts) == list(TARGETS)
    for target, rows in static.counts.items():
        assert list(rows) == [case.name for case in document.reported_cases(target)]
        if target in HARDWARE:
            assert [name for name, counts in rows.items() if counts.loops is None] == []


def test_the_kept_figures_come_back_as_they_were_written(tmp_path) -> None:
    static = read()
    write(static, tmp_path / "figures.json")
    assert read(tmp_path / "figures.json") == static
    assert compare(static, read(tmp_path / "figures.json")) == ([], [])


@pytest.mark.parametrize("target", TARGETS)
def test_no_configuration_got_worse_than_the_kept_figures_nor_differs(target: str) -> None:
    if triton.__version__ != TRITON or find_nvdisasm() is None:
        pytest.skip("counts need the pinned triton and nvdisasm")
    static = read()
    found = replace(static, counts={target: count_target(target)})
    worse, changed = compare(replace(static, counts={target: static.counts[target]}), found)
    assert worse == [], ABOVE
    assert changed == [], ABOVE


def test_bytes_are_the_kept_ones() -> None:
    assert count_bytes() == read().traffic, ABOVE


def test_what_must_be_reached_without_a_gpu_is_reached() -> None:
    missed = [goal.what for goal in tables.all_goals(read()) if not goal.met]
    assert [what for what in missed if "added to the loop" in what or "bytes" in what] == EXCEPTIONS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loop_instructions": [10, 101]}, "101 instructions in a loop, 100 before"),
        ({"loop_instructions": [11, 100]}, "11 instructions in a loop, 10 before"),
        (
            {"loop_instructions": [101], "loops": [replace(make_counts().loops[0], instructions=101)]},
            "101 instructions in a loop, 100 before",
        ),
        ({"spill_bytes": 4}, "4 bytes spilled, 0 before"),
        ({"registers": 129}, "3 blocks a multiprocessor by registers, 4 before"),
        ({"shared_bytes": 60 << 10}, "2 blocks a multiprocessor by shared memory, 4 before"),
    ],
)
def test_a_change_for_the_worse_is_named(changes: dict[str, object], words: str) -> None:
    before, after = make_counts(), make_counts(**changes)
    (found,) = regressions(before, after, "sm_80")
    assert found.startswith(f"sm_80, case: {words}")
    assert regressions(after, before, "sm_80") == []
    static = Static(TRITON, {"sm_80": {"case": before}}, [])
    assert compare(static, replace(static, counts={"sm_80": {"case": after}})) == ([found], ["sm_80, case"])


def test_a_register_more_within_an_occupancy_step_is_a_difference_but_not_worse() -> None:
    before, after = make_counts(registers=121), make_counts(registers=128)
    assert regressions(before, after, "sm_80") == []
    static = Static(TRITON, {"sm_80": {"case": before, "gone": before}}, [])
    worse, changed = compare(static, Static(TRITON, {"sm_80": {"case": after, "new": after}}, []))
    assert (worse, changed) == ([], ["sm_80, case", "sm_80, new", "sm_80, gone: gone"])


def test_overhead_is_over_the_case_without_rotary() -> None:
    name = "attention_fwd-bfloat16-D128-R64"
    static = read()
    rows = dict(static.counts["sm_90"])
    loop = rows[CASES[name].plain].main_loop
    rows[name] = replace(rows[name], loops=[replace(loop, instructions=loop.instructions + 7)])
    found = overhead_of(replace(static, counts={"sm_90": rows}), "sm_90", name)
    assert found.extra == 7
    assert overhead_of(static, "sm_90", CASES[name].plain) is None


def test_the_page_shows_every_configuration_peer_and_call_with_labels(tmp_path) -> None:
    static = read()
    page = tables.full_report(static, ["a note"])
    for target in TARGETS:
        assert f"## {target}" in page
    for name in (*document.REPORTED, *PEERS, *(figure.name for figure in static.traffic)):
        assert name in page
    for gpu in HARDWARE.values():
        assert gpu.product in page
    for word in ("*counted*", "*modelled*", "a note", "Nothing here was measured", "assumed"):
        assert word.lower() in page.lower()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    for first, second in pairwise(lines):
        if set(second) <= set("|- "):
            assert first.count("|") == second.count("|")
    gpu_static.draw(static, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_overhead.png", "gpu_roofline.png"}


def test_the_command_fails_on_worse_figures_and_refreshes_them_on_demand(tmp_path, monkeypatch, capsys) -> None:
    static = read()
    rows = dict(static.counts["sm_80"])
    name = "decode-bfloat16-D128-R64"
    rows[name] = replace(rows[name], spill_bytes=rows[name].spill_bytes + 8)
    worse = replace(static, counts=static.counts | {"sm_80": rows})
    path = tmp_path / "kept.json"
    write(static, path)
    monkeypatch.setattr(gpu_static, "KEPT", path)
    monkeypatch.setattr(gpu_static, "read", lambda: read(path))
    monkeypatch.setattr(gpu_static, "write", lambda static: write(static, path))
    monkeypatch.setattr(gpu_static, "collect", lambda: worse)

    def run(*options: str) -> object:
        monkeypatch.setattr("sys.argv", ["gpu_static", "--out", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as stopped:
            gpu_static.main()
        return stopped.value.code

    assert run() == 1
    assert f"WORSE   sm_80, {name}: 8 bytes spilled" in capsys.readouterr().out
    assert "Worse than the figures kept" in (tmp_path / "out" / "index.md").read_text()
    assert run("--refresh") == 0
    assert run() == 0
