"""The benchmarks of a whole model on a tiny one: truths and ways, and the report's section."""

import pytest
import torch
from test_report import make_info

from benchmarks import end_to_end_case as whole
from benchmarks import report, summary

SIZES = whole.Sizes(layers=2, C=32, F=48, H=4, G=2, D=16, vocabulary=40, train_length=32)
SHAPE = whole.DecodeShape("fp32", 2, 70)

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:.*max_factor.*")


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_every_way_to_train_is_right_and_learns(dtype, bound):
    case = whole.TrainingCase(dtype, 24, SIZES)
    steps = [case.clex(), case.frozen(), *case.rivals()]
    assert len({step.name for step in steps}) == 5
    for step in steps:
        before = {name: weight.detach().clone() for name, weight in step.model.named_parameters()}
        for turn in range(2):
            step.prepare(turn)
            errors = step.errors(turn, step.run())
            assert errors["loss"] < bound, step.name
            assert errors["logits"] < bound, step.name
        assert all(not torch.equal(weight, before[name]) for name, weight in step.model.named_parameters()), step.name


def test_another_t_is_noticed_in_a_training_step():
    step = whole.TrainingCase("fp32", 24, SIZES).clex()
    # the first draw of some seed is not that of another.
    step.prepare(3)
    step.case.sampling.manual_seed(5)
    assert step.errors(3, step.run())["logits"] > 0.1


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_every_way_to_decode_is_right_on_both_caches_and_leaves_them_as_long(dtype, bound):
    case = whole.DecodeCase(whole.DecodeShape(dtype, SHAPE.B, SHAPE.S), SIZES)
    assert case.t == 3
    steps = [case.clex(), case.clex(is_static=True), case.frozen(), case.frozen(is_static=True), *case.rivals()]
    for step in steps:
        for turn in range(2 * whole.SETS):
            step.prepare(turn)
            assert step.errors(turn, step.run())["logits"] < bound, step.name
            assert int(step.cache.get_seq_length()) == SHAPE.S


def test_frequencies_of_another_t_are_noticed_in_a_decode_step():
    case = whole.DecodeCase(SHAPE, SIZES)
    step = case.frozen()
    step.truth = "clex"
    step.prepare(0)
    assert step.errors(0, step.run())["logits"] > 0.1


def make_model_info(**changes):
    return make_info(section="whole model", row="decode step", curves={"stock": "copy"}, floor=None) | changes


def test_whole_steps_come_first_and_have_a_table_with_or_without_figures():
    row = "| decode step: fp32 | 2 ms | 1.6 ms | 4 ms | 10 ms | 1.250x | 0.500x | 0.200x | compiled |"
    assert summary.model_table([make_info(), make_model_info()]).splitlines()[2:] == [row]
    assert report.model_parts([make_model_info()])[-1].splitlines()[2:] == [row]
    assert report.model_parts([make_info()])[-1] == "Not measured in this run."
    assert next(iter(report.SECTIONS)) == "whole model"
