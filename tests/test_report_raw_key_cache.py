"""The benchmarks of models on their own RoPE on tiny ones: truths and ways, and the report's section."""

import pytest
import torch
from test_report import make_info
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmarks import raw_key_cache_case as raw
from benchmarks import report, summary
from benchmarks.end_to_end_case import SETS, DecodeShape, Rope, Sizes

SIZES = Sizes(layers=2, C=64, F=48, H=4, G=2, D=16, vocabulary=40, train_length=32)
SHAPE = DecodeShape("fp32", 2, 70)

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*")


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
@pytest.mark.parametrize("kind", raw.KINDS)
def test_every_way_to_decode_is_right_on_both_caches_and_leaves_them_as_long(kind, dtype, bound):
    case = raw.RawKeyCase(kind, DecodeShape(dtype, SHAPE.B, SHAPE.S), SIZES)
    steps = [case.ours(), *case.rivals()]
    assert len({step.name for step in steps}) == 4
    for step in steps:
        for turn in range(2 * SETS):
            step.prepare(turn)
            assert step.errors(turn, step.run())["logits"] < bound, step.name
            assert int(step.cache.get_seq_length()) == SHAPE.S


@pytest.mark.parametrize("kind", raw.KINDS)
def test_other_frequencies_are_noticed_in_a_decode_step(kind):
    case = raw.RawKeyCase(kind, SHAPE, SIZES)
    plain = Rope(raw.plain_frequencies(SIZES.clex), case.rope.amplitude)
    case.keys = [drawn.rotated(plain) for drawn in case.sets]
    step = case.stock(raw.STOCK)
    step.prepare(0)
    assert step.errors(0, step.run())["logits"] > 0.1


@pytest.mark.parametrize("kind", raw.KINDS)
@pytest.mark.parametrize("length", [20, 71, 200])
def test_frequencies_are_those_of_transformers(kind, length):
    config, rope = raw.KINDS[kind].config(SIZES), raw.KINDS[kind].rope(SIZES, length)
    freq, amplitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu", seq_len=length)
    torch.testing.assert_close(rope.freq.float(), freq)
    assert rope.amplitude == pytest.approx(amplitude)


def test_only_a_step_longer_than_all_before_grows_dynamic_frequencies():
    step = raw.RawKeyCase("Llama, dynamic NTK", SHAPE, SIZES).stock(raw.STOCK)
    rotary = step.model.model.rotary_emb
    before = rotary.inv_freq
    for turn in range(2):
        step.prepare(turn)
        step.errors(turn, step.run())
        assert rotary.inv_freq is not before
        before = rotary.inv_freq


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_every_way_past_the_switch_is_right_more_than_once(dtype, bound):
    case = raw.SwitchCase(dtype, SIZES)
    for step in (case.recompute(), case.after(), case.one_pass()):
        for turn in range(2 * SETS):
            step.prepare(turn)
            assert step.errors(turn, step.run())["logits"] < bound, step.name


def test_only_the_step_at_the_switch_computes_the_cache_anew():
    case = raw.SwitchCase("fp32", SIZES)
    for step, tokens in ((case.recompute(), [case.cached, 1]), (case.after(), [1])):
        seen = []
        step.model.model.layers[0].register_forward_pre_hook(
            lambda layer, args, seen=seen: seen.append(args[0].shape[1])
        )
        step.prepare(0)
        step.run()
        assert seen == tokens


def test_a_cache_of_before_the_switch_is_wrong_past_it_without_recompute():
    case = raw.SwitchCase("fp32", SIZES)
    step = case.one_pass()
    step.caches, step.first = case.filled(step.model, is_past=False), case.cached
    step.prepare(0)
    assert step.errors(0, step.run())["logits"] > 0.1


def make_raw_info(**changes):
    return make_info(section="raw key cache", curves={"stock": "copy"}, floor=None) | changes


def test_steps_over_raw_keys_have_tables_with_or_without_figures():
    decode = "| fp32 | 2 ms | 4 ms | 10 ms | 0.500x | 0.200x | compiled |"
    switch = "| bf16 | 2 ms | 10 ms | 1.6 ms | 0.200x | 1.250x |"
    cases = [make_info(), make_raw_info(), make_raw_info(case="bf16", curves={"after": "plain"})]
    assert summary.raw_key_table(cases).splitlines()[2:] == [decode]
    assert summary.switch_table(cases).splitlines()[2:] == [switch]
    parts = report.raw_key_parts(cases)
    assert [parts[3].splitlines()[2:], parts[-1].splitlines()[2:]] == [[decode], [switch]]
    assert report.SWITCH_TEXT not in report.raw_key_parts(cases[:2])
    assert report.raw_key_parts([make_info()])[-1] == "Not measured in this run."
    assert "raw key cache" in report.SECTIONS
