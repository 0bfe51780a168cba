"""Files of checkpoints from anywhere: read without running code of theirs or believing sizes that they claim.

safetensors checks its own headers. A .bin is a zip file of a pickle and of numbers, loaded with weights_only; besides
that, no entry may be compressed (a small file would unpack to any size), and no tensor may have more elements than its
storage (an expanded one would grow to any size when it is written).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

# bytes; indices of the largest models have a few million.
_LARGEST_JSON = 1 << 28
# what safetensors can write.
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e8m0fnu),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError if it holds none."""
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= _LARGEST_JSON):
            # a pipe or a device would never end.
            raise OSError(f"no regular file of at most {_LARGEST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_index(path: Path) -> dict[str, str]:
    """Which file beside it holds a tensor, by the tensor's name; raises ValueError for an index that says otherwise."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f'{path}: expected a "weight_map" from tensors to files, got {type(places).__name__}')
    for name, file in places.items():
        # an index has no business outside of its directory.
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"{path}: {name}: expected the name of a file beside the index, got {file!r}")
    return places


def read_tensors(path: Path, ending: str | tuple[str, ...] = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file whose names end so, mapped into memory but not read.

    Raises ValueError, naming the file, if it is damaged or holds anything but dense tensors.
    """
    is_safe = path.suffix == ".safetensors"
    try:
        tensors = _read_safe(path, ending) if is_safe else _read_pickle(path)
    # a damaged file fails in many ways, and hardly one is documented.
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        kind = "a safetensors file" if is_safe else "a zip file of torch.save with tensors only"
        raise ValueError(f"{path}: expected {kind}, got {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name}: expected a name and a dense tensor, got {type(tensor).__name__}")
    chosen = {name: tensor for name, tensor in tensors.items() if name.endswith(ending)}
    _check_tensors(path, chosen)
    return chosen


def _read_safe(path: Path, ending: str | tuple[str, ...]) -> dict[str, Tensor]:
    if not ending:
        return load_file(path)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names if name.endswith(ending)}


def _read_pickle(path: Path) -> Any:
    # files of torch < 1.6 are none, and can't be mapped.
    is_zip = is_zipfile(path)
    if is_zip:
        with ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != ZIP_STORED]
            beyond = [entry.filename for entry in archive.infolist() if entry.file_size > path.stat().st_size]
        if packed or beyond:
            raise ValueError(f"entries that are compressed or larger than the file: {(packed or beyond)[0]!r}")
    return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.isprintable() or name == "__metadata__":
            raise ValueError(f"{path}: {name!r}: expected the name of a tensor, got that")
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{path}: {name}: expected a dtype that safetensors has, on the CPU, got {got}")
        held = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > held:
            raise ValueError(
                f"{path}: {name}: expected a tensor with memory for all its elements, got {list(tensor.shape)} of"
                f" {tensor.dtype} in {held} bytes"
            )
