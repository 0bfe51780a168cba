"""CLEX models through files: saved and loaded, from the authors' settings, from plain checkpoints, with adapters."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers_models import CLEX_FAMILIES, TOKENS, TRAIN_LENGTH, clex_config, clex_model, logits_of, stock_model

from clex_kernels import ClexConfig
from clex_kernels.integrations.transformers import apply_clex

pytestmark = pytest.mark.filterwarnings("ignore:.*max_factor.*", "ignore:lengths past.*")


@pytest.mark.parametrize("family", CLEX_FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"], ids=["one file", "shards"])
def test_saved_and_loaded_model_is_the_same(tmp_path, family, max_shard_size):
    model = clex_model(family, activation="silu", hidden_factor=2).float()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rope = apply_clex(loaded)
    assert rope.config == clex_config(model, activation="silu", hidden_factor=2, max_factor=4)
    assert loaded.config.max_position_embeddings == 4 * TRAIN_LENGTH
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    loaded.config._experts_implementation = "eager"
    assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-4)


def test_pickled_checkpoint_is_read(tmp_path):
    model = clex_model("llama").float()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    apply_clex(loaded)
    assert_close(logits_of(loaded.eval()), logits_of(model), rtol=0, atol=1e-5)


def test_config_as_the_authors_write_it(tmp_path):
    scaling = {"type": "clex", "max_factor": 4, "param_factor": 2, "act": "silu", "time_dt": 0.02}
    settings = {"model_type": "llama", "rope_scaling": scaling, "rope_theta": 50000.0, "max_position_embeddings": 8}
    settings |= {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": 61}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    model.config._name_or_path = ""
    config = apply_clex(model).config
    expected = {"head_dim": 12, "train_length": 8, "max_factor": 4, "hidden_factor": 2, "activation": "silu"}
    assert config == ClexConfig(**expected, step_size=0.02, rope_base=50000.0)
    assert ClexConfig.from_transformers(model.config) == config


def test_plain_checkpoint_with_clex_settings_starts_fresh_and_says_so(tmp_path):
    stock_model("llama").float().save_pretrained(tmp_path)
    scaling = {"rope_type": "clex", "max_factor": 4, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, rope_scaling=scaling)
    with pytest.warns(UserWarning, match="no weights of a CLEX ODE"):
        rope = apply_clex(model)
    assert not rope.proj_func.ode_down_proj.any()


def test_changed_settings_keep_the_checkpoints_weights(tmp_path):
    model = clex_model("llama")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    rope = apply_clex(loaded, clex_config(model, scale_policy="continuous"))
    assert torch.equal(rope.proj_func.ode_down_proj, model.model.clex_layer.proj_func.ode_down_proj)
    assert loaded.config.rope_parameters["scale_policy"] == "continuous"


def test_checkpoint_that_is_not_found_is_refused(tmp_path):
    clex_model("llama").save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="model: expected a file of weights where it was loaded from"):
        apply_clex(model)
    model.config._name_or_path = ""
    assert not apply_clex(model).proj_func.ode_down_proj.any()


def test_weights_of_another_size_are_refused(tmp_path):
    clex_model("llama", hidden_factor=2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_parameters"]["param_factor"] = 1
    path.write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ode_up_proj: expected shape \[6, 12\] .* got \[6, 24\]"):
        apply_clex(model)
    assert not hasattr(model.model, "clex_layer")


def test_lora_trains_and_keeps_the_ode_with_its_adapter(tmp_path):
    model = clex_model("llama").float()
    before = logits_of(model)
    base = copy.deepcopy(model)
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["clex_layer"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings)
    tuned.train()
    names = [name for name, weight in tuned.named_parameters() if weight.requires_grad and "clex" in name]
    assert len(names) == 2
    optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-3)
    for seed in range(4):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        tuned(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    after = logits_of(tuned.eval())
    assert (after - before).abs().max() > 1e-4
    moved = dict(tuned.named_parameters())[names[1]]
    assert not torch.equal(moved, base.model.clex_layer.proj_func.ode_down_proj)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close(logits_of(loaded), after, rtol=0, atol=1e-5)
    with tuned.disable_adapter():
        assert_close(logits_of(tuned), before, rtol=0, atol=1e-5)
