"""The report's arithmetic on synthetic figures, the alternating measurement, and the training example."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("liger_kernel")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from benchmarks import exact, formulations, measure, plots, report, summary
from benchmarks.measure import Goal, Way
from benchmarks.weights import learned_weights, perturbed
from clex_kernels import ClexConfig, RotaryTable, attention
from examples.train_tiny import Trainer, TrainingRun, draw_batch, next_byte_loss


class FakeBenchmark:
    """What `compare` and `record` need of pytest-benchmark's fixture, which turns itself off under xdist."""

    def __init__(self):
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int, iterations: int) -> None:
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()


def make_info(**changes: Any) -> summary.Info:
    info = {
        "section": "rotary",
        "row": "rotary in place",
        "case": "fp32",
        "weights": "synthetic",
        "label": "measured",
        "memory": "in place",
        "threads": 2,
        "seconds": {"ours": 0.002, "plain": 0.0016, "compiled": 0.010, "copy": 0.004},
        "rounds": {"ours": 10, "plain": 10, "compiled": 5, "copy": 10},
        "errors": {"ours": {"q, k": 1e-7}, "compiled": {"q, k": 2e-7}},
        "error_unit": "relative",
        "ours": "ours",
        "rival": "compiled",
        "ratio": 5.0,
        "floor": "copy",
        "overhead": ["ours", "plain"],
        "goals": [
            {"what": "over a copy", "found": 0.5, "sense": "at most", "bound": 0.8, "unit": "x", "label": "measured"},
            {"what": "faster", "found": 5.0, "sense": "at least", "bound": 6, "unit": "x", "label": "measured"},
        ],
        "notes": [],
        "curves": {},
        "positions": None,
    }
    return info | changes


def test_a_missed_goal_shows_as_missed_and_a_met_one_as_met():
    found = summary.verdicts([make_info()])
    assert [v.word for v in found] == ["met", "MISSED"]
    table = summary.goal_table(found).splitlines()
    assert table[2].endswith("| at most 0.8x | 0.500x | measured | met |")
    assert table[3].endswith("| at least 6x | 5.00x | measured | **missed** |")
    assert "1 of 2 goals met" in summary.printed_summary(found, [])


def test_a_stored_verdict_is_not_believed():
    goal = {
        "what": "faster",
        "found": 5.0,
        "sense": "at least",
        "bound": 6,
        "unit": "x",
        "label": "measured",
        "met": True,
    }
    assert not summary.verdicts([make_info(goals=[goal])])[0].met


@pytest.mark.parametrize("sense", ["at most", "at least"])
def test_a_figure_on_the_bound_meets_it_and_no_figure_misses_it(sense):
    assert Goal("x", found=0.8, sense=sense, bound=0.8).met
    assert not Goal("x", found=math.nan, sense=sense, bound=0.8).met
    lost = {"what": "x", "found": math.nan, "sense": sense, "bound": 0.8, "unit": "x", "label": "measured"}
    verdict = summary.verdicts([make_info(goals=[lost])])[0]
    assert (verdict.word, verdict.found) == ("MISSED", "not found")


def test_overhead_is_time_with_clex_over_time_with_fixed_frequencies():
    (overhead,) = summary.overheads([make_info(), make_info(overhead=None)])
    assert overhead.ratio == pytest.approx(1.25)


def test_a_case_shows_every_way_over_ours_and_over_the_floor():
    rows = {row.split(" | ")[0]: row for row in summary.case_section(make_info()).splitlines() if row.startswith("|")}
    assert rows["| **ours**"] == "| **ours** | 2 ms | 1.000x | 0.500x | q, k 1.0e-07 | 10 |"
    assert rows["| compiled (the rival)"] == "| compiled (the rival) | 10 ms | 5.00x | 2.50x | q, k 2.0e-07 | 5 |"
    assert rows["| copy"] == "| copy | 4 ms | 2.00x | 1.000x | - | 10 |"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.0284, "x", "1.028x"),
        (5.678, "x", "5.68x"),
        (42.345, "x", "42.3x"),
        (1234.5, "x", "1,234x"),
        (3.1e-13, "", "3.1e-13"),
        (172, "", "172"),
    ],
)
def test_numbers_keep_the_digits_that_decide(value, unit, text):
    assert summary.number(value, unit) == text


def make_way(name: str, log: list[tuple[str, int]], error: float = 0.0, every: int = 1) -> Way:
    state = {"turn": -1}

    def prepare(turn: int) -> None:
        state["turn"] = turn

    return Way(
        name,
        run=lambda: log.append((name, state["turn"])) or state["turn"],
        prepare=prepare,
        errors=lambda turn, result: {"y": error if result == turn else math.nan},
        every=every,
    )


