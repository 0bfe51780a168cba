"""apply_raw_key_cache around the logits: what it refuses, what it leaves alone, what it gives back; training."""

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama import modeling_llama
from transformers_models import (
    CLOSE,
    TOKENS,
    clex_config,
    clex_model,
    dynamic_cache,
    exact_model,
    in_steps,
    logits_of,
    random_tokens,
    rope_parameters,
    scaled_model,
    stock_model,
)

from clex_kernels.integrations import families
from clex_kernels.integrations.families import FAMILIES
from clex_kernels.integrations.transformers import apply_clex, apply_raw_key_cache, remove_clex, remove_raw_key_cache

# from below the switch to above it.
STEPS = [6, 1, 1, 1, 2]

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*")


def raw_model(rope_type: str = "longrope", recompute: bool | None = True) -> PreTrainedModel:
    model = scaled_model("llama", rope_type)
    apply_raw_key_cache(model, recompute)
    return model


def live_logits(model: PreTrainedModel) -> Tensor:
    """Logits over a cache that lives through the switch."""
    return in_steps(model, random_tokens(2, sum(STEPS)), STEPS, dynamic_cache(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_gives_the_model_back(family):
    model = scaled_model(family, "longrope")
    before, names, settings = logits_of(model), set(model.state_dict()), model.config.to_dict()
    live = live_logits(model)
    rotary, implementation = model.base_model.rotary_emb, model.config._attn_implementation
    apply_raw_key_cache(model, recompute=True)
    assert (live_logits(model) - live).abs().max() > 1e-3
    assert set(model.state_dict()) == names
    remove_raw_key_cache(model)
    assert torch.equal(logits_of(model), before)
    assert torch.equal(live_logits(model), live)
    assert model.base_model.rotary_emb is rotary
    assert model.config._attn_implementation == implementation
    assert model.config.to_dict() == settings
    assert not model.base_model._forward_hooks
    assert not model.base_model._forward_pre_hooks


def test_other_models_of_the_process_keep_their_rotary(monkeypatch):
    # as if no test before had a patched model, which may be alive yet.
    monkeypatch.setattr(families, "_patches", {})
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", inspect.unwrap(modeling_llama.apply_rotary_pos_emb))
    other, model = scaled_model("llama", "dynamic"), scaled_model("llama", "dynamic")
    before, function = live_logits(copy.deepcopy(other)), modeling_llama.apply_rotary_pos_emb
    apply_raw_key_cache(model)
    ours = live_logits(model)
    assert torch.equal(live_logits(copy.deepcopy(other)), before)
    apply_raw_key_cache(other)
    remove_raw_key_cache(model)
    assert torch.equal(live_logits(other), ours)
    remove_raw_key_cache(other)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert torch.equal(live_logits(other), before)


def test_clex_and_raw_key_models_live_side_by_side():
    raw, clex = raw_model(), clex_model("llama")
    expected = live_logits(raw), live_logits(clex)
    for model, logits in zip((raw, clex), expected, strict=True):
        assert torch.equal(live_logits(model), logits)
    remove_raw_key_cache(raw)
    assert torch.equal(live_logits(clex), expected[1])


def test_a_copy_outlives_its_original():
    model = raw_model()
    before, twin, pickled = live_logits(model), copy.deepcopy(model), io.BytesIO()
    torch.save(model, pickled)
    remove_raw_key_cache(model)
    assert (live_logits(model) - before).abs().max() > 1e-3
    assert torch.equal(live_logits(twin), before)
    remove_raw_key_cache(twin)
    pickled.seek(0)
    assert torch.equal(live_logits(torch.load(pickled, weights_only=False)), before)


@pytest.mark.parametrize("family", ["llama", "phi3", "phimoe", "gpt_neox"])
def test_checkpoints_are_those_of_the_model_itself(family, tmp_path):
    pairs = {"llama": 6, "phi3": 6, "phimoe": 6, "gpt_neox": 4}[family]
    parameters = rope_parameters(family, "longrope", pairs) | (
        {"partial_rotary_factor": 0.5} if family == "gpt_neox" else {}
    )
    stock = stock_model(family, rope_parameters=parameters)
    model = copy.deepcopy(stock)
    apply_raw_key_cache(model)
    before = live_logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="sdpa").eval()
    loaded.config._experts_implementation = "eager"
    # products round by where their operands lie in memory.
    torch.testing.assert_close(logits_of(loaded), logits_of(stock), **CLOSE)
    apply_raw_key_cache(loaded)
    torch.testing.assert_close(live_logits(loaded), before, **CLOSE)


def small(config: type, model: type, **sizes: object) -> PreTrainedModel:
    return model(config(vocab_size=61, **sizes))


def gemma3() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return small(Gemma3TextConfig, Gemma3ForCausalLM, head_dim=16, num_key_value_heads=1, **sizes)


def minicpm3() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return small(MiniCPM3Config, MiniCPM3ForCausalLM, num_key_value_heads=2, **sizes, **ranks)


def gpt2() -> PreTrainedModel:
    return small(GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=1, n_head=2)


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return small(OPTConfig, OPTForCausalLM, word_embed_proj_dim=32, **sizes)


def of_parameters(parameters: object) -> PreTrainedModel:
    """A model whose settings were changed once it was there."""
    model = stock_model("llama")
    model.config.rope_parameters = parameters
    return model


def with_settings(**settings: object) -> PreTrainedModel:
    model = stock_model("llama")
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


NESTED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
NO_ROTARY = "model: expected one with rotary embeddings, got"
BAD = {
    "GPT-2": (gpt2, ValueError, NO_ROTARY + " GPT2LMHeadModel"),
    "OPT": (opt, ValueError, NO_ROTARY + " OPTForCausalLM"),
    "Gemma 3": (gemma3, ValueError, "families .*llama.*, got Gemma3ForCausalLM"),
    "MiniCPM3": (minicpm3, ValueError, "families .*llama.*, got MiniCPM3ForCausalLM"),
    "no model": (
        lambda: torch.nn.Linear(2, 2),
        TypeError,
        "model: expected a transformers PreTrainedModel, got Linear",
    ),
    "unknown type": (
        lambda: of_parameters({"rope_type": "proportional", "rope_theta": 1e4}),
        ValueError,
        "rope_parameters: expected one rope_type of default, .*proportional",
    ),
    "clex": (
        lambda: of_parameters({"rope_type": "clex", "max_factor": 4, "rope_theta": 1e4}),
        ValueError,
        "use apply_clex",
    ),
    "nested": (lambda: of_parameters(NESTED), ValueError, "one rope_type .* for all layers, got .*full_attention"),
    "missing": (
        lambda: of_parameters({"rope_type": "linear", "rope_theta": 1e4}),
        ValueError,
        r"rope_parameters\['factor'\]: expected a finite number > 0, got None",
    ),
    "patched": (raw_model, ValueError, "not patched, got one that is; .*remove_raw_key_cache"),
    "patched by apply_clex": (lambda: clex_model("llama"), ValueError, "not patched, got one that is; remove_clex"),
    "flash attention": (
        lambda: with_settings(_attn_implementation_internal="flash_attention_2"),
        ValueError,
        "attn_implementation: expected 'sdpa' or 'eager', got 'flash_attention_2'",
    ),
    "attention weights": (
        lambda: with_settings(_output_attentions=True),
        ValueError,
        "output_attentions: expected False",
    ),
    "partial rotary that a Llama does not know": (
        lambda: of_parameters({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ValueError,
        "rope_parameters: expected a partial_rotary_factor that the model follows, .*6 channels .*rotates 12",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_models_that_do_not_fit_are_named(make: Callable[[], PreTrainedModel], error: type[Exception], message: str):
    model = make()
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    with pytest.raises(error, match=message):
        apply_raw_key_cache(model)
    assert getattr(getattr(model, "model", None), "rotary_emb", None) is rotary


@pytest.mark.parametrize("recompute", ["yes", 1, 0.0])
def test_recompute_is_a_bool(recompute):
    with pytest.raises(TypeError, match="recompute: expected a bool or None, got"):
        apply_raw_key_cache(stock_model("llama"), recompute)


def test_one_patch_at_a_time():
    model = raw_model("dynamic")
    with pytest.raises(ValueError, match="not patched, got one that is; remove_clex or remove_raw_key_cache"):
        apply_clex(model, clex_config(model))
    with pytest.raises(ValueError, match="model: expected one patched by apply_clex"):
        remove_clex(model)
    with pytest.raises(ValueError, match="model: expected one patched by apply_raw_key_cache"):
        remove_raw_key_cache(clex_model("llama"))
    with pytest.raises(ValueError, match="model: expected one patched by apply_raw_key_cache"):
        remove_raw_key_cache(stock_model("llama"))
    remove_raw_key_cache(model)
    apply_clex(model, clex_config(model))
    remove_clex(model)
    apply_raw_key_cache(model)
    assert torch.equal(live_logits(model), live_logits(raw_model("dynamic", None)))


def test_attention_dropout_is_refused_in_training_alone():
    model = with_settings(attention_dropout=0.1)
    apply_raw_key_cache(model)
    logits_of(model)
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 in training, .*got 0.1; load the model with"):
        model.train()(TOKENS)


def test_a_patched_model_may_change_its_dtype():
    model = raw_model("dynamic").float()
    logits = live_logits(model)
    model.double()
    torch.testing.assert_close(live_logits(model), live_logits(raw_model("dynamic")), rtol=0.0, atol=1e-3)
    assert model.base_model.rotary_emb.frequencies.rope.at(torch.tensor([9]), 9).dtype == torch.float64
    model.float()
    assert torch.equal(live_logits(model), logits)


def test_positions_are_those_that_follow_the_cache():
    model = raw_model("default")
    cache = dynamic_cache(model)
    logits_of(model, TOKENS[:, :4], past_key_values=cache)
    for wrong in ([[40]], [[3], [4]]):
        with pytest.raises(ValueError, match=r"position_ids: expected those that follow 4 cached tokens, beginning"):
            model(TOKENS[:, 4:5], position_ids=torch.tensor(wrong), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match=r"beginning with \[4\], got \[40\]"):
        model(TOKENS[:, 4:6], position_ids=torch.tensor([[40, 41]]), past_key_values=copy.deepcopy(cache))
    # after left padding positions count the tokens or the columns.
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for right in ([[3], [4]], [[4], [4]]):
        options = {"attention_mask": mask, "position_ids": torch.tensor(right)}
        model(TOKENS[:, 4:5], past_key_values=copy.deepcopy(cache), **options)


def test_calls_that_do_not_fit_are_named():
    model = raw_model()
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask: expected a 2-D one"):
        model(TOKENS, attention_mask=torch.ones(2, 1, 19, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="position_ids: expected consecutive"):
        model(TOKENS, position_ids=torch.arange(19)[None] % 11)
    with pytest.raises(TypeError, match="cache: expected a transformers Cache"):
        model(TOKENS, past_key_values=[(1, 2)])
    for implementation in ("sdpa", "flash_attention_2"):
        model.config._attn_implementation_internal = implementation
        with pytest.raises(ValueError, match=rf"expected 'clex_kernels', .*got '{implementation}'"):
            model(TOKENS)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_cache_of_rotated_keys_is_refused(recompute):
    stock = scaled_model("llama", "longrope")
    cache = DynamicCache(config=stock.config)
    logits_of(stock, TOKENS[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cache: .*got one that holds keys from elsewhere, which are rotated already"):
        raw_model(recompute=recompute)(TOKENS[:, 6:7], past_key_values=cache)


def test_padding_on_the_right_is_refused_once_it_is_cached():
    model = raw_model()
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 12:] = 0
    cache = DynamicCache(config=model.config)
    logits_of(model, attention_mask=mask, past_key_values=cache)
    mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
    with pytest.raises(ValueError, match="padding on the left of cached tokens only"):
        model(TOKENS[:, :1], attention_mask=mask, past_key_values=cache)


def gradients(model: PreTrainedModel, **options: object) -> dict[str, Tensor]:
    """Of the loss over two rows, one of them padded on the right to the length of the other."""
    tokens, mask = TOKENS[:, :12], torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    model.train()(tokens, attention_mask=mask, labels=labels, **options).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("rope_type", ["default", "dynamic", "yarn", "longrope"])
def test_gradients_are_those_of_stock_transformers(rope_type, checkpointing):
    model = scaled_model("llama", rope_type)
    exact = exact_model(model)
    apply_raw_key_cache(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # every row by its own length: padding has the position of the last token.
    positions = torch.tensor([list(range(12)), [*range(7), *[6] * 5]])
    ours, expected = gradients(model), gradients(exact, position_ids=positions)
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, **CLOSE)
        assert grad.abs().max() > 1e-6


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_models_in_bf16_and_under_autocast(rope_type):
    exact = scaled_model("llama", rope_type)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    mixed = copy.deepcopy(exact).float()
    truth = torch.cat([logits_of(exact_model(exact), TOKENS[:, :end])[:, -1:] for end in (6, 7, 8, 9, 11)], dim=1)
    for each in (model, mixed):
        apply_raw_key_cache(each, recompute=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = in_steps(mixed, TOKENS[:, :11], STEPS, dynamic_cache(mixed))
    for logits in (in_steps(model, TOKENS[:, :11], STEPS, dynamic_cache(model)), under):
        assert (logits[:, [5, 6, 7, 8, 10]] - truth).abs().max() < 0.1 * truth.abs().max()
