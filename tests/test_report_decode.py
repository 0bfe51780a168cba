"""The decode benchmarks on small caches: their truths, ways and floors, the rotated cache, and the report's section."""

import dataclasses

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from test_report import make_info, make_way

from benchmarks import decode_case, exact, formulations, plots, report, rotated_cache, summary
from benchmarks.rotated_cache import RAW, STALE, TURNED, RotatedCache
from benchmarks.shapes import DecodeShape
from benchmarks.weights import synthetic_weights
from clex_kernels import ClexConfig, reference

FREQ = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)


def test_an_exact_decode_step_is_the_last_row_of_exact_attention(monkeypatch):
    monkeypatch.setattr(exact, "KEYS_AT_ONCE", 4)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn((1, 9, heads, 8), generator=generator) for heads in (4, 2, 2))
    true = exact.attention(q, k, v, FREQ, torch.arange(9), torch.tensor([8]))[0, 0]
    torch.testing.assert_close(exact.decode(q[0, -1], k[0], v[0], FREQ), true)


def test_decode_formulations_are_the_exact_step():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((2, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8))
    )
    true = torch.stack([exact.decode(*rows, FREQ) for rows in zip(q, k, v, strict=True)]).unflatten(1, (2, 2))
    cos, sin = reference.tables(FREQ, torch.arange(16.0))
    q, k, v = q.unflatten(1, (2, 2)), k.transpose(1, 2), v.transpose(1, 2)
    for name in ("rotate_and_attend", "rotate_and_attend_repeated"):
        torch.testing.assert_close(getattr(formulations, name)(q, k, v, cos, sin), true)
    rotated = formulations.rotate_heads(q, cos[-1:], sin[-1:]), formulations.rotate_heads(k, cos, sin), v
    for name in ("decode_sdpa", "decode_softmax", "decode_split"):
        torch.testing.assert_close(getattr(formulations, name)(*rotated), true)


@pytest.mark.parametrize("read", decode_case.READERS.values(), ids=decode_case.READERS)
def test_the_floor_reads_every_number_of_both(read):
    k, v = torch.ones(2, 3, 8, dtype=torch.bfloat16), torch.ones(2, 3, 8, dtype=torch.bfloat16)
    before = torch.as_tensor(read(k, v))
    # the upper half of an fp32 number is its high bits: a change of the lower half alone may round away.
    for x in (k, v):
        for number in x.view(-1)[1::2]:
            number.fill_(64.0)
            assert not torch.equal(torch.as_tensor(read(k, v)), before)
            number.fill_(1.0)


def test_every_way_of_a_decode_case_is_right_on_both_input_sets():
    generator = torch.Generator().manual_seed(4)
    pool = torch.randn(decode_case.SETS, 2 * 128 * 16, generator=generator).bfloat16()
    for lengths in (None, (128, 70)):
        shape = DecodeShape("bf16", 2, 128, lengths, H=4, G=2, D=8)
        case = decode_case.Case(shape, pool, synthetic_weights(ClexConfig(head_dim=8, train_length=32, max_factor=16)))
        ways = [case.ours(), case.unrotated(), case.token_major()]
        for way in ways + (case.rivals() if lengths is None else case.mixed_rivals()):
            for turn in range(decode_case.SETS):
                way.prepare(turn)
                assert way.errors(turn, case.follow(way))["out"] < 0.03, way.name
        assert case.allocated == 0
        # K and V in bf16, fp32 tables of R = 4 pairs: 64 fine rows and a coarse one per 64 keys.
        ends = lengths or (128, 128)
        assert case.bytes_moved == sum(2 * end * 2 * 8 * 2 + (64 + -(-end // 64)) * 4 * 2 * 4 for end in ends)
    assert torch.equal(case.sets[0].k, case.sets[1].v)


def test_a_way_runs_on_the_threads_asked_for():
    before = torch.get_num_threads()
    way = decode_case.on_threads(make_way("ours", []), 1, "alone")
    try:
        way.prepare(3)
        assert (way.name, torch.get_num_threads(), way.run()) == ("alone", 1, 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("turns", [True, False])
def test_a_rotated_cache_follows_the_frequencies_only_if_it_turns(turns):
    keys = torch.randn(1, 12, 2, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cache = RotatedCache(tuple(keys.shape), torch.float64, FREQ, turns)
    for number, (start, end) in enumerate(((0, 5), (5, 6), (6, 12)), start=1):
        freq = FREQ / number
        cache.change(freq)
        cache.append(keys[:, start:end])
        cos, sin = exact.cos_sin(torch.arange(12), freq)
        true = exact.rotate(keys, cos, sin)
        torch.testing.assert_close(cache.keys[:, start:end], true[:, start:end], rtol=1e-12, atol=1e-12)
        if turns:
            torch.testing.assert_close(cache.keys[:, :end], true[:, :end], rtol=1e-12, atol=1e-12)
    assert cache.length == 12
    assert turns == torch.allclose(cache.keys, true)


def test_drift_is_that_of_rounding_or_of_wrong_frequencies_and_is_drawn(tmp_path):
    drift = rotated_cache.measure_drift(ClexConfig(head_dim=16, train_length=32, max_factor=4), step=16)
    assert (drift.tokens, drift.changes) == ([*range(16, 129, 16)], [32, 64, 96])
    assert all(0 < error < 0.03 for name in (TURNED, RAW) for error in drift.errors[name])
    assert drift.errors[STALE][:2] == drift.errors[TURNED][:2]
    assert drift.errors[STALE][-1] > 0.1
    plots.plot_decode(dataclasses.asdict(drift), tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 0


def test_decode_steps_have_a_section_with_or_without_figures():
    step = make_info(section="decode", case="bf16", curves={"tokens": 1000, "bytes": 4_100_000})
    drift = make_info(section="decode", rival=None, curves={"tokens": 1000, "bytes": 4_100_000, "drift": {}})
    rows = summary.decode_table([step, drift, make_info()]).splitlines()[2:]
    assert rows == ["| bf16 | 2 ms | 1.6 ms | 10 ms | 4 ms | 5.00x | 1.250x | 0.500x | 4,100 | 2.05 |"]
    (row,) = summary.decode_table([step | {"floor": None}]).splitlines()[2:]
    assert row == "| bf16 | 2 ms | 1.6 ms | 10 ms | - | 5.00x | 1.250x | - | 4,100 | 2.05 |"
    assert report.decode_parts([make_info()])[-1] == "Not measured in this run."
    drift["curves"]["drift"] = {"tokens": [1], "changes": [], "errors": {}}
    assert "(decode.png)" in report.decode_parts([step, drift])[-1]
