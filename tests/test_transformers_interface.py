"""apply_clex around the mathematics: what it refuses, and what it leaves alone."""

import copy
import inspect
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig
from transformers.models.llama import modeling_llama
from transformers_models import CLEX_FAMILIES, TOKENS, clex_config, clex_model, logits_of, pad_left, stock_model

from clex_kernels import ClexConfig
from clex_kernels.integrations import families
from clex_kernels.integrations.transformers import apply_clex, remove_clex

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:.*max_factor.*", "ignore:lengths past.*")


@pytest.mark.parametrize("family", CLEX_FAMILIES)
def test_remove_gives_the_model_back(family):
    model = stock_model(family)
    before, names, settings = logits_of(model), set(model.state_dict()), model.config.to_dict()
    rotary = model.base_model.rotary_emb
    apply_clex(model, clex_config(model))
    assert (logits_of(model) - before).abs().max() > 1e-3
    remove_clex(model)
    assert torch.equal(logits_of(model), before)
    assert set(model.state_dict()) == names
    assert model.base_model.rotary_emb is rotary
    assert model.config.to_dict() == settings


def test_other_models_of_the_process_keep_their_rotary(monkeypatch):
    # as if no test before had a patched model, which may be alive yet.
    monkeypatch.setattr(families, "_patches", {})
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", inspect.unwrap(modeling_llama.apply_rotary_pos_emb))
    other, model = stock_model("llama"), stock_model("llama")
    before, function = logits_of(other), modeling_llama.apply_rotary_pos_emb
    apply_clex(model, clex_config(model))
    assert torch.equal(logits_of(other), before)
    remove_clex(model)
    assert modeling_llama.apply_rotary_pos_emb is function


def test_two_patched_models_are_apart():
    first, second = clex_model("llama"), clex_model("llama", train_length=5)
    before = logits_of(second)
    remove_clex(first)
    assert torch.equal(logits_of(second), before)


def test_a_copy_of_a_patched_model_has_weights_and_hooks_of_its_own():
    model = clex_model("llama")
    before, twin = logits_of(model), copy.deepcopy(model)
    with torch.no_grad():
        twin.model.clex_layer.proj_func.ode_down_proj.mul_(2)
    assert (logits_of(twin) - before).abs().max() > 1e-3
    assert torch.equal(logits_of(model), before)
    remove_clex(twin)
    assert torch.equal(logits_of(model), before)


def test_a_copy_outlives_its_original():
    model = clex_model("llama")
    before, twin = logits_of(model), copy.deepcopy(model)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    remove_clex(model)
    assert torch.equal(logits_of(twin), before)
    remove_clex(twin)
    pickled.seek(0)
    assert torch.equal(logits_of(torch.load(pickled, weights_only=False)), before)


def test_another_librarys_rotary_in_the_same_place_is_passed_too(monkeypatch):
    model, other = clex_model("llama"), stock_model("llama")
    before, stock, rotate = logits_of(model), logits_of(other), modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args, **kwargs: rotate(*args, **kwargs))
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(other), stock)


def test_state_dict_has_the_authors_names():
    for family, base in (("llama", "model"), ("gpt_neox", "gpt_neox")):
        names = [name for name in clex_model(family).state_dict() if "clex" in name]
        assert names == [f"{base}.clex_layer.proj_func.ode_{side}_proj" for side in ("up", "down")]


def test_base_models_and_other_heads_are_patched_too():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    from transformers import LlamaForSequenceClassification, LlamaModel

    for model in (LlamaModel(config), LlamaForSequenceClassification(config)):
        rope = apply_clex(model.eval(), ClexConfig(head_dim=16, train_length=8))
        assert model.base_model.clex_layer is rope
        with torch.no_grad():
            model(TOKENS[:1])


def test_patching_a_peft_model_says_what_to_do():
    tuned = get_peft_model(stock_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="before get_peft_model wraps it"):
        apply_clex(tuned, ClexConfig(head_dim=12, train_length=8))


