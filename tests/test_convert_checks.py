import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import DOWN, INV_FREQ, UP, golden, settings, write
from torch import Tensor

from clex_kernels.integrations.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, weights, _ = golden()
    return write(tmp_path / "source", config, weights)


class Wicked:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (Path("executed"),)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, weights, _ = golden()
    write(tmp_path / "source", config, weights | {"wicked": Wicked()}, "bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: expected a zip file of torch\.save with tensors only"):
        convert("source", "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


CONFIG_ERRORS = {
    "not clex": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'of type "clex"'),
    "no max_factor": ({"rope_scaling": {"type": "clex"}}, "max_factor"),
    "word for a number": ({"rope_scaling": {"type": "clex", "max_factor": "16"}}, "max_factor: expected an integer"),
    "no training length": ({"max_position_embeddings": None}, "max_position_embeddings: expected"),
    "no log_scale": ({"log_scale": None}, "log_scale: expected"),
    "scaled Phi": ({"model_type": "phi", "log_scale": True}, "log_scale: expected false"),
    "unknown model": ({"model_type": "../llama"}, r"model_type: expected .*, got '\.\./llama'"),
    "unhashable model": ({"model_type": ["llama"]}, "model_type: expected"),
    "no list of layers": ({"num_hidden_layers": "two"}, "expected what LlamaConfig takes"),
    "wider ODE": (
        {"rope_scaling": {"type": "clex", "max_factor": 4, "param_factor": 2}},
        r"shape \[32, 8\] for .*param_factor = 2, got .*\[16, 8\]",
    ),
    "fewer heads": ({"num_attention_heads": 2, "head_dim": 32}, r"inv_freq: expected the 16 plain .*, got shape \[8\]"),
    "another base": ({"rope_theta": 1e6}, r"inv_freq: .* rope_theta = 1e\+06, got those of 1e\+04; .* correct"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_a_configuration_that_does_not_fit_is_named(source, tmp_path, case):
    changes, message = CONFIG_ERRORS[case]
    (source / "config.json").write_text(json.dumps(settings(source) | changes))
    with pytest.raises(ValueError, match=rf"source.*{message}"):
        convert(source, tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


WEIGHT_ERRORS = {
    "no up": (without(UP), r"expected one tensor \*clex_layer\.proj_func\.ode_up_proj, got none"),
    "no down": (without(DOWN), r"expected one tensor \*clex_layer\.proj_func\.ode_down_proj, got none"),
    "transposed": (lambda w: w | {UP: w[UP].t().contiguous()}, rf"{UP}: expected .*\[8, 16\].*, got .*\[16, 8\]"),
    "integers": (lambda w: w | {DOWN: w[DOWN].int()}, rf"{DOWN}: expected floating-point .*, got torch.int32"),
    "twice": (lambda w: w | {f"copy.{UP}": w[UP].clone()}, "expected one tensor .*, got .*copy"),
    "NaN frequencies": (lambda w: w | {INV_FREQ: w[INV_FREQ] * torch.nan}, f"{INV_FREQ}: expected"),
}


@pytest.mark.parametrize("form", ["safetensors", "bin, sharded"])
@pytest.mark.parametrize("case", WEIGHT_ERRORS)
def test_ode_weights_that_do_not_fit_are_named(tmp_path, case, form):
    change, message = WEIGHT_ERRORS[case]
    config, weights, _ = golden()
    write(tmp_path / "source", config, change(weights), form)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


INDEX_ERRORS = {
    "no map": (lambda places: None, 'expected a "weight_map"'),
    "no names": (lambda places: dict.fromkeys(places, 3), "expected the name of a file beside the index, got 3"),
    "missing shard": (lambda places: places | {"more": "pytorch_model-00003-of-00003.bin"}, r"no pytorch_model-00003"),
    "missing tensor": (
        lambda places: places | {"more": places[UP]},
        r"-of-00002\.bin: more: expected, since the index",
    ),
    "a way out": (lambda places: places | {"more": "../pytorch_model.bin"}, r"beside the index, got '\.\./pytorch"),
    "parent": (lambda places: places | {"more": ".."}, r"got no \.\."),
}


@pytest.mark.parametrize("case", INDEX_ERRORS)
def test_an_index_that_promises_what_is_not_there_is_named(tmp_path, case):
    change, message = INDEX_ERRORS[case]
    config, weights, _ = golden()
    index = write(tmp_path / "source", config, weights, "bin, sharded") / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_tensor_in_two_shards_is_named(tmp_path):
    config, weights, _ = golden()
    write(tmp_path / "source", config, weights, "bin, sharded")
    torch.save(weights, tmp_path / "source" / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(
        ValueError, match=r"00002\.bin: .*: expected one tensor of that name, got another in .*00001-of"
    ):
        convert(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "expected a JSON file, got JSONDecodeError"),
        ("config.json", b"\xff\xfe", "expected a JSON file, got UnicodeDecodeError"),
        ("config.json", b"[" * 10**5, "expected a JSON file, got RecursionError"),
        ("config.json", b"[]", "expected a JSON object, got list"),
        ("config.json", None, "expected a JSON file, got FileNotFoundError"),
        ("model.safetensors", b"", "expected a safetensors file, got SafetensorError"),
        ("model.safetensors", b"\xff" * 64, "expected a safetensors file, got SafetensorError"),
        ("model.safetensors", None, "expected one of the files .*, got none"),
    ],
)
def test_a_damaged_or_missing_file_is_named(source, tmp_path, name, content, message):
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"source.*{message}"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a zip file of torch.save with tensors only, got"),
        (b"\x80\x02cos\nsystem\n.", "expected a zip file of torch.save with tensors only, got"),
        ([torch.ones(2)], "expected a dictionary of tensors, got list"),
        ({"step": 3}, "step: expected a name and a dense tensor, got int"),
        ({3: torch.ones(2)}, "3: expected a name and a dense tensor"),
        ({"sparse": torch.ones(2, 2).to_sparse()}, "sparse: expected a name and a dense tensor"),
    ],
    ids=["empty", "bare pickle", "list", "number", "numbered", "sparse"],
)
def test_a_bin_file_without_tensors_is_named(tmp_path, content, message):
    config, weights, _ = golden()
    path = write(tmp_path / "source", config, weights, "bin") / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin: {message}"):
        convert(tmp_path / "source", tmp_path / "target")


