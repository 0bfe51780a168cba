"""The ODE's weights in the checkpoint that a model was loaded from; from_pretrained passes over them."""

import json
from pathlib import Path
from warnings import warn
from zipfile import is_zipfile

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
        ValueError: no file of weights is found, or those of the ODE have other shapes than the config says.
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
        raise ValueError(
            f"model: expected a file of weights where it was loaded from, {source!r}, got none of {', '.join(_FILES)}."
            ' For a model that was not loaded from there, set model.config._name_or_path = ""; for one from a subfolder'
            " or variant, do that, then model.load_state_dict(..., strict=False) with its clex_layer weights"
        )
    if path.suffix == ".json":
        shards = json.loads(path.read_text())["weight_map"]
        places = {name: _locate(source, shard, revision) for name, shard in shards.items() if name.endswith(ODE_NAMES)}
    else:
        places = dict.fromkeys(_names(path), path)
    found = {name.split("clex_layer.")[-1]: _read(path, name) for name, path in places.items()}
    return {name: found[name] for name in ODE_NAMES} if set(found) == set(ODE_NAMES) else {}


def _locate(source: str, name: str, revision: str | None) -> Path | None:
    errors = ("gated_repo", "missing_entries", "connection_errors")
    try:
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in errors}
        path = cached_file(source, name, revision=revision, **quiet)
    except OSError:
        # a directory that is gone is taken for a name on the hub, and not a valid one.
        return None
    return None if path is None else Path(path)


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    else:
        names = list(_unpickle(path))
    return [name for name in names if name.endswith(ODE_NAMES)]


def _read(path: Path, name: str) -> Tensor:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    return _unpickle(path)[name]


def _unpickle(path: Path) -> dict[str, Tensor]:
    # files of torch < 1.6 can't be mapped.
    return torch.load(path, map_location="cpu", mmap=is_zipfile(path), weights_only=True)
