"""A tiny CLEX checkpoint by the authors, on disk in every form there is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "llama_gqa.npz"
UP, DOWN = "model.clex_layer.proj_func.ode_up_proj", "model.clex_layer.proj_func.ode_down_proj"
INV_FREQ = "model.clex_layer.inv_freq"


def golden() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """config.json as the authors write it, weights and the other arrays."""
    with np.load(GOLDEN) as file:
        spec = json.loads(str(file["spec"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "spec"}
    weights = {name[2:]: arrays.pop(name) for name in list(arrays) if name.startswith("w:")}
    # their code never reads it from the configuration.
    del spec["kind"], spec["ntk_base"]
    config = spec | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": spec.pop("train_length"),
        "torch_dtype": "float32",
    }
    return config, weights, arrays


def write(directory: Path, config: dict[str, Any], weights: dict[str, Tensor], form: str = "safetensors") -> Path:
    """A checkpoint: "safetensors", "bin", or either with ", sharded" for two shards and an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    kind, _, sharded = form.partition(", ")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    save = save_file if kind == "safetensors" else torch.save
    if not sharded:
        save(weights, directory / f"{stem}.{kind}")
        return directory
    names = sorted(weights)
    places = {name: f"{stem}-0000{1 + (n % 3 == 0)}-of-00002.{kind}" for n, name in enumerate(names)}
    for file in set(places.values()):
        save({name: weights[name] for name in names if places[name] == file}, directory / file)
    (directory / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def settings(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
