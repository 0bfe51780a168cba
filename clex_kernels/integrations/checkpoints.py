"""The ODE's weights in the checkpoint that a model was loaded from; from_pretrained passes over them."""

from pathlib import Path
from warnings import warn

from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from clex_kernels.integrations.checkpoint_files import read_index, read_tensors
from clex_kernels.modules import ClexRotaryEmbedding

# the order in which transformers looks for weights.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# how their names end, whatever the base model is called.
ODE_NAMES = ("clex_layer.proj_func.ode_up_proj", "clex_layer.proj_func.ode_down_proj")


def read_ode_weights(model: PreTrainedModel, rope: ClexRotaryEmbedding) -> None:
    """Load `rope` from the checkpoint `model` came from; a model that came from none keeps fresh weights.

    Warns if the checkpoint has no such weights, which is right for a plain one that training with CLEX starts from.

    Raises:
        ValueError: no file of weights is found, one is malformed, or the ODE's have other shapes than the config says.
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
    for name, value in sorted(found.items(), reverse=True):
        if value.shape != state[name].shape:
            raise ValueError(
                f"{name}: expected shape {list(state[name].shape)} for the config's rotary_dim and hidden_factor, got"
                f" {list(value.shape)} in {source}"
            )
    rope.load_state_dict(found)


def _find(source: str, revision: str | None) -> dict[str, Tensor]:
    """Both weights under their names within the module; {} if a checkpoint has none."""
    path = next((path for name in WEIGHT_FILES if (path := _locate(source, name, revision))), None)
    if path is None:
        raise ValueError(
            f"model: expected a file of weights where it was loaded from, {source!r}, got none of"
            f" {', '.join(WEIGHT_FILES)}."
            ' For a model that was not loaded from there, set model.config._name_or_path = ""; for one from a subfolder'
            " or variant, do that, then model.load_state_dict(..., strict=False) with its clex_layer weights"
        )
    paths = [path]
    if path.suffix == ".json":
        index = dict(sorted(read_index(path).items()))
        shards = {shard: _locate(source, shard, revision) for name, shard in index.items() if name.endswith(ODE_NAMES)}
        missing = [shard for shard, place in shards.items() if place is None]
        if missing:
            raise ValueError(f"{path}: expected the files it names, got no {', '.join(missing)}")
        paths = list(shards.values())
    found = {name: value for path in paths for name, value in _read(path).items()}
    return found if len(found) == len(ODE_NAMES) else {}


def _locate(source: str, name: str, revision: str | None) -> Path | None:
    errors = ("gated_repo", "missing_entries", "connection_errors")
    try:
        quiet = {f"_raise_exceptions_for_{kind}": False for kind in errors}
        path = cached_file(source, name, revision=revision, **quiet)
    except OSError:
        # a directory that is gone is taken for a name on the hub, and not a valid one.
        return None
    return None if path is None else Path(path)


def _read(path: Path) -> dict[str, Tensor]:
    """The ODE's weights in one file, by their names within the module."""
    found = {name.split("clex_layer.")[-1]: value for name, value in read_tensors(path, ODE_NAMES).items()}
    for name, value in found.items():
        if not value.is_floating_point():
            raise ValueError(f"{path}: {name}: expected floating-point numbers, got {value.dtype}")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
    return found
