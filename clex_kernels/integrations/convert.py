"""Checkpoints of CLEX models, from the authors' form to what stock transformers loads, and back.

    python -m clex_kernels.integrations.convert SOURCE TARGET [--to transformers|authors]

SOURCE is a directory with config.json and weights: safetensors or .bin, whole or in shards with an index. TARGET gets

- config.json. For transformers (>= 5) it holds rope_parameters of type "clex", and max_position_embeddings =
  train_length * max_factor as YaRN models have it; for the authors, rope_scaling of type "clex" and rope_theta, with
  max_position_embeddings = train_length. ClexConfig.from_transformers reads the same settings from either;
- the weights as safetensors in as many shards, names and bits unchanged. Frequency buffers are dropped, since they
  follow from rope_theta; the authors' form gets that of `clex_layer` anew;
- tokenizer, generation settings and licence. No code is copied: models in the authors' form load through their
  package, or with their .py files and auto_map added by hand.

The model loads by AutoModelForCausalLM.from_pretrained(TARGET) and apply_clex(model). apply_clex has to be imported
before, which makes the RoPE type known to transformers.
"""

import argparse
import copy
import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from clex_kernels.config import ClexConfig, one_of
from clex_kernels.integrations.checkpoint_files import read_index, read_json, read_tensors
from clex_kernels.integrations.checkpoints import ODE_NAMES, WEIGHT_FILES
from clex_kernels.weights import are_plain

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
# what moves between forms, and what only the authors' code reads.
_REWRITTEN = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "rotary_pct",
    "original_max_position_embeddings",
    "ntk_base",
    "scale_policy",
    "log_scale",
    "auto_map",
    "use_flashattn",
    "data_length",
)
_CLEX_BUFFER = "clex_layer.inv_freq"
_BUFFERS = (_CLEX_BUFFER, "rotary_emb.inv_freq")
# model types the authors have code for.
_AUTHORS = ("llama", "mixtral", "phi")


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Literal["transformers", "authors"] = "transformers",
) -> None:
    """Write the CLEX checkpoint in directory `source`, of either form, to directory `target` in the form `to`.

    Everything is checked before anything is written, and `target` appears at the end and complete. Tensors are mapped,
    not read, and handled shard by shard. Pickles are loaded with weights_only, so none of their code runs.

    Args:
        source: a directory with config.json and weights.
        target: a new or empty directory; missing parents are made.
        to: "transformers" or "authors".

    Raises:
        ValueError: a file or tensor is missing, malformed or does not fit config.json, the settings cannot be said in
            the form `to`, or `target` holds something.
    """
    source, target = Path(source), Path(target)
    one_of("to", to, ("transformers", "authors"))
    if target.is_symlink() or (any(target.iterdir()) if target.is_dir() else target.exists()):
        raise ValueError(f"target: expected a new or an empty directory, got {target}, which is neither")
    path = source / CONFIG_NAME
    given = read_json(path)
    try:
        model = _stock_config(given)
        config = ClexConfig.from_transformers(model)
        _check_log_scale(given)
        written = (_for_transformers if to == "transformers" else _for_authors)(given, model, config)
        # what can't be written is found before anything is.
        json.dumps(written)
    # of settings that are no numbers, or none that go together.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    shards = _find_shards(source)
    _check_weights(shards, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        # a directory inside: the scratch one is for its owner's eyes only, and would stay so.
        complete = Path(scratch) / "complete"
        complete.mkdir()
        _write_shards(shards, complete, _inv_freq(config) if to == "authors" else None)
        _write_json(complete / CONFIG_NAME, written)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".py" and any(fnmatch(file.name, pattern) for pattern in _COPIED):
                shutil.copyfile(file, complete / file.name)
        # takes the place of an empty directory, and of nothing else.
        complete.replace(target)


def _stock_config(given: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of transformers' own class, which knows the defaults of its model type."""
    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "text_config" in given:
        raise ValueError(f"model_type: expected a text-only causal language model of transformers, got {kind!r}")
    if given.get("max_position_embeddings") is None:
        # else the class's default would pass for the training length.
        raise ValueError("max_position_embeddings: expected in the configuration, got nothing")
    try:
        # a copy, for it changes the dictionaries it is given.
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(given)))
    # its checks raise many types, some of them huggingface_hub's own.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected what {CONFIG_MAPPING[kind].__name__} takes, got {reason}") from error


