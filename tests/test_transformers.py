"""Patched transformers models: logits in prefill and decoding, alone and in batches, over every kind of cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers_models import (
    CACHES,
    CLEX_FAMILIES,
    CLOSE,
    TRAIN_LENGTH,
    clex_model,
    dynamic_cache,
    in_steps,
    pad_left,
    random_tokens,
    static_cache,
    stock_of,
    true_logits,
)

from clex_kernels import attention_checks, decode_checks, tables
from clex_kernels.integrations import steps
from clex_kernels.integrations.transformers import apply_clex

GOLDEN = np.load(Path(__file__).parent / "golden" / "llama_gqa.npz")
WINDOW = 7
# models whose layers see a window: all of them, or every second one.
SLIDING = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:.*max_factor.*", "ignore:lengths past.*")


FAMILY = pytest.mark.parametrize("family", CLEX_FAMILIES)


@pytest.fixture(scope="module")
def authors_model() -> PreTrainedModel:
    spec = json.loads(str(GOLDEN["spec"]))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    names += ("rope_theta", "rms_norm_eps", "rope_scaling")
    settings = {name: spec[name] for name in names}
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=spec["train_length"], **settings)
    model = LlamaForCausalLM(config).eval()
    apply_clex(model)
    model.load_state_dict({key[2:]: torch.tensor(GOLDEN[key]) for key in GOLDEN.files if key.startswith("w:")})
    return model


@pytest.mark.parametrize("length", [8, 16, 17, 40, 64])
def test_prefill_gives_the_authors_logits(authors_model, length):
    tokens = torch.tensor(GOLDEN["input_ids"])[:, :length]
    with torch.no_grad():
        logits = authors_model(tokens).logits
    np.testing.assert_allclose(logits, GOLDEN[f"logits_prefill_{length}"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_decoding_gives_the_authors_logits(authors_model, implementation):
    tokens = torch.tensor(GOLDEN["input_ids"])
    caches = {
        "dynamic": DynamicCache(config=authors_model.config),
        "static": StaticCache(config=authors_model.config, max_cache_len=70),
    }
    logits = in_steps(authors_model, tokens, [1] * tokens.shape[1], caches[implementation])
    np.testing.assert_allclose(logits, GOLDEN["logits_decode"], rtol=0, atol=5e-5)


@FAMILY
@pytest.mark.parametrize("length", [1, TRAIN_LENGTH, 19])
def test_prefill_equals_stock_transformers_at_that_t(family, length):
    model, tokens = clex_model(family), random_tokens(2, length)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, true_logits(model, tokens), **CLOSE)


@FAMILY
@CACHES
def test_each_decode_step_rotates_all_cached_keys_by_its_own_t(family, make_cache):
    # with one layer, cached keys and values depend on no earlier t.
    model, tokens = clex_model(family, layers=1), random_tokens(2, 27)
    logits = in_steps(model, tokens, [6] + [1] * 21, make_cache(model))
    for length in range(6, 28):
        truth = true_logits(model, tokens[:, :length])[:, -1]
        torch.testing.assert_close(logits[:, length - 1], truth, **CLOSE)


@FAMILY
@CACHES
def test_left_padded_batch_equals_its_sequences_alone(family, make_cache):
    model = clex_model(family)
    rows = [row[0] for row in (random_tokens(1, 9, 1), random_tokens(1, 22, 2), random_tokens(1, 16, 3))]
    tokens, mask = pad_left(rows)
    new = 6
    tokens, mask = (torch.cat((x, y), dim=1) for x, y in ((tokens, random_tokens(3, new)), (mask, torch.ones(3, new))))
    longest = tokens.shape[1] - new
    together = in_steps(model, tokens, [longest] + [1] * new, make_cache(model), mask.long())
    for row, length in enumerate([9, 22, 16]):
        first = longest - length
        alone = in_steps(model, tokens[row : row + 1, first:], [length] + [1] * new, make_cache(model))
        torch.testing.assert_close(together[row, first:], alone[0], **CLOSE)


def test_continuous_t_of_a_padded_batch_is_each_sequences_own():
    model = clex_model("llama", scale_policy="continuous")
    rows = [random_tokens(1, 9, 1)[0], random_tokens(1, 21, 2)[0]]
    tokens, mask = pad_left(rows)
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits
        for row, logits in zip(rows, together, strict=True):
            truth = true_logits(model, row[None], t=len(row) / TRAIN_LENGTH)
            torch.testing.assert_close(logits[-len(row) :], truth[0], **CLOSE)


def test_right_padded_batch_without_cache_equals_its_sequences_alone():
    model, tokens = clex_model("llama"), random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 9:] = 0
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(together[0, :9], true_logits(model, tokens[:1, :9])[0], **CLOSE)
    torch.testing.assert_close(together[1], true_logits(model, tokens[1:])[0], **CLOSE)


@pytest.mark.parametrize("family", SLIDING)
@CACHES
@pytest.mark.parametrize("sizes", [[24] + [1] * 8, [5] + [1] * 27, [5, 4, 9, 1, 13]], ids=["long", "short", "chunks"])
def test_sliding_window_layers_see_the_window(family, make_cache, sizes):
    # one t throughout, so that uncached and cached agree in every layer.
    model = clex_model(family, extras=SLIDING[family], max_factor=1)
    tokens = random_tokens(2, 32)
    logits = in_steps(model, tokens, sizes, make_cache(model))
    torch.testing.assert_close(logits, true_logits(model, tokens), **CLOSE)


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_window_layers_of_a_padded_batch(family):
    model = clex_model(family, extras=SLIDING[family])
    rows = [random_tokens(1, 9, 1)[0], random_tokens(1, 22, 2)[0]]
    tokens, mask = pad_left(rows)
    logits = in_steps(model, tokens, [15] + [1] * 7, dynamic_cache(model), mask)
    alone = in_steps(model, rows[1][None], [15] + [1] * 7, dynamic_cache(model))
    torch.testing.assert_close(logits[1:], alone, **CLOSE)
    alone = in_steps(model, rows[0][None], [2] + [1] * 7, dynamic_cache(model))
    torch.testing.assert_close(logits[0, 13:], alone[0], **CLOSE)


@CACHES
def test_prompt_in_chunks_equals_prompt_at_once_within_one_t(make_cache):
    model = clex_model("qwen3", train_length=64)
    tokens = random_tokens(2, 37)
    logits = in_steps(model, tokens, [18, 2, 17], make_cache(model))
    torch.testing.assert_close(logits, true_logits(model, tokens), **CLOSE)


def test_log_scale_follows_each_sequences_length():
    model = clex_model("llama", log_scale=True)
    rows = [random_tokens(1, 9, 1)[0], random_tokens(1, 21, 2)[0]]
    tokens, mask = pad_left(rows)
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits
        for row, logits in zip(rows, together, strict=True):
            torch.testing.assert_close(logits[-len(row) :], model(row[None]).logits[0], **CLOSE)
            assert (logits[-1] - true_logits(model, row[None])[0, -1]).abs().max() > 1e-3


def test_log_scale_counts_tokens_that_left_the_window():
    model = clex_model("mistral", layers=1, extras=SLIDING["mistral"], log_scale=True)
    tokens = random_tokens(2, 20)
    logits = in_steps(model, tokens, [12] + [1] * 8, dynamic_cache(model))
    for length in range(12, 21):
        with torch.no_grad():
            truth = model(tokens[:, :length], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits[:, length - 1], truth, **CLOSE)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 2},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_generating_for_a_padded_batch_equals_each_prompt_alone(family, options):
    model = clex_model(family)
    rows = [random_tokens(1, 5, 1)[0], random_tokens(1, 13, 2)[0]]
    tokens, mask = pad_left(rows)
    options = {"max_new_tokens": 16, "do_sample": False, **options}
    together = model.generate(tokens, attention_mask=mask, **options)
    for row, out in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        assert torch.equal(out[-16:], alone[0, -16:])


def test_greedy_generation_follows_the_logits_of_its_steps():
    model, prompt = clex_model("llama"), random_tokens(1, 5)
    out = model.generate(prompt, attention_mask=torch.ones(1, 5), max_new_tokens=20, do_sample=False)
    logits = in_steps(model, out[:, :-1], [5] + [1] * 19, dynamic_cache(model))
    assert torch.equal(logits[0, 4:].argmax(-1), out[0, 5:])


def test_sampling_is_reproducible():
    model, prompt = clex_model("mistral"), random_tokens(2, 5)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(model.generate(prompt, attention_mask=torch.ones(2, 5), max_new_tokens=12, do_sample=True))
    assert torch.equal(*draws)


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_decoding_equals_greedy_within_one_t(way):
    model, prompt = clex_model("llama", train_length=64), random_tokens(1, 9)
    options = {"attention_mask": torch.ones(1, 9), "max_new_tokens": 24, "do_sample": False}
    helper = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        helper = {"assistant_model": clex_model("llama", layers=1, train_length=64)}
    plain = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, **options, **helper), plain)


def test_several_new_tokens_share_the_t_of_the_last():
    model, tokens = clex_model("llama", layers=1), random_tokens(1, 10)
    logits = in_steps(model, tokens, [7, 3], dynamic_cache(model))
    torch.testing.assert_close(logits[:, 7:], true_logits(model, tokens)[:, 7:], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"sample": 1}])
def test_generation_equals_stock_transformers_at_a_fixed_t(options):
    model = clex_model("llama", max_factor=1)
    stock = stock_of(model, model.model.clex_layer(1).freq)
    tokens, mask = pad_left([random_tokens(1, 5, 1)[0], random_tokens(1, 13, 2)[0]])
    options = {"max_new_tokens": 20, "attention_mask": mask, **options}
    options["do_sample"] = bool(options.pop("sample", 0))
    outs = []
    for each in (model, stock):
        torch.manual_seed(3)
        outs.append(each.generate(tokens, **options))
    assert torch.equal(*outs)


@pytest.mark.parametrize("make_cache", [dynamic_cache, static_cache], ids=["dynamic", "static"])
def test_padded_prompt_in_chunks(make_cache):
    model = clex_model("llama", train_length=64)
    rows = [random_tokens(1, 4, 1)[0], random_tokens(1, 22, 2)[0]]
    tokens, mask = pad_left(rows)
    logits = in_steps(model, tokens, [9, 9, 4], make_cache(model), mask)
    for row, out in zip(rows, logits, strict=True):
        torch.testing.assert_close(out[-len(row) :], true_logits(model, row[None])[0], **CLOSE)


def test_a_decode_step_goes_through_the_decode_operator(monkeypatch):
    model, tokens = clex_model("llama"), random_tokens(1, 20)
    calls = []
    decode = steps.Step.decode
    monkeypatch.setattr(steps.Step, "decode", lambda step, *args: calls.append(step) or decode(step, *args))
    in_steps(model, tokens, [17, 1, 2], dynamic_cache(model))
    assert len(calls) == 4
    assert len({id(step.kept) for step in calls}) == 2
    assert all(len(step.kept) == 1 for step in calls), "layers alike share one check"


@pytest.fixture
def unseen(monkeypatch):
    """Values of masks, bounds and lengths count as a device's, which are not looked at."""
    for module in (attention_checks, decode_checks):
        monkeypatch.setattr(module, "can_look", lambda x, debug: False)
    for module in (steps, tables):
        monkeypatch.setattr(module, "on_host", lambda x: False)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("policy", ["integer", "continuous"])