def gemma3():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=61, head_dim=16, num_key_value_heads=1, **sizes))


@pytest.mark.parametrize(
    ("make", "config", "options", "error", "message"),
    [
        (gemma3, ClexConfig(16, 8), {}, ValueError, "families .*llama, .*got Gemma3ForCausalLM"),
        (lambda: stock_model("phi3"), ClexConfig(12, 8), {}, ValueError, "other than phi3, phimoe, .*got phi3"),
        (lambda: stock_model("phimoe"), ClexConfig(12, 8), {}, ValueError, "other than phi3, phimoe, .*got phimoe"),
        (lambda: torch.nn.Linear(2, 2), ClexConfig(16, 8), {}, TypeError, "model: expected a transformers"),
        (lambda: stock_model("llama"), ClexConfig(16, 8), {}, ValueError, "config.head_dim: expected the model's 12"),
        (lambda: stock_model("phi"), ClexConfig(16, 8), {}, ValueError, "config.rotary_dim: expected the model's 8"),
        (lambda: stock_model("llama"), None, {}, ValueError, 'of type "clex"'),
        (
            lambda: stock_model("llama"),
            ClexConfig(12, 8, rope_base=500.0),
            {},
            ValueError,
            "config.rope_base: expected the model's 10000.0, got 500.0",
        ),
        (
            lambda: stock_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            ClexConfig(12, 8),
            {},
            ValueError,
            "expected one of plain RoPE .*got rope_type 'linear'",
        ),
        (lambda: stock_model("llama"), {"head_dim": 12}, {}, TypeError, "config: expected a ClexConfig"),
        (lambda: clex_model("llama"), ClexConfig(12, 8), {}, ValueError, "not patched, got one that is"),
        (lambda: stock_model("llama"), ClexConfig(12, 8), {"sampling": 3}, TypeError, "sampling: expected a dict"),
        (lambda: stock_model("llama"), ClexConfig(12, 8), {"sampling": {"t": 3}}, ValueError, "got t"),
        (
            lambda: stock_model("llama"),
            ClexConfig(12, 8),
            {"sampling": {"positions": "all"}},
            ValueError,
            "positions: expected",
        ),
    ],
)
def test_bad_models_and_settings_are_named(make, config, options, error, message):
    model = make()
    names = set(model.state_dict())
    with pytest.raises(error, match=message):
        apply_clex(model, config, **options)
    assert set(model.state_dict()) == names


def test_a_model_loaded_from_an_adapters_directory_is_refused(tmp_path):
    stock_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        apply_clex(model, clex_config(model))


def test_flash_attention_is_refused_before_and_after():
    model = stock_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation: expected 'sdpa' or 'eager', got 'flash_attention_2'"):
        apply_clex(model, clex_config(model))
    model = clex_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"got 'flash_attention_2', which does not; .*remove_clex"):
        model(TOKENS)


def test_another_implementation_set_later_is_refused():
    model = clex_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: expected 'clex_kernels'"):
        model(TOKENS)


def test_this_implementation_without_the_patch_is_refused():
    clex_model("llama")
    model = stock_model("llama")
    model.set_attn_implementation("clex_kernels")
    with pytest.raises(ValueError, match="expected a model patched by apply_clex"):
        model(TOKENS)


def test_remove_from_an_unpatched_model_is_refused():
    with pytest.raises(ValueError, match="model: expected one patched by apply_clex"):
        remove_clex(stock_model("llama"))


def test_attention_weights_are_refused():
    model = clex_model("llama")
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(TOKENS, output_attentions=True)
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(TOKENS)
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        remove_clex(model) or apply_clex(model, clex_config(model))


def test_attention_to_later_tokens_is_refused():
    model = clex_model("llama")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match="is_causal: expected True"):
        model(TOKENS)


def test_cache_of_rotated_keys_is_refused():
    model, stock = clex_model("llama"), stock_model("llama")
    cache = DynamicCache(config=stock.config)
    logits_of(stock, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="rotated already"):
        model(TOKENS[:, :1], past_key_values=cache)