def test_ways_alternate_with_new_inputs_every_round_and_every_result_is_checked():
    log: list[tuple[str, int]] = []
    ours, rival, slow = make_way("ours", log, 1e-7), make_way("rival", log), make_way("slow", log, every=2)
    result = measure.compare(FakeBenchmark(), ours, [rival, slow], rounds=4)
    assert result.rounds == {"rival": 4, "slow": 2, "ours": 4}
    assert result.errors["ours"] == {"y": 1e-7}
    timed = log[3:]
    for turn in range(1, 5):
        names = [name for name, at in timed if at == turn]
        assert sorted(names) == (["ours", "rival", "slow"] if turn % 2 == 0 else ["ours", "rival"])
        assert names[-1] == "ours"


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_a_wrong_way_is_refused(error):
    with pytest.raises(ArithmeticError, match="rival: expected an error of y"):
        measure.compare(FakeBenchmark(), make_way("ours", []), [make_way("rival", [], error)], rounds=1)


def test_the_rival_is_the_fastest_of_those_named():
    benchmark = FakeBenchmark()
    seconds = {"ours": 1.0, "slow": 3.0, "fast": 2.0, "floor": 0.5}
    measure.record(
        benchmark,
        section="rotary",
        row="row",
        case="case",
        memory="fresh",
        weights="synthetic",
        error_unit="relative",
        comparison=measure.Comparison(seconds, errors={}, rounds=dict.fromkeys(seconds, 3)),
        ours="ours",
        rivals=["slow", "fast"],
        floor="floor",
    )
    assert (benchmark.extra_info["rival"], benchmark.extra_info["ratio"]) == ("fast", 2.0)


def test_the_largest_difference_is_found_in_any_chunk_and_nan_is_not_lost():
    exact = torch.zeros(10, dtype=torch.float64)
    found = torch.zeros(10)
    found[9] = -0.5
    assert measure.max_difference(found, exact, chunk=4) == 0.5
    found[1] = math.nan
    assert math.isnan(measure.max_difference(found, exact, chunk=4))
    with pytest.raises(ValueError, match=r"found: expected shape \[10\], got \[9\]"):
        measure.max_difference(found[:9], exact)


def test_saved_weights_come_back_with_neighbours_that_differ(tmp_path):
    up, down = torch.randn(4, 8), torch.randn(8, 4)
    path = tmp_path / "weights.pt"
    torch.save({"config": {"head_dim": 8, "train_length": 16}, "up": up, "down": down}, path)
    weights = learned_weights(path)
    assert weights.kind == "learned"
    assert weights.config == ClexConfig(head_dim=8, train_length=16)
    assert torch.equal(weights.sets[0][0], up)
    storage = weights.up.data_ptr()
    weights.load(1)
    assert weights.up.data_ptr() == storage
    assert not torch.equal(weights.up, up)
    torch.testing.assert_close(weights.down, perturbed(up, down)[1][1])


def test_a_training_step_lowers_the_loss_and_moves_the_ode():
    torch.manual_seed(0)
    trainer = Trainer(ClexConfig(head_dim=16, train_length=32, max_factor=4), width=32, layers=1)
    text = torch.tensor(list(b"frequencies that change with length. " * 40))
    generator = torch.Generator().manual_seed(0)
    start = trainer.rope.proj_func.ode_down_proj.detach().clone()
    tokens = draw_batch(text, 8, 32, generator)
    plain = trainer.rope(32)
    with torch.no_grad():
        before = next_byte_loss(trainer.model, tokens, plain).item()
    for _ in range(30):
        batch = draw_batch(text, 8, 32, generator)
        trainer.step(batch, trainer.rope.sample(32, generator=generator, positions="runs"))
    with torch.no_grad():
        after = next_byte_loss(trainer.model, tokens, plain).item()
    assert after < 0.8 * before
    assert not torch.equal(trainer.rope.proj_func.ode_down_proj, start)


def make_layer_info(length: int, device: str = "cpu") -> summary.Info:
    ways = ("ours", "plain", "compiled")
    return make_info(
        section="layer",
        positions=length,
        seconds=dict(zip(ways, (0.105, 0.1, 0.15), strict=True)),
        curves={"device": device, "peak_bytes": dict(zip(ways, (12e6, 10e6, 16e6), strict=True))},
        goals=[],
    )


def test_a_layers_costs_are_sorted_by_length_and_kept_apart_by_device():
    cases = [make_info(), make_layer_info(2048), make_layer_info(1024), make_layer_info(1024, "cuda")]
    costs = summary.layer_costs(cases, "cpu")
    assert list(costs) == [1024, 2048]
    assert costs[1024].over("seconds") == pytest.approx((1.05, 0.7))
    assert costs[1024].over("peak_bytes") == pytest.approx((1.2, 0.75))
    # the compiled way ran half as often.
    assert costs[1024].rounds == 5
    assert list(summary.layer_costs(cases, "cuda")) == [1024]
    assert summary.layer_costs([make_info()], "cpu") == {}


