"""How a GPU is timed, on a CPU that stands in for it: the order of calls, rivals that fail, lack of time, processes."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("torchdiffeq")

from gpu_measured_mock import Cpu

from benchmarks.measure import Way
from benchmarks.on_gpu import floors, timing, work
from benchmarks.on_gpu.checks import Check, run_check
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost, Floors
from benchmarks.on_gpu.sizes import FULL
from benchmarks.on_gpu.timing import OUT_OF_TIME, Plan, Poisoned, Rival, ready, time_ways
from benchmarks.on_gpu.work import Order

HOUR = 3600.0


class Clock(Cpu):
    """A device on which every call takes as long as was said beforehand, in turn."""

    def __init__(self, *durations: float):
        super().__init__()
        self.durations = list(durations)

    def seconds(self, start: float, end: float) -> float:
        return self.durations.pop(0)


def make_way(
    name: str,
    gpu: Cpu,
    error: float = 0.0,
    every: int = 1,
    raises: Callable[[int], Exception | None] = lambda turn: None,
) -> Way:
    """Logs what is done with it among what is asked of the device."""
    now = {"turn": -1}

    def prepare(turn: int) -> None:
        now["turn"] = turn
        gpu.log.append(f"prepare {name} {turn}")

    def run() -> int:
        gpu.log.append(f"run {name}")
        if problem := raises(now["turn"]):
            raise problem
        return now["turn"]

    def errors(turn: int, result: int) -> dict[str, float]:
        gpu.log.append(f"check {name}")
        return {"y": error if result == turn else math.nan}

    return Way(name, run, prepare, errors, every)


def plan(rounds: int = 4, until: float = HOUR, seconds: float = 0.0) -> Plan:
    return Plan(seconds, time.time() + until, (rounds, rounds))


def test_every_call_is_prepared_then_flushed_then_timed_then_checked():
    gpu = Cpu()
    time_ways(gpu, [ready(make_way("ours", gpu)), ready(make_way("rival", gpu))], plan())
    calls = " ".join(gpu.log).split("prepare ")[1:]
    warm, rounds = len(timing.WARM_TURNS), 4
    assert len(calls) == 2 * (warm + rounds)
    for call in calls:
        name, _, *rest = call.split()
        assert rest == f"flush hold mark run {name} mark check {name}".split()
    order = [call.split()[:2] for call in calls[2 * warm :]]
    for number in range(rounds):
        pair = order[2 * number : 2 * number + 2]
        assert sorted(name for name, _ in pair) == ["ours", "rival"]
        assert {turn for _, turn in pair} == {str(warm + number)}
    # neither always goes first.
    assert {order[2 * number][0] for number in range(rounds)} == {"ours", "rival"}


def test_the_device_is_held_for_twice_what_the_host_took_last(monkeypatch: pytest.MonkeyPatch):
    gpu, held = Cpu(), []
    monkeypatch.setattr(gpu, "hold", held.append)
    way = Way("ours", lambda: time.sleep(0.004), lambda turn: None, lambda turn, result: {})
    times = time_ways(gpu, [ready(way)], plan(rounds=2))
    first, *others = held
    assert first == 0.0
    assert all(0.008 <= seconds <= timing.LONGEST_HOLD for seconds in others)
    assert held[-1] == min(2 * times.host["ours"][0], timing.LONGEST_HOLD)


def test_medians_and_spreads_are_of_the_timed_calls_only():
    gpu = Clock(9.0, 9.0, 9.0, 4.0, 1.0, 2.0, 3.0, 5.0)
    times = time_ways(gpu, [ready(make_way("ours", gpu))], plan(rounds=5))
    assert times.seconds == {"ours": [4.0, 1.0, 2.0, 3.0, 5.0]}
    assert timing.medians(times.seconds) == {"ours": 3.0}
    # quartiles of 1..5 as statistics.quantiles has them: 1.5 and 4.5.
    assert times.spreads() == {"ours": pytest.approx(1.0)}


def test_a_slow_way_sits_rounds_out():
    gpu = Cpu()
    times = time_ways(gpu, [ready(make_way("ours", gpu)), ready(make_way("slow", gpu, every=3))], plan(rounds=6))
    assert {name: len(values) for name, values in times.seconds.items()} == {"ours": 6, "slow": 2}


def test_rounds_are_as_many_as_fit_the_seconds_between_the_fewest_and_the_most():
    counts = []
    for seconds in (0.0, 0.25, HOUR):
        gpu = Cpu()
        way = make_way("ours", gpu)
        slow = Way("ours", lambda run=way.run: time.sleep(0.02) or run(), way.prepare, way.errors)
        times = time_ways(gpu, [ready(slow)], Plan(seconds, time.time() + HOUR, (3, 30)))
        counts.append(len(times.seconds["ours"]))
    assert counts[0] == 3
    assert 5 <= counts[1] <= 13
    assert counts[2] == 30


def test_a_rival_that_is_missing_raises_or_is_wrong_has_a_reason_and_no_time():
    gpu = Cpu()

    def broken() -> Way:
        raise ImportError("no kernel for this architecture\nand more")

    later = {3: ValueError("head dim 80")}
    rivals = [
        ready(make_way("ours", gpu, error=1e-3)),
        Rival("missing", broken, needs=("a_package_that_nobody_has",)),
        Rival("broken", broken),
        ready(make_way("raises", gpu, raises=lambda turn: RuntimeError("unsupported"))),
        ready(make_way("raises later", gpu, raises=later.get)),
        ready(make_way("wrong", gpu, error=0.06)),
        ready(make_way("NaN", gpu, error=math.nan)),
    ]
    times = time_ways(gpu, rivals, plan())
    assert list(times.seconds) == ["ours"] == list(times.host) == list(times.errors)
    assert times.errors == {"ours": {"y": 1e-3}}
    assert times.reasons == {
        "missing": "not installed: a_package_that_nobody_has",
        "broken": "raised ImportError: no kernel for this architecture",
        "raises": "raised RuntimeError: unsupported",
        "raises later": "raised ValueError: head dim 80",
        "wrong": "wrong: error of y: 6.0e-02, expected at most 0.05",
        "NaN": "wrong: error of y: nan, expected at most 0.05",
    }


def test_a_quantity_may_have_a_bound_of_its_own():
    gpu = Cpu()
    way = Way("ours", lambda: 0, lambda turn: None, lambda turn, result: {"dx": 0.04, "dfreq": 0.06})
    assert "dfreq" in time_ways(gpu, [ready(way)], plan()).reasons["ours"]
    for bounds, is_right in (({"dfreq": 0.2}, True), ({"dfreq": 0.2, "dx": 0.03}, False)):
        times = time_ways(gpu, [ready(way)], Plan(0.0, time.time() + HOUR, (1, 1), wrong=bounds))
        assert ("ours" in times.seconds) == is_right


def test_ways_that_time_did_not_reach_say_so():
    gpu = Cpu()
    times = time_ways(gpu, [ready(make_way("ours", gpu))], plan(until=-1.0))
    assert (times.seconds, times.reasons) == ({}, {"ours": OUT_OF_TIME})
    assert gpu.log == []


def test_a_case_that_began_in_time_gets_its_fewest_rounds():
    gpu = Cpu()
    way = make_way("ours", gpu)
    slow = Way("ours", lambda: time.sleep(0.05) or way.run(), way.prepare, way.errors)
    times = time_ways(gpu, [ready(slow)], plan(rounds=50, until=0.01))
    assert len(times.seconds["ours"]) == timing.FEWEST


def test_a_way_that_was_left_out_keeps_its_reason_and_is_not_tried():
    gpu, tried = Cpu(), []
    rivals = [ready(make_way(name, gpu)) for name in ("ours", "rival")]
    times = time_ways(gpu, rivals, plan(), {"rival": "lost the device: it crashed"}, tried.append)
    assert (list(times.seconds), times.reasons) == (["ours"], {"rival": "lost the device: it crashed"})
    assert tried == ["ours"] * 5


@pytest.mark.parametrize("text", ["CUDA error: an illegal memory access", "Triton Error [CUDA]: device-side assert"])
def test_an_error_that_loses_the_device_is_no_reason_but_the_end(text: str):
    gpu = Cpu()
    with pytest.raises(Poisoned, match=r"illegal memory|device-side"):
        time_ways(gpu, [ready(make_way("ours", gpu, raises=lambda turn: RuntimeError(text)))], plan())


def test_who_loses_the_device_in_a_timed_round_gets_the_blame():
    gpu, tried = Cpu(), []
    later = {4: RuntimeError("CUDA error: misaligned address")}
    ways = [ready(make_way("ours", gpu, raises=later.get)), ready(make_way("rival", gpu))]
    with pytest.raises(Poisoned):
        time_ways(gpu, ways, plan(), trying=tried.append)
    assert tried == ["ours", "rival", "ours", "rival", "rival", "ours"]


def test_an_error_that_does_not_say_so_loses_the_device_too(monkeypatch: pytest.MonkeyPatch):
    gpu = Cpu()

    def wait() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "wait", wait)
    raises = make_way("rival", gpu, raises=lambda turn: ValueError("failed"))
    with pytest.raises(Poisoned, match="an illegal memory access"):
        time_ways(gpu, [ready(raises)], plan())
    with pytest.raises(Poisoned, match="an illegal memory access"):
        run_check(gpu, Check("rotary", "x", lambda gpu: raises.run()), {}, lambda name: None)


def test_floors_are_of_the_best_median_and_the_longer_of_two_times(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(floors, "ROUNDS", 3)
    # a warm call and three of each of two copies and two products.
    gpu = Clock(9, 1, 2, 3, 9, 1, 1, 1, 9, 4, 4, 4, 9, 8, 8, 2)
    sizes = FULL.__class__(**{**vars(FULL), "copies": (400, 800), "products": (4, 8)})
    found = floors.measure_floors(gpu, sizes)
    assert found == Floors(bandwidth=2 * 800 / 1, rate=max(2 * 4**3 / 4, 2 * 8**3 / 8))
    assert found.seconds(Cost(bytes=3200, operations=128)) == 2.0
    assert found.bound(Cost(3200, 128)) == "memory"
    assert found.seconds(Cost(bytes=16, operations=1280)) == 10.0
    assert found.bound(Cost(16, 1280)) == "products"


# what a process does: one entry a task, on the first of its lives, on the second, ...
SCRIPT = """
import json, os, signal, sys, time
orders, lines, behaviours = json.load(open(sys.argv[1])), open(sys.argv[2], "a"), json.loads(sys.argv[3])
def write(line):
    lines.write(json.dumps(line) + chr(10))
    lines.flush()