def test_own_caches_are_taken_again_also_copied_cropped_and_reset():
    model = clex_model("llama", train_length=64)
    with torch.no_grad():
        cache = model(TOKENS[:, :12], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        expected = model(TOKENS).logits[:, 12:]
        assert_close(model(TOKENS[:, 12:], past_key_values=cache).logits, expected, rtol=0, atol=1e-10)
        twin.crop(-2)
        assert_close(model(TOKENS[:, 10:], past_key_values=twin).logits[:, 2:], expected, rtol=0, atol=1e-10)
        cache.reset()
    with pytest.raises(TypeError, match="cache: expected a transformers Cache"):
        model(TOKENS, past_key_values=[(1, 2)])


PADDED = pad_left([TOKENS[0, :9], TOKENS[1]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 19, 19, dtype=torch.bool)}, ValueError, "expected a 2-D one"),
        ({"attention_mask": torch.ones(2, 12)}, ValueError, r"expected shape .* \[2, 19\], got \[2, 12\]"),
        ({"attention_mask": torch.ones(2, 19).index_fill(1, torch.tensor(5), 0)}, ValueError, "got holes in row 0"),
        ({"position_ids": torch.arange(19)[None] % 11}, ValueError, "position_ids: expected consecutive"),
    ],
    ids=["4-D", "short", "holes", "packed"],
)
def test_masks_of_another_kind_are_named(options, error, message):
    with pytest.raises(error, match=message):
        clex_model("llama")(TOKENS, **options)


def test_padding_on_the_right_of_cached_tokens_is_refused():
    model = clex_model("llama")
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 12:] = 0
    with torch.no_grad():
        cache = model(TOKENS, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        with pytest.raises(ValueError, match="padding on the left of cached tokens only"):
            model(TOKENS[:, :1], attention_mask=mask, past_key_values=cache)


def test_position_ids_as_generation_makes_them_are_taken():
    tokens, mask = PADDED
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    model = clex_model("llama")
    expected = logits_of(model, tokens, attention_mask=mask)
    assert torch.equal(logits_of(model, tokens, attention_mask=mask, position_ids=positions), expected)


def test_inputs_embeds_and_positional_arguments_serve():
    model = clex_model("llama")
    expected = logits_of(model)
    assert torch.equal(logits_of(model, None, inputs_embeds=model.get_input_embeddings()(TOKENS)), expected)
    with torch.no_grad():
        assert torch.equal(model.lm_head(model.model(TOKENS, PADDED[1].fill_(1)).last_hidden_state), expected)


def test_checkpointing_drops_no_cache():
    model = clex_model("llama")
    with torch.no_grad():
        cache = model(TOKENS[:, :9], use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache: expected an empty one under activation checkpointing"):
        model(TOKENS[:, 9:], past_key_values=cache)


def test_only_training_steps_draw(monkeypatch):
    model = clex_model("llama")
    draws = []
    rope, sample = model.model.clex_layer, model.model.clex_layer.sample
    monkeypatch.setattr(rope, "sample", lambda *args, **options: draws.append(options) or sample(*args, **options))
    expected = logits_of(model)
    assert torch.equal(model(TOKENS).logits, expected)
    model.train()
    assert torch.equal(logits_of(model), expected)
    with torch.no_grad():
        cache = model(TOKENS[:, :18], use_cache=True).past_key_values
    assert model(TOKENS[:, 18:], past_key_values=cache).logits.requires_grad
    assert draws == []
    model(TOKENS)
    assert draws == [{"positions": "runs", "factors": "integer", "plain_share": 0.25}]


def test_training_forward_draws_from_the_generator_given():
    losses = []
    for _ in range(2):
        model = stock_model("llama")
        sampling = {"generator": torch.Generator().manual_seed(5), "positions": "uniform", "plain_share": 0.0}
        apply_clex(model, clex_config(model), sampling)
        losses.append([model.train()(TOKENS, labels=TOKENS).loss.item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