def test_a_length_that_was_not_measured_shows_as_such():
    costs = summary.layer_costs([make_layer_info(1024)], "cpu")
    rows = summary.layer_table(costs, [1024, 2048], "seconds").splitlines()[2:]
    assert rows == [
        "| 1,024 | 105 ms | 100 ms | 150 ms | 1.050x | 0.700x | 5 |",
        "| 2,048 | not measured | - | - | - | - | - |",
    ]
    rows = summary.layer_table(costs, [1024], "peak_bytes").splitlines()[2:]
    assert rows == ["| 1,024 | 12 MB | 10 MB | 16 MB | 1.200x | 0.750x | 1 |"]


@pytest.mark.parametrize(("count", "text"), [(1.5e6, "1.5 MB"), (2.5e9, "2.5 GB"), (8211204, "8.21 MB")])
def test_sizes_are_short(count, text):
    assert summary.size(count) == text


def test_a_layer_has_a_section_with_or_without_figures(tmp_path):
    parts = report.layer_parts([make_layer_info(1024), make_layer_info(4096)])
    assert parts[0] == "## What CLEX adds to an attention layer"
    assert sum("| 1.050x | 0.700x |" in part for part in parts) == 1
    assert "![latency and peak memory over plain RoPE](layer_cpu.png)" in parts
    assert report.layer_parts([make_info()])[-1] == "Not measured in this run."
    costs = summary.layer_costs([make_layer_info(1024), make_layer_info(4096)], "cpu")
    plots.plot_layer(costs, (1.03, 0.95), tmp_path / "layer.png")
    assert (tmp_path / "layer.png").stat().st_size > 0


def test_peak_memory_follows_allocations_and_releases():
    def run() -> torch.Tensor:
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 19)
        del first
        third = torch.empty(1 << 16)
        return second[:1] + third[:1]

    result, peak = measure.peak_memory(run, torch.device("cpu"))
    assert result.shape == (1,)
    # the first two together, in fp32; the third fits into what the first gave back.
    assert peak == 3 << 20


def test_the_first_call_of_every_way_is_left_to_the_caller_and_checked():
    log: list[tuple[str, int]] = []
    followed: list[str] = []

    def first(way: Way) -> int:
        followed.append(way.name)
        return way.run()

    ways = make_way("ours", log), make_way("rival", log)
    measure.compare(FakeBenchmark(), ways[0], ways[1:], rounds=2, first=first)
    assert sorted(followed) == ["ours", "rival"]
    with pytest.raises(ArithmeticError, match="rival"):
        measure.compare(
            FakeBenchmark(), ways[0], ways[1:], rounds=1, first=lambda way: -1 if way is ways[1] else way.run()
        )


def test_exact_attention_at_some_rows_gives_every_gradient():
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 9, 4, 8), (1, 9, 2, 8), (1, 9, 2, 8)
    freq, positions = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64), torch.arange(9) * 1.5
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, freq)]
    rows, everything = torch.tensor([0, 5, 8]), torch.arange(9)
    whole, some = (exact.attention(*leaves, positions, picked) for picked in (everything, rows))
    torch.testing.assert_close(some, whole[:, rows])
    dout = torch.zeros_like(whole)
    dout[:, rows] = torch.randn(some.shape, generator=generator, dtype=torch.float64)
    for found, true in zip(
        torch.autograd.grad(some, leaves, dout[:, rows]), torch.autograd.grad(whole, leaves, dout), strict=True
    ):
        torch.testing.assert_close(found, true)
    q, k, v, freq = (leaf.detach() for leaf in leaves)
    table = RotaryTable.from_frequencies(freq, positions=positions.double(), dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, v, table, is_causal=True), whole.detach())


@pytest.mark.parametrize("name", ["softmax_attention", "sdpa_shared", "sdpa_repeated"])
def test_attention_formulations_are_the_exact_one(name):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((2, 9, heads, 8), generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    freq, positions = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64), torch.arange(9.0)
    true = exact.attention(q, k, v, freq, positions, torch.arange(9))
    found = formulations.attend_with_frequencies(getattr(formulations, name), False)(q, k, v, freq, positions)
    torch.testing.assert_close(found, true)


def test_the_report_counts_missed_goals_and_names_them():
    run = TrainingRun([5.0, 4.0], [1.0, 3.0], {128: 3.5}, 1.0, torch.zeros(4, 8), torch.zeros(8, 4))
    text = report.index({"threads": "2"}, run, [make_info()], elapsed=200.0, complete=False)
    assert "1 of 2 goals met" in text
    # of GPUs there are figures without a run, and goals of their own.
    assert text.partition("## Goals")[2].count("**missed**") == 1
    assert "## On a GPU: counted and modelled" in text
    assert "Some benchmarks failed" in text
    assert "| rotary in place: fp32 | 1.250x | measured |" in text
