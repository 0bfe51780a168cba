"""The extrapolation experiment's plumbing at a toy size: text, rules, training, scores, storage, tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# of the extra "bench".
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from clex_kernels import ClexConfig, ClexRotaryEmbedding, RotaryTable
from examples import extrapolate, extrapolate_search
from examples.extrapolation import corpus, evaluation, methods, runs, summary, training, workers
from examples.extrapolation.methods import METHODS, ODE_ALONE, ODE_ALONE_SLOW, UNTUNED, Rotary
from examples.extrapolation.settings import Base, Ode, Reading, Tuning, storage_key
from examples.train_tiny import next_byte_loss

TINY = Tuning(Base(train_length=16, head_dim=8, heads=2, kv_heads=1, width=32, layers=1, batch=4, steps=3), steps=3)
READING = Reading(segments=2, split="validation")
ALL_METHODS = (*METHODS, UNTUNED, ODE_ALONE, ODE_ALONE_SLOW)
BY_NAME = {method.name: method for method in METHODS}
DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.usefixtures("short_text")


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "STORE", tmp_path)
    runs.make_base(TINY.base)
    return tmp_path


def text_of(part: torch.Tensor) -> str:
    return bytes(part.tolist()).decode()


def test_every_document_is_in_exactly_one_part():
    parts = [text_of(part) for part in corpus.load_corpus()]
    for number in range(36):
        assert [f"document {number}:" in part for part in parts].count(True) == 1
    assert "document 3:" in parts[1]
    assert "document 9:" in parts[2]


def test_windows_of_every_length_cover_the_same_bytes_in_order():
    segments = torch.arange(2 * 33).view(2, 33)
    for length in (8, 16, 32):
        windows = evaluation.cut_windows(segments, length)
        assert torch.equal(windows[:, 1:].reshape(2, -1), segments[:, 1:])
        assert torch.equal(windows[:, :-1].reshape(2, -1), segments[:, :-1])


@pytest.mark.parametrize("rule", ["rope", "linear", "ntk", "yarn"])
def test_rules_give_plain_rope_at_t_1(rule):
    config = TINY.config()
    freq, amplitude = methods.frequencies(rule, 1.0, config)
    assert torch.equal(freq, methods.plain_frequencies(config))
    assert amplitude == 1.0


def test_the_ntk_rule_is_clex_with_the_ode_off():
    config = TINY.config()
    off = ClexRotaryEmbedding(config).eval()
    for t in (2, 5, 16):
        freq, _ = methods.frequencies("ntk", float(t), config)
        torch.testing.assert_close(freq, off(16 * t).freq, rtol=1e-12, atol=0)


def test_the_yarn_rule_is_that_of_transformers():
    config = ClexConfig(head_dim=64, train_length=512, max_factor=16)
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 1.0,
    }
    theirs = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=rope)
    inv_freq, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    freq, our_amplitude = methods.frequencies("yarn", 8.0, config)
    torch.testing.assert_close(freq.float(), inv_freq)
    assert our_amplitude == pytest.approx(amplitude)


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"rule: expected .* got 'magic'"):
        methods.frequencies("magic", 2.0, TINY.config())


def test_methods_with_the_same_positions_draw_the_same():
    tables = [
        Rotary(TINY, method).sample(4, torch.Generator().manual_seed(5))
        for method in METHODS
        if method.positions == "runs"
    ]
    assert len(tables) >= 4
    for table in tables[1:]:
        assert torch.equal(table.t, tables[0].t)
        assert torch.equal(table.positions, tables[0].positions)


def test_yarn_by_t_scales_every_sequence_by_its_own_t():
    rotary = Rotary(TINY, BY_NAME["YaRN by t, runs"])
    stack = rotary.sample(4, torch.Generator().manual_seed(5))
    assert len(set(stack.t.tolist())) > 1
    for row, t in enumerate(stack.t.tolist()):
        freq, amplitude = methods.frequencies("yarn", t, rotary.config)
        alone = RotaryTable.from_frequencies(freq, positions=stack.positions[row], amplitude=amplitude)
        torch.testing.assert_close(stack.coarse[row], alone.coarse)


def test_a_fixed_factor_is_used_at_every_length():
    rotary = Rotary(TINY, BY_NAME["linear, factor 16"])
    plain = methods.plain_frequencies(rotary.config)
    for length in (16, 32, 256):
        torch.testing.assert_close(rotary.at(length).freq, plain / 16)


def test_fine_tuning_moves_what_it_should_and_nothing_else():
    base = training.train_base(TINY.base)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    off = training.fine_tune(base, TINY, BY_NAME["ODE off, runs"])
    assert not off.clex.proj_func.ode_down_proj.any()
    assert any(not torch.equal(value, start[name]) for name, value in base.state_dict().items())

    base.load_state_dict(start)
    on = training.fine_tune(base, replace(TINY, ode=Ode(head_start=TINY.steps)), BY_NAME["CLEX, runs"])
    assert on.clex.proj_func.ode_down_proj.any()
    assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())


def test_scores_are_perplexities_of_windows_and_of_the_same_last_bytes():
    model = training.new_model(TINY.base).eval()
    rotary = Rotary(TINY, BY_NAME["RoPE"])
    scores = evaluation.evaluate(model, rotary.at, READING, 16)
    segments = corpus.cut_segments(corpus.load_corpus().validation, 2, 256)
    with torch.no_grad():
        whole = next_byte_loss(model, segments, rotary.at(256)).exp().item()
        last = next_byte_loss(model, segments[:, -17:], rotary.at(16)).exp().item()
    assert scores[16].whole == pytest.approx(whole, rel=1e-3)
    assert scores[1].last == pytest.approx(last, rel=1e-3)


def test_a_stored_result_is_read_again_and_other_settings_have_another(store):
    job = runs.Job(TINY, BY_NAME["CLEX, runs"], READING)
    result = runs.do_job(job)
    assert set(result["scores"]["clex"]) == {"1", "2", "4", "8", "16"}
    assert len(result["frequencies"]["freq"]) == len(result["frequencies"]["t"]) == runs.FREQUENCY_TIMES
    stored = json.loads(job.path.read_text())
    job.path.write_text(json.dumps(stored | {"seed": 123}))
    assert runs.do_job(job)["seed"] == 123
    other = replace(job, tuning=replace(TINY, ode=Ode(lr=1e-3)))
    assert runs.do_job(other)["seed"] == 0


def test_a_worker_trains_the_base_that_lacks_and_then_does_the_job(monkeypatch, tmp_path):
    # a fresh process sees the folder, but not what is patched here.
    monkeypatch.chdir(tmp_path)
    job = runs.Job(TINY, BY_NAME["CLEX, runs"], READING)
    (result,) = workers.do_jobs([job], 1)
    assert runs.base_path(TINY.base).exists()
    assert result == json.loads(job.path.read_text())


def test_settings_of_the_ode_concern_runs_with_an_ode_only():
    other = replace(TINY, ode=Ode(lr=1e-3))
    for method in METHODS:
        is_same = runs.Job(TINY, method, READING).path == runs.Job(other, method, READING).path
        assert is_same == (not method.learns)


def test_storage_keys_differ_in_every_setting():
    keys = {
        storage_key(TINY),
        storage_key(replace(TINY, seed=1)),
        storage_key(replace(TINY, base=replace(TINY.base, lr=1.0))),
        storage_key(TINY, READING),
        storage_key(TINY.base),
    }
    assert len(keys) == 5


def fake_results() -> list[dict]:
    return [
        {
            "method": method.name,
            "seed": seed,
            "scores": {
                rule: {
                    str(factor): [4.0 + seed + (0.01 if method.learns else 0.5) * factor, 4.0 + seed]
                    for factor in (1, 4, 8)
                }
                for rule in runs.rules_of(method)
            },
        }
        for method in ALL_METHODS
        for seed in (0, 1)
    ]


def test_differences_are_paired_by_seed():
    found = summary.by_row(fake_results())
    mean, deviation = summary.difference(found, "CLEX, runs", "ODE off, runs", "whole", 8)
    assert mean == pytest.approx(-0.49 * 8)
    assert deviation == pytest.approx(0.0)


def test_only_rows_within_the_bound_are_called_flat():
    found = summary.by_row(fake_results())
    assert summary.is_flat(found, "CLEX, runs")
    assert not summary.is_flat(found, "RoPE")
    line = next(line for line in summary.growth_table(found).splitlines() if line.startswith("| CLEX, runs"))
    assert line.endswith("| yes |")


def test_every_row_has_a_method_and_a_rule_it_is_read_with():
    by_name = {method.name: method for method in ALL_METHODS}
    rows = (*summary.ROWS, *summary.FROZEN_ROWS)
    assert all(row.rule in runs.rules_of(by_name[row.method]) for row in rows)
    assert {row.method for row in rows} == set(by_name)


def test_the_report_of_a_plan_is_written(store, tmp_path):
    jobs = extrapolate.plan_of(TINY, 2, (0,), READING)
    shown = extrapolate.write_report(jobs, [runs.do_job(job) for job in jobs], tmp_path / "report")
    report = json.loads((tmp_path / "report" / "extrapolation.json").read_text())
    assert {result["method"] for result in report["results"]} == {method.name for method in ALL_METHODS}
    assert shown == extrapolate.tables(report["results"])
    assert (tmp_path / "report" / "extrapolation.png").stat().st_size > 0
    assert (tmp_path / "report" / "extrapolation_frequencies.png").stat().st_size > 0


def test_a_model_that_is_not_fine_tuned_stays_as_it_was(store):
    model = runs.load_base(TINY.base)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    training.fine_tune(model, replace(TINY, steps=0), UNTUNED)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_trials_of_the_search_differ_and_read_validation_text_only():
    trials = extrapolate_search.TRIALS
    assert len({(trial.job().path, trial.rule) for trial in trials}) == len({trial.name for trial in trials})
    assert len({trial.name for trial in trials}) == len(trials)
    assert all(trial.job().reading.split == "validation" for trial in trials)


def test_the_document_shows_the_committed_results():
    report = json.loads((DOCS / "extrapolation.json").read_text())
    assert extrapolate.tables(report["results"]) in (DOCS / "extrapolation.md").read_text()
    assert report["reading"]["split"] == "test"