def _check_log_scale(given: Mapping[str, Any]) -> None:
    """That log_scale in the authors' form means here what it means to them."""
    if not given.get("rope_scaling"):
        return
    kind, value = given["model_type"], given.get("log_scale")
    if kind in ("llama", "mixtral") and value is None:
        raise ValueError(
            "log_scale: expected in the configuration, since the authors' classes take a missing one for true and this"
            " package for false, got nothing"
        )
    if kind == "phi" and value:
        raise ValueError(f"log_scale: expected false, since the authors' Phi never scales its queries, got {value!r}")


def _for_transformers(given: Mapping[str, Any], model: PreTrainedConfig, config: ClexConfig) -> dict[str, Any]:
    # the source's own number, for the share that a rounded rotary_dim has of head_dim may be another.
    rope = config.to_transformers() | _partial_rotary_factor(model)
    written = _common(given) | {
        "max_position_embeddings": config.train_length * config.max_factor,
        "rope_parameters": rope,
    }
    return _checked(written, config)


def _for_authors(given: Mapping[str, Any], model: PreTrainedConfig, config: ClexConfig) -> dict[str, Any]:
    kind = given["model_type"]
    _check_known("model_type", kind, _AUTHORS)
    _check_known("head_dim", config.head_dim, (model.hidden_size // model.num_attention_heads,))
    _check_known("ntk_base", config.ntk_base, (10000.0,))
    _check_known("scale_policy", config.scale_policy, ("integer",))
    _check_known("log_scale", config.log_scale, (False,) if kind == "phi" else (False, True))
    if kind != "phi":
        _check_known("rotary_dim", config.rotary_dim, (config.head_dim,))
    written = _common(given) | {
        "max_position_embeddings": config.train_length,
        "rope_theta": config.rope_base,
        "log_scale": config.log_scale,
        "rope_scaling": {
            "type": "clex",
            "max_factor": config.max_factor,
            "param_factor": config.hidden_factor,
            "act": config.activation,
            "time_dt": config.step_size,
            # their attention reads it and has no use for it.
            "factor": 1,
        },
        **(_partial_rotary_factor(model) if kind == "phi" else {}),
    }
    if "dtype" in written:
        # the name it had in their day.
        written["torch_dtype"] = written.pop("dtype")
    return _checked(written, config)


def _check_known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        choices = " or ".join(map(repr, known))
        raise ValueError(f"{name}: expected {choices}, for the authors' code knows nothing else, got {value!r}")


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    """What both forms share, with a model class of transformers' (the authors' have the same names)."""
    names = given.get("architectures")
    if not isinstance(names, list) or not all(isinstance(name, str) and hasattr(transformers, name) for name in names):
        names = []
    names = names or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[given["model_type"]]]
    return {key: value for key, value in given.items() if key not in _REWRITTEN} | {"architectures": names}


def _partial_rotary_factor(model: PreTrainedConfig) -> dict[str, float]:
    part = model.rope_parameters.get("partial_rotary_factor")
    return {} if part is None else {"partial_rotary_factor": part}


def _checked(written: dict[str, Any], config: ClexConfig) -> dict[str, Any]:
    for reader in (written, _stock_config(written)):
        after = ClexConfig.from_transformers(reader)
        if after != config:
            raise ValueError(f"expected the same settings before and after, got {config} and {after}")
    return written


def _find_shards(source: Path) -> dict[Path, set[str]]:
    """The files with weights, and the names that an index says are in each."""
    path = next((source / name for name in WEIGHT_FILES if (source / name).is_file()), None)
    if path is None:
        raise ValueError(f"{source}: expected one of the files {', '.join(WEIGHT_FILES)}, got none")
    if path.suffix != ".json":
        return {path: set()}
    shards: dict[Path, set[str]] = {}
    for name, file in read_index(path).items():
        shards.setdefault(source / file, set()).add(name)
    # a name may also be too long for a file, which Path.is_file does not take.
    missing = sorted(shard.name for shard in shards if not os.path.isfile(shard))
    if missing:
        raise ValueError(f"{path}: expected the files it names, got no {', '.join(missing)}")
    return dict(sorted(shards.items()))


def _check_weights(shards: Mapping[Path, set[str]], config: ClexConfig) -> None:
    pairs, hidden = config.pairs, config.hidden_size
    shapes = dict(zip(ODE_NAMES, ([pairs, hidden], [hidden, pairs]), strict=True))
    places: dict[str, Path] = {}
    for shard, promised in shards.items():
        tensors = read_tensors(shard)
        for name in sorted(promised - tensors.keys()):
            raise ValueError(f"{shard}: {name}: expected, since the index says so, got no such tensor")
        for name, tensor in sorted(tensors.items()):
            if name in places:
                raise ValueError(f"{shard}: {name}: expected one tensor of that name, got another in {places[name]}")
            places[name] = shard
            shape = next((shape for ending, shape in shapes.items() if name.endswith(ending)), None)
            if shape is not None and (list(tensor.shape) != shape or not tensor.is_floating_point()):
                raise ValueError(
                    f"{shard}: {name}: expected floating-point numbers of shape {shape} for rotary_dim ="
                    f" {config.rotary_dim} and param_factor = {config.hidden_factor}, got {tensor.dtype} of shape"
                    f" {list(tensor.shape)}"
                )
            if shape is not None and not tensor.isfinite().all():
                raise ValueError(f"{shard}: {name}: expected finite numbers, got NaN or infinity")
            if name.endswith(_CLEX_BUFFER) and not are_plain(tensor, config):
                raise ValueError(
                    f"{shard}: {name}: expected the {pairs} plain frequencies of rope_theta = {config.rope_base:g},"
                    f" got {_described(tensor, config)}"
                )
    for ending in ODE_NAMES:
        found = [name for name in places if name.endswith(ending)]
        if len(found) != 1:
            raise ValueError(f"{next(iter(shards)).parent}: expected one tensor *{ending}, got {found or 'none'}")


def _described(inv_freq: Tensor, config: ClexConfig) -> str:
    if list(inv_freq.shape) != [config.pairs]:
        return f"shape {list(inv_freq.shape)}"
    # the last one is base^(-(R - 1) / R).
    base = inv_freq[-1].double() ** (-config.pairs / (config.pairs - 1))
    return (
        f"those of {base.item():.4g}; the authors' code computes with them, whatever config.json says, so rope_theta is"
        " what to correct if the checkpoint is right"
    )


def _inv_freq(config: ClexConfig) -> Tensor:
    """The buffer [R] of the authors' layer, by their arithmetic, so that its bits are theirs."""
    return 1.0 / config.rope_base ** (torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim)


def _write_shards(shards: Mapping[Path, set[str]], directory: Path, inv_freq: Tensor | None) -> None:
    """One output per shard, and an index if there are several. `inv_freq` goes where ode_up_proj is."""
    places: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(tqdm(shards, desc="converting", unit="shard", disable=len(shards) == 1), start=1):
        tensors = {name: value for name, value in read_tensors(shard).items() if not name.endswith(_BUFFERS)}
        up = next((name for name in tensors if name.endswith(ODE_NAMES[0])), None)
        if inv_freq is not None and up is not None:
            tensors[up.removesuffix(ODE_NAMES[0]) + _CLEX_BUFFER] = inv_freq
        file = SAFE_WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(_separate(tensors), directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        _write_json(directory / SAFE_WEIGHTS_INDEX_NAME, index)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors that share no memory, as safetensors wants them; pickles keep tied weights tied."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory of the checkpoint")
    parser.add_argument("target", type=Path, metavar="TARGET", help="new or empty directory for the converted one")
    parser.add_argument("--to", choices=("transformers", "authors"), default="transformers", help="form of TARGET")
    arguments = parser.parse_args()
    # it warns of a RoPE type it can't validate, which ClexConfig does.
    transformers.logging.set_verbosity_error()
    try:
        convert(arguments.source, arguments.target, arguments.to)
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
