import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import DOWN, INV_FREQ, UP, assert_same, golden, read, settings, write
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from clex_kernels.config import ClexConfig
from clex_kernels.integrations.convert import convert, main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, weights, _ = golden()
    return write(tmp_path / "source", config, weights)


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors, sharded", "bin, sharded"])
def test_weights_keep_names_and_bits_and_lose_frequency_buffers(tmp_path, form):
    config, weights, _ = golden()
    rotary = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": weights[INV_FREQ].clone() for n in range(2)}
    convert(write(tmp_path / "source", config, weights | rotary, form), tmp_path / "target")
    del weights[INV_FREQ]
    assert_same(read(tmp_path / "target"), weights)
    files = {file.name for file in (tmp_path / "target").iterdir()} - {"config.json"}
    if "sharded" not in form:
        assert files == {"model.safetensors"}
        return
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
    assert files == {"model.safetensors.index.json", *index["weight_map"].values()}
    assert len(files) == 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "target" / file)


def test_the_configuration_is_what_stock_transformers_reads(source, tmp_path):
    extra = {"auto_map": {"AutoConfig": "configuration_clex.CLEXLlamaConfig"}, "use_flashattn": True}
    (source / "config.json").write_text(json.dumps(settings(source) | extra))
    convert(source, tmp_path / "target")
    written, before = settings(tmp_path / "target"), settings(source)
    assert written.pop("rope_parameters") == {
        "rope_type": "clex",
        "rope_theta": 10000.0,
        "max_factor": 4,
        "param_factor": 1,
        "act": "tanh",
        "time_dt": 0.01,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 1.0,
        "ntk_base": 10000.0,
        "scale_policy": "integer",
        "log_scale": False,
    }
    assert written.pop("max_position_embeddings") == 64
    gone = {"rope_scaling", "rope_theta", "log_scale", "max_position_embeddings", *extra}
    assert written == {key: value for key, value in before.items() if key not in gone}
    loaded = AutoConfig.from_pretrained(tmp_path / "target")
    assert ClexConfig.from_transformers(loaded) == ClexConfig.from_transformers(before)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "clex", "max_factor": 4, "param_factor": 1}}, {"act": "silu"}),
        ({"log_scale": True}, {"log_scale": True}),
        ({"scale_policy": "continuous", "ntk_base": 2e4}, {"scale_policy": "continuous", "ntk_base": 2e4}),
        ({"architectures": ["CLEXLlamaForCausalLM"]}, {}),
        ({"architectures": None}, {}),
    ],
    ids=str,
)
def test_settings_apart_from_the_defaults_are_written_down(source, tmp_path, changes, expected):
    (source / "config.json").write_text(json.dumps(settings(source) | changes))
    convert(source, tmp_path / "target")
    written = settings(tmp_path / "target")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert {name: written["rope_parameters"][name] for name in expected} == expected
    assert ClexConfig.from_transformers(written) == ClexConfig.from_transformers(settings(source))


@pytest.mark.parametrize(("kind", "rope_base", "pairs"), [("llama", 1e4, 8), ("mixtral", 1e6, 8), ("phi", 1e4, 4)])
def test_defaults_of_the_model_type_count(tmp_path, kind, rope_base, pairs):
    config, *_ = golden()
    del config["rope_theta"]
    weights = {UP: torch.ones(pairs, 2 * pairs), DOWN: torch.ones(2 * pairs, pairs)}
    convert(write(tmp_path / "source", config | {"model_type": kind}, weights), tmp_path / "target")
    found = ClexConfig.from_transformers(settings(tmp_path / "target"))
    assert (found.rope_base, found.pairs) == (rope_base, pairs)


@pytest.mark.parametrize("form", ["safetensors", "bin, sharded"])
def test_back_and_forth_is_the_identity(tmp_path, form):
    config, weights, _ = golden()
    convert(write(tmp_path / "source", config, weights, form), tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", to="authors")
    assert settings(tmp_path / "back") == config
    assert_same(read(tmp_path / "back"), weights)
    convert(tmp_path / "back", tmp_path / "again")
    assert settings(tmp_path / "again") == settings(tmp_path / "there")
    assert_same(read(tmp_path / "again"), read(tmp_path / "there"))
    convert(tmp_path / "there", tmp_path / "same")
    assert settings(tmp_path / "same") == settings(tmp_path / "there")


def test_phi_keeps_its_partial_rotary_factor(tmp_path):
    rope = {"type": "clex", "max_factor": 4, "param_factor": 2, "act": "silu", "time_dt": 0.02, "factor": 1}
    config = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_size": 60,
        "num_attention_heads": 3,
        "max_position_embeddings": 32,
        "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0,
        "rope_scaling": rope,
        "log_scale": False,
    }
    generator = torch.Generator().manual_seed(0)
    weights = {UP: torch.randn(4, 16, generator=generator), DOWN: torch.randn(16, 4, generator=generator)}
    convert(write(tmp_path / "source", config, weights), tmp_path / "there")
    assert ClexConfig.from_transformers(AutoConfig.from_pretrained(tmp_path / "there")).rotary_dim == 8
    convert(tmp_path / "there", tmp_path / "back", to="authors")
    assert settings(tmp_path / "back") == config
    back = read(tmp_path / "back")
    assert torch.equal(back.pop(INV_FREQ), 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8))
    assert_same(back, weights)


