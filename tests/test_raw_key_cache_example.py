"""The example of a live cache past the length of training, at a toy size: models, ways to read, scores, files."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

# of the extra "bench".
# both come with the bench extra, which `make install` brings.
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from clex_kernels.integrations.transformers import remove_raw_key_cache
from examples import raw_key_cache
from examples.extrapolation import corpus
from examples.live_cache import decoding, models, results
from examples.live_cache.models import DYNAMIC, LONG, Family, Setting

TINY = Setting(steps=2, train_length=16, prompt=10, length=40, texts=2, width=32, layers=3, batch=2)
FAMILIES = [LONG, DYNAMIC]

pytestmark = [pytest.mark.usefixtures("short_text"), pytest.mark.filterwarnings("ignore:.*past_key_values.*")]


@pytest.fixture(scope="module")
def wild() -> LlamaForCausalLM:
    """Weights that make attention look at few tokens, so that wrong frequencies show."""
    torch.manual_seed(0)
    model = models.make_dynamic(TINY)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request, wild) -> Family:
    return models.families(TINY, wild)[request.param]


def texts() -> torch.Tensor:
    return torch.randint(256, (TINY.texts, TINY.length + 1), generator=torch.Generator().manual_seed(1))


def test_fused_weights_are_the_same_model(wild):
    plain = {"rope_type": "default", "rope_theta": models.THETA}
    phi3 = models.make_phi3(TINY, plain).eval()
    phi3.load_state_dict(models.fuse(wild.state_dict()))
    tokens = texts()[:, : TINY.train_length]
    with torch.no_grad():
        # dynamic NTK is plain up to the length of training.
        torch.testing.assert_close(phi3(tokens).logits, wild(tokens).logits)


def test_long_rope_is_plain_first_and_slower_for_long_waves_beyond():
    rope = models.long_rope(TINY)
    assert set(rope["short_factor"]) == {1.0}
    assert rope["long_factor"] == sorted(rope["long_factor"])
    assert rope["long_factor"][-1] == TINY.factor


def test_training_learns():
    losses = []
    text = corpus.load_corpus().train[None, 40 : 40 + TINY.train_length]
    for steps in (1, 30):
        model = models.train(replace(TINY, steps=steps))
        with torch.no_grad():
            losses.append(model(text, labels=text).loss.item())
    assert losses[1] < 0.8 * losses[0]


def test_every_way_is_right_before_the_switch_and_only_some_are_past_it(family, request):
    text, title = texts(), request.node.callspec.params["family"]
    truth = decoding.read_uncached(family.fresh(), text, TINY.prompt)
    assert truth.logits.shape == (TINY.texts, TINY.length - TINY.prompt + 1, 256)
    switch = TINY.train_length - TINY.prompt + 1
    worst = {}
    for name, way in decoding.ways_of(title).items():
        found = way(family.fresh(), text, TINY.prompt)
        assert len(found.seconds) == truth.logits.shape[1]
        errors = decoding.relative_errors(found, truth)
        assert max(errors[:switch]) < 1e-5, name
        worst[name] = max(errors[switch:])
    assert worst[decoding.RECOMPUTED] < 1e-5
    assert 1e-3 < worst[decoding.KEPT] < worst[decoding.STOCK]
    assert worst[decoding.STOCK] > 0.1
    if title == LONG:
        assert worst[decoding.GENERATE] < 1e-5
    else:
        assert decoding.GENERATE not in worst


def test_the_truth_forgets_the_frequencies_of_longer_texts(wild):
    model = models.families(TINY, wild)[DYNAMIC].fresh()
    text = texts()
    with torch.no_grad():
        model(text)
        alone = models.families(TINY, wild)[DYNAMIC].fresh()(text[:, :20]).logits[:, -1]
    found = decoding.read_uncached(model, text[:, :21], 20)
    torch.testing.assert_close(found.logits[:, 0], alone)


def test_scores_look_past_the_switch_alone():
    text = texts()
    count = TINY.length - TINY.prompt + 1
    true = torch.randn(TINY.texts, count, 256, generator=torch.Generator().manual_seed(2))
    truth = decoding.Reading(true, [1.0] * count)
    switch = TINY.train_length - TINY.prompt + 1
    seconds = [9.0, *[0.001] * (switch - 1), 0.005, *[0.002] * (count - switch - 1)]
    early, late = true.clone(), true.clone()
    early[:, :switch] += 1
    late[:, -1, 0] += 100
    same = decoding.score(decoding.Reading(early, seconds), truth, text, TINY)
    assert same[:3] == (0.0, 0.0, 1.0)
    assert same[4:] == pytest.approx((1, 5, 2))
    other = decoding.score(decoding.Reading(late, seconds), truth, text, TINY)
    assert other.error == pytest.approx(100)
    assert other.agreement == pytest.approx(1 - 1 / (count - switch))
    assert other.divergence > 0.1
    target = text[:, TINY.train_length + 1 :]
    chances = true[:, switch:].double().softmax(-1).gather(-1, target[..., None])
    assert same.perplexity == pytest.approx(chances.log().mean().neg().exp().item())


def test_a_family_gives_stock_models_every_time(family):
    first = family.fresh()
    decoding.read_recomputed(first, texts()[:, :12], 10)
    remove_raw_key_cache(first)
    with pytest.raises(ValueError, match="expected one patched by apply_raw_key_cache"):
        remove_raw_key_cache(family.fresh())


def test_it_runs_and_writes_a_figure_and_what_is_in_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(raw_key_cache, "SETTING", TINY)
    raw_key_cache.main(["--steps", "2", "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "logit_error.png").stat().st_size > 10_000
    saved = json.loads((tmp_path / "new" / "logit_error.json").read_text())
    assert list(saved["models"]) == FAMILIES
    printed = capsys.readouterr().out
    for title, ways in saved["models"].items():
        assert title in printed
        for name, found in ways.items():
            assert results.row(name, found["scores"]) in printed
            assert len(found["errors"]) == TINY.length - TINY.prompt + 1
    assert not any(saved["models"][LONG][raw_key_cache.TRUTH]["errors"])


def test_no_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        raw_key_cache.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