if behaviours == "broken":
    sys.exit(7)
for order in orders:
    write({"begins": order["name"]})
    for way in behaviours[order["name"]]:
        if way in order["without"]:
            continue
        write({"trying": way})
        if way == "dies":
            lines.write('{"name": "half of it", "without": {}')
            lines.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "loses":
            write({"lost": "CUDA error: an illegal memory access"})
            sys.exit(3)
        if way == "hangs":
            time.sleep(60)
    write({"name": order["name"], "without": order["without"]})
"""


def scripted(behaviours: dict[str, list[str]] | str) -> work.Command:
    def command(orders: Path, lines: Path) -> Sequence[str]:
        return [sys.executable, "-c", SCRIPT, str(orders), str(lines), json.dumps(behaviours)]

    return command


def test_a_way_that_ends_its_process_is_left_out_and_the_rest_goes_on():
    behaviours = {"a": ["fine"], "b": ["fine", "dies", "loses", "fine too"], "c": ["fine"]}
    results = work.in_processes(list(behaviours), scripted(behaviours), time.time() + HOUR)
    assert [result["name"] for result in results] == ["a", "b", "c"]
    assert results[0]["without"] == results[2]["without"] == {}
    assert results[1]["without"] == {
        "dies": "its process ended with status -9",
        "loses": "lost the device: CUDA error: an illegal memory access",
    }


def test_several_processes_share_the_tasks_and_their_results_are_in_order():
    behaviours = {name: ["dies"] if name == "d" else ["fine"] for name in "abcdefg"}
    results = work.in_processes(list(behaviours), scripted(behaviours), time.time() + HOUR, count=3)
    assert [result["name"] for result in results] == list("abcdefg")
    assert "dies" in results[3]["without"]


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "GRACE_SECONDS", 0.2)
    behaviours = {"a": ["fine"], "b": ["hangs"], "c": ["fine"]}
    began = time.time()
    results = work.supervise([Order(name) for name in behaviours], scripted(behaviours), began + 0.5)
    assert time.time() - began < 10
    assert [result["name"] for result in results] == ["a", "b", "c"]
    assert "failed" not in results[0]
    assert results[1]["failed"] == f"hangs: {work.HANGS}"
    assert results[2]["not_run"] == OUT_OF_TIME


def test_a_process_that_cannot_start_fails_all_its_tasks_at_once():
    results = work.in_processes(["a", "b"], scripted("broken"), time.time() + HOUR)
    assert [result["failed"] for result in results] == ["its process ended with status 7"] * 2


def test_a_task_that_raises_has_failed_and_the_next_goes_on(tmp_path: Path):
    def raises(without: dict[str, str], trying: Callable[[str], None]) -> work.Result:
        raise ValueError("no such shape")

    tasks = {"a": raises, "b": lambda without, trying: {"without": without}}
    orders, lines = tmp_path / "orders", tmp_path / "lines"
    orders.write_text(json.dumps([{"name": "a", "without": {}}, {"name": "b", "without": {"x": "y"}}]))
    work.serve(tasks, orders, lines, time.time() + HOUR)
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [result for result in results if "name" in result] == [
        {"name": "a", "failed": "ValueError: no such shape"},
        {"name": "b", "without": {"x": "y"}},
    ]


def test_a_lost_device_ends_the_process_with_the_reason_written(tmp_path: Path):
    def loses(without: dict[str, str], trying: Callable[[str], None]) -> work.Result:
        trying("ours")
        raise RuntimeError("CUDA error: misaligned address")

    orders, lines = tmp_path / "orders", tmp_path / "lines"
    orders.write_text(json.dumps([{"name": "a", "without": {}}, {"name": "b", "without": {}}]))
    with pytest.raises(SystemExit) as ended:
        work.serve({"a": loses, "b": loses}, orders, lines, time.time() + HOUR)
    assert ended.value.code == work.LOST_STATUS
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert written == [{"begins": "a"}, {"trying": "ours"}, {"lost": "CUDA error: misaligned address"}]


class FakeEvent:
    """Marks the microseconds that the fake device has been busy for."""

    busy = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at: float | None = FakeEvent.busy
        self.is_passed = False

    def synchronize(self) -> None:
        self.is_passed = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.is_passed
        return (end.at - self.at) / 1e3


def test_the_device_flushes_twice_its_cache_and_reads_its_own_clock(monkeypatch: pytest.MonkeyPatch):
    properties = SimpleNamespace(L2_cache_size=1000, major=9, minor=0, total_memory=1 << 30)
    slept: list[int] = []

    def sleep(ticks: int) -> None:
        slept.append(ticks)
        FakeEvent.busy += ticks / 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(Gpu, "device", "cpu")
    gpu = Gpu()
    assert gpu.architecture == "sm_90"
    # a thousand ticks a microsecond, found by sleeping.
    gpu.hold(2e-3)
    assert slept[-1] == 2_000_000
    gpu._flushed.fill_(1)
    gpu.flush()
    assert gpu._flushed.shape == (2000,)
    assert not gpu._flushed.any()

    def run() -> str:
        FakeEvent.busy += 250.0
        return "done"

    result, seconds, _ = timing.time_once(gpu, run, hold=1e-3)
    # the pause before it is none of its time.
    assert (result, seconds) == ("done", pytest.approx(250e-6))
    timing.time_once(gpu, run, hold=10.0)
    assert slept[-1] == timing.LONGEST_HOLD * 1e9


def test_memory_is_followed_where_the_plan_says_so():
    gpu = Cpu()
    way = Way("ours", lambda: torch.zeros(1000), lambda turn: None, lambda turn, result: {})
    followed = time_ways(gpu, [ready(way)], Plan(0.0, time.time() + HOUR, (1, 1), follows=True))
    assert followed.peaks["ours"] >= 4000
    assert time_ways(gpu, [ready(way)], plan(1)).peaks == {}