def test_ode_weights_stay_fp32_beside_a_bf16_model(tmp_path):
    config, weights, _ = golden()
    weights = {name: value if "clex_layer" in name else value.bfloat16() for name, value in weights.items()}
    convert(write(tmp_path / "source", config, weights, "bin"), tmp_path / "target")
    del weights[INV_FREQ]
    assert_same(read(tmp_path / "target"), weights)
    assert read(tmp_path / "target")[UP].dtype == torch.float32


def test_tied_and_strided_tensors_of_a_pickle_become_separate_ones(tmp_path):
    config, weights, _ = golden()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name] = weights[name].t()
    convert(write(tmp_path / "source", config, weights, "bin"), tmp_path / "target")
    del weights[INV_FREQ]
    assert_same(read(tmp_path / "target"), weights)


def test_tokenizers_and_generation_settings_come_along_and_code_does_not(source, tmp_path):
    kept = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "merges.txt")
    kept = (*kept, "vocab.json", "generation_config.json", "LICENSE.txt")
    for name in (*kept, "modeling_llama.py", "tokenizer.py", "README.md", "training_args.bin"):
        (source / name).write_text(name)
    convert(source, tmp_path / "a" / "target")
    files = {file.name: file.read_text() for file in (tmp_path / "a" / "target").glob("*") if file.name in kept}
    assert files == {name: name for name in kept}
    assert len(list((tmp_path / "a" / "target").iterdir())) == len(kept) + 2
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["target"]


def test_the_command_line_converts_or_says_why_not(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.logging.set_verbosity_error", lambda: None)
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / "target"), "--to", "authors"])
    main()
    assert settings(tmp_path / "target") == settings(source)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "target: expected a new or an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["safetensors", "bin, sharded"])
def test_the_converted_model_gives_the_authors_logits(tmp_path, form):
    from clex_kernels.integrations.transformers import apply_clex

    config, weights, arrays = golden()
    convert(write(tmp_path / "source", config, weights, form), tmp_path / "target")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    apply_clex(model)
    for length in (8, 16, 17, 40, 64):
        with torch.no_grad():
            logits = model(arrays["input_ids"][:, :length]).logits
        assert (logits - arrays[f"logits_prefill_{length}"]).abs().max() <= 5e-5, length


@pytest.mark.parametrize(("kind", "pairs"), [("mixtral", 8), ("phi", 4)])
def test_the_authors_other_models_load_completely(tmp_path, kind, pairs):
    from clex_kernels.integrations.transformers import apply_clex

    config, *_ = golden()
    torch.manual_seed(0)
    config |= {"model_type": kind, "num_local_experts": 2}
    plain = {key: value for key, value in config.items() if not key.startswith("rope")}
    before = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**plain))
    before.save_pretrained(tmp_path / "plain")
    ode = {UP: torch.randn(pairs, 2 * pairs), DOWN: torch.randn(2 * pairs, pairs)}
    write(tmp_path / "source", config, read(tmp_path / "plain") | ode)
    convert(tmp_path / "source", tmp_path / "target")
    after, info = AutoModelForCausalLM.from_pretrained(tmp_path / "target", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {"unexpected_keys": {UP, DOWN}}
    assert_same(after.state_dict(), before.state_dict())
    assert torch.equal(apply_clex(after).proj_func.ode_up_proj, ode[UP])


def test_a_model_saved_by_transformers_goes_to_the_authors_form(source, tmp_path):
    from clex_kernels.integrations.transformers import apply_clex

    _, weights, _ = golden()
    convert(source, tmp_path / "there")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    apply_clex(model)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "back", to="authors")
    assert_same(read(tmp_path / "back"), weights)
    back = settings(tmp_path / "back")
    assert back["torch_dtype"] == "float32"
    assert ClexConfig.from_transformers(back) == ClexConfig.from_transformers(settings(source))
