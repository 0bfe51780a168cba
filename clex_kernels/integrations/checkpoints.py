"""The ODE's weights in the checkpoint that a model was loaded from; from_pretrained passes over them."""

import json
from pathlib import Path
from warnings import warn

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from clex_kernels.modules import ClexRotaryEmbedding

# whole files before parts, and safetensors before pickles, as transformers has it.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ODE_NAMES = ("proj_func.ode_up_proj", "proj_func.ode_down_proj")


def read_ode_weights(model: PreTrainedModel, rope: ClexRotaryEmbedding) -> None:
    """Load `rope` from the checkpoint `model` came from; a model that came from none keeps fresh weights.

    Warns if the checkpoint has no such weights, which is right for a plain one that training with CLEX starts from.

    Raises:
        ValueError: the weights there have other shapes than the config says.
    """
    source = model.config._name_or_path
    if not source:
        return
    found = _find(source, getattr(model.config, "_commit_hash", None))
    if not found:
        warn(
            f"{source}: no weights of a CLEX ODE found, so they start as NTK-aware scaling; train them",
            stacklevel=3,
        )
        return
    state = rope.state_dict()
    for name, value in found.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"{name}: expected shape {list(state[name].shape)} for the config's rotary_dim and hidden_factor, got"
                f" {list(value.shape)} in {source}"
            )
    rope.load_state_dict(found)


def _find(source: str, revision: str | None) -> dict[str, Tensor]:
    """Both weights under their names within the module; {} if a checkpoint has none."""
    path = next((path for name in _FILES if (path := _locate(source, name, revision))), None)
    if path is None:
        return {}
    if path.suffix == ".json":
        shards = json.loads(path.read_text())["weight_map"]
        places = {name: _locate(source, shard, revision) for name, shard in shards.items() if name.endswith(ODE_NAMES)}
    else:
        places = dict.fromkeys(_names(path), path)
    found = {name.split("clex_layer.")[-1]: _read(path, name) for name, path in places.items()}
    return {name: found[name] for name in ODE_NAMES} if set(found) == set(ODE_NAMES) else {}


def _locate(source: str, name: str, revision: str | None) -> Path | None:
    path = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    else:
        names = list(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    return [name for name in names if name.endswith(ODE_NAMES)]


def _read(path: Path, name: str) -> Tensor:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)[name]