def test_static_cache_on_a_device_needs_no_look_at_its_length(policy):
    # past the limit of 32 tokens, and of the tile of 64 that it is rounded to.
    model = clex_model("llama", layers=1, scale_policy=policy)
    rows = [random_tokens(1, 5, 1)[0], random_tokens(1, 12, 2)[0]]
    tokens, mask = pad_left(rows)
    new = 60
    tokens = torch.cat((tokens, random_tokens(2, new)), dim=1)
    mask = torch.cat((mask, torch.ones(2, new, dtype=torch.long)), dim=1)
    cache = StaticCache(config=model.config, max_cache_len=80)
    logits = in_steps(model, tokens, [12] + [1] * new, cache, mask)
    # decoding with a mask as wide as the cache.
    wide = torch.cat((mask[:, :12], torch.ones(2, 68, dtype=torch.long)), dim=1)
    cache = StaticCache(config=model.config, max_cache_len=80)
    with torch.no_grad():
        model(tokens[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        for column in range(12, 12 + new):
            out = model(tokens[:, column : column + 1], attention_mask=wide, past_key_values=cache).logits
            torch.testing.assert_close(out, logits[:, column : column + 1], **CLOSE)
            for row, first in enumerate([7, 0]):
                length = min(column + 1 - first, 32)
                t = length / TRAIN_LENGTH if policy == "continuous" else -(-length // TRAIN_LENGTH)
                truth = true_logits(model, tokens[row : row + 1, first : column + 1], t=max(t, 1))
                torch.testing.assert_close(out[row], truth[0, -1:], **CLOSE)


@pytest.mark.usefixtures("unseen")
def test_padding_on_the_right_is_remembered_where_masks_are_not_looked_at():
    model, tokens = clex_model("llama"), random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:19] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="got holes in row 0"):
        model(tokens, attention_mask=mask)
    mask[0, 12:] = 0
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        with pytest.raises(ValueError, match="filled with some on the right"):
            model(tokens[:, :1], attention_mask=mask, past_key_values=cache)


def test_a_step_follows_the_layers_of_a_model_to_their_devices():
    model = clex_model("llama")
    tokens = steps.find_tokens(
        {"input_ids": random_tokens(2, 9), "attention_mask": pad_left([torch.ones(9)] * 2)[1], "cache": None}
    )
    step = steps.Step(model.model.clex_layer.stack(), tokens._replace(start=torch.zeros(2)), {})
    moved = step.on(torch.device("meta"))
    assert moved.table.device.type == moved.tokens.start.device.type == "meta"
    assert step.on(torch.device("meta")) is moved
    assert step.on(torch.device("cpu")) is step


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float32, 1e-5)])
def test_model_in_other_dtypes(dtype, bound):
    model, tokens = clex_model("qwen3", train_length=64), random_tokens(2, 19)
    truth = true_logits(model, tokens)
    weights = model.model.clex_layer.proj_func.ode_up_proj.float()
    model.to(dtype)
    assert torch.equal(model.model.clex_layer.proj_func.ode_up_proj, weights)
    logits = in_steps(model, tokens, [18, 1], dynamic_cache(model))
    assert logits.dtype == dtype
    assert (logits - truth).abs().max() <= bound * truth.abs().max()


def test_autocast_serves_prefill_and_decoding():
    model, tokens = clex_model("qwen3").float(), random_tokens(2, 20)
    exact = in_steps(model, tokens, [19, 1], dynamic_cache(model))
    with torch.autocast("cpu", torch.bfloat16):
        logits = in_steps(model, tokens, [19, 1], dynamic_cache(model))
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()