def test_a_cut_shard_is_named_and_nothing_is_left(tmp_path):
    config, weights, _ = golden()
    shard = write(tmp_path / "source", config, weights, "bin, sharded") / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin: expected"):
        convert(tmp_path / "source", tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("clex_kernels.integrations.convert._write_json", full)
    with pytest.raises(OSError, match="no space left"):
        convert(source, tmp_path / "target")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_target_that_holds_something_is_left_alone(source, tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    with pytest.raises(ValueError, match="target: expected a new or an empty directory"):
        convert(source, target)
    assert target.read_text() == "mine"
    with pytest.raises(ValueError, match="target: expected"):
        convert(source, source)
    target.unlink()
    target.mkdir()
    convert(source, target)
    assert len(list(target.iterdir())) == 2
    with pytest.raises(ValueError, match="target: expected"):
        convert(source, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type: expected 'llama' or 'mixtral' or 'phi'"),
        ({"scale_policy": "continuous"}, "scale_policy: expected 'integer'"),
        ({"ntk_base": 2e4}, "ntk_base: expected 10000.0"),
        ({"log_scale": "clamped"}, "log_scale: expected False or True"),
    ],
    ids=str,
)
def test_what_the_authors_code_does_not_know_is_refused(source, tmp_path, changes, message):
    (source / "config.json").write_text(json.dumps(settings(source) | changes))
    convert(source, tmp_path / "there")
    with pytest.raises(ValueError, match=rf"config\.json: {message}.*, got"):
        convert(tmp_path / "there", tmp_path / "back", to="authors")


def test_an_unknown_form_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="to: expected one of 'transformers', 'authors', got 'gguf'"):
        convert(source, tmp_path / "target", to="gguf")
