"""Checkpoints that strangers wrote: whatever is in them, a ValueError that names the file, and nothing left over."""

import io
import json
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import DOWN, INV_FREQ, UP, golden, settings, write

from clex_kernels import ClexConfig, ClexRotaryEmbedding
from clex_kernels.integrations import checkpoints
from clex_kernels.integrations.convert import convert

FORMS = ("safetensors", "bin", "safetensors, sharded", "bin, sharded")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    # transformers warns of every configuration that it finds odd.
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def source_in(directory: Path, form: str = "safetensors") -> Path:
    config, weights, _ = golden()
    return write(directory / "source", config, weights, form)


def refusal(directory: Path, source: Path) -> str | None:
    """What convert says against it, or None if it took it; anything but a whole target or none at all fails."""
    target, message = directory / "target", None
    try:
        convert(source, target)
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert str(source) in message, f"no file is named: {message}"
        assert sorted(file.name for file in directory.iterdir()) == [source.name]
        return message
    assert {file.suffix for file in target.iterdir()} <= {".json", ".safetensors"}
    for file in target.iterdir():
        file.unlink()
    target.rmdir()
    return None


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A file cut, with flipped bits, with a stretch repeated, removed or overwritten."""
    at = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 400))))
    size = draw.choice((1, 4, 8, 100))
    match draw.randrange(6):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        case 2:
            return content[:at] + content[at + size :]
        case 3:
            return content[:at] + content[at : at + size] * 2 + content[at + size :]
        case 4:
            return content[:at] + draw.choice((b"\xff", b"\x00", b"9")) * size + content[at + size :]
        case _:
            return content[:at] + draw.randbytes(size) + content[at + size :]


def rounds(directory: Path, form: str, seed: int, count: int) -> int:
    """How many of `count` damaged checkpoints were refused; each has one file that is damaged."""
    draw = random.Random(f"{form} {seed}")
    source = source_in(directory, form)
    files = {file: file.read_bytes() for file in sorted(source.iterdir())}
    refused = 0
    for number in range(count):
        file = draw.choice(list(files))
        file.write_bytes(damaged(draw, files[file]))
        try:
            refused += refusal(directory, source) is not None
        except BaseException as error:
            error.add_note(f"{form}, seed {seed}, number {number}: {file.name}")
            raise
        file.write_bytes(files[file])
    return refused


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_file_gives_a_whole_target_or_a_named_refusal(tmp_path, form):
    # a bit in the middle of a weight is a weight too.
    assert 20 < rounds(tmp_path, form, seed=0, count=80) < 80


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_damaged_files_give_a_whole_target_or_a_named_refusal(tmp_path, form, seed):
    rounds(tmp_path, form, seed, count=1000)


def safetensors_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "header longer than the file": safetensors_file({"a": entry([1], 0, 4)}, b"abcd", length=1 << 62),
    "header length of all ones": b"\xff" * 8 + b"{}",
    "empty header": safetensors_file(b""),
    "no JSON": safetensors_file(b"{'a'"),
    "a list": safetensors_file([1, 2]),
    "deep nesting": safetensors_file(b'{"a":' * 50_000),
    "duplicate names": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"abcdefgh",
    ),
    "overlap": safetensors_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a hole": safetensors_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "past the end": safetensors_file({"a": entry([4], 0, 16)}, bytes(8)),
    "negative offset": safetensors_file({"a": entry([1], -4, 0)}, bytes(4)),
    "backwards": safetensors_file({"a": entry([1], 4, 0)}, bytes(4)),
    "absurd shape": safetensors_file({"a": entry([2**62, 2**62], 0, 4)}, bytes(4)),
    "negative shape": safetensors_file({"a": entry([-1], 0, 4)}, bytes(4)),
    "fraction in shape": safetensors_file({"a": entry([0.5], 0, 4)}, bytes(4)),
    "shape that is not the data's": safetensors_file({"a": entry([3], 0, 4)}, bytes(4)),
    "unknown dtype": safetensors_file({"a": entry([1], 0, 4, "F33")}, bytes(4)),
    "trailing data": safetensors_file({"a": entry([1], 0, 4)}, bytes(400)),
    "ODE of nothing": safetensors_file({UP: entry([0, 16], 0, 0), DOWN: entry([16, 0], 0, 0)}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, case):
    source = source_in(tmp_path)
    (source / "model.safetensors").write_bytes(HEADERS[case])
    assert "model.safetensors" in (refusal(tmp_path, source) or "")


def bin_file(
    content: Any, change: Callable[[str, bytes], bytes] = lambda name, data: data, compressed: int = 0
) -> bytes:
    """A file of torch.save with changed entries."""
    whole, changed = io.BytesIO(), io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(changed, "w", compressed or zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return changed.getvalue()


class Expanded:
    """Pickles as a tensor of a thousand million million numbers in a storage of one."""

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.zeros(1)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**9, 10**6), (0, 0), False, {})


class OutOfBounds:
    """Pickles as a tensor that begins before its storage, or ends behind it."""

    def __init__(self, offset: int, size: int, stride: int):
        self.where = offset, (size,), (stride,)

    def __reduce__(self) -> tuple[Any, ...]:
        offset, size, stride = self.where
        return torch._utils._rebuild_tensor_v2, (torch.zeros(4)._typed_storage(), offset, size, stride, False, {})


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def save(content: Any) -> bytes:
    """torch.save of objects that it would take for tensors no more."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def of_golden(**more: Any) -> dict[str, Any]:
    return golden()[1] | more


BINS: dict[str, Callable[[], bytes]] = {
    "storage cut": lambda: bin_file(of_golden(), lambda name, data: data[:3] if "/data/" in name else data),
    "storage emptied": lambda: bin_file(of_golden(), lambda name, data: b"" if "/data/" in name else data),
    "storage that claims more": lambda: bin_file(
        {"x": torch.zeros(7)}, lambda name, data: data.replace(b"K\x07", b"J\xff\xff\xff\x7f")
    ),
    "pickle cut": lambda: bin_file(of_golden(), lambda name, data: data[:-40] if "pkl" in name else data),
    "compressed": lambda: bin_file({"x": torch.zeros(10**6)}, compressed=zipfile.ZIP_DEFLATED),
    "expanded": lambda: save(of_golden(x=Expanded())),
    "expanded as torch writes it": lambda: save(of_golden(x=torch.zeros(1).expand(10**9, 10**6))),
    "before its storage": lambda: save({"x": OutOfBounds(-1, 2, 1)}),
    "behind its storage": lambda: save({"x": OutOfBounds(3, 2, 1)}),
    "negative size": lambda: save({"x": OutOfBounds(0, -2, 1)}),
    "negative stride": lambda: save({"x": OutOfBounds(3, 2, -1)}),
    "on meta": lambda: save(of_golden(x=torch.zeros(2, device="meta"))),
    "dtype without a name there": lambda: save(of_golden(x=torch.zeros(2, dtype=torch.complex128))),
    "quantized": lambda: save(of_golden(x=torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8))),
    "name of the metadata": lambda: save(of_golden(__metadata__=torch.zeros(2))),
    "name that is no text": lambda: save(of_golden(**{"\ud800": torch.zeros(2)})),
    "code": lambda: save(of_golden(x=Runs(Path.touch, Path("executed")))),
    "code that is allowed elsewhere": lambda: save(of_golden(x=Runs(eval, "open('executed', 'w')"))),
    "code in a bare pickle": lambda: pickle.dumps(Runs(os.system, "touch executed")),
    "code by name": lambda: b"cposix\nsystem\n(S'touch executed'\ntR.",
    "deep nesting": lambda: bin_file({}, lambda name, data: b"\x80\x02" + b"]" * 10**6 if "pkl" in name else data),
    "itself": lambda: bin_file(
        {}, lambda name, data: b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00s." if "pkl" in name else data
    ),
    "not finite": lambda: save(of_golden(**{UP: golden()[1][UP] * torch.inf})),
}


@pytest.mark.parametrize("case", BINS)
def test_a_bin_file_that_lies_is_refused_and_its_code_does_not_run(tmp_path, monkeypatch, case):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    source = source_in(tmp_path, "bin")
    work.rename(source / "work")
    (source / "pytorch_model.bin").write_bytes(BINS[case]())
    assert "pytorch_model.bin" in (refusal(tmp_path, source) or "")
    assert list((source / "work").iterdir()) == []


def test_a_file_full_of_names_for_one_tensor_grows_no_more_than_it_says(tmp_path):
    """Tied weights are written apart, which is what they would take in memory."""
    source = source_in(tmp_path, "bin")
    torch.save(of_golden(**dict.fromkeys(("x", "y"), torch.zeros(5))), source / "pytorch_model.bin")
    assert refusal(tmp_path, source) is None


def replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink(missing_ok=True)
    make(path)


SHARD = "pytorch_model-00002-of-00002.bin"
PLACES: dict[str, Callable[[Path], None]] = {
    "a directory as shard": lambda source: replaced(source / SHARD, Path.mkdir),
    "a link to nothing": lambda source: replaced(source / SHARD, lambda path: path.symlink_to("nowhere")),
    "a link to itself": lambda source: replaced(source / SHARD, lambda path: path.symlink_to(path.name)),
    "a link to a device": lambda source: replaced(source / SHARD, lambda path: path.symlink_to("/dev/zero")),
    "a pipe": lambda source: replaced(source / SHARD, os.mkfifo),
    "a pipe as index": lambda source: replaced(source / "pytorch_model.bin.index.json", os.mkfifo),
    "a pipe as config": lambda source: replaced(source / "config.json", os.mkfifo),
    "a device as config": lambda source: replaced(source / "config.json", lambda path: path.symlink_to("/dev/zero")),
    "a directory as config": lambda source: replaced(source / "config.json", Path.mkdir),
    "a link to another kind of file": lambda source: replaced(
        source / SHARD, lambda path: path.symlink_to("/etc/passwd")
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_no_file_of_weights_is_refused(tmp_path, case):
    source = source_in(tmp_path, "bin, sharded")
    PLACES[case](source)
    assert refusal(tmp_path, source) is not None


@pytest.mark.parametrize(
    "name",
    [
        "../x.bin",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "x" * 5000,
        "nul\0",
        "\ud800",
        None,
        3,
        ["x"],
        {"a": 1},
        "config.json",
    ],
    ids=repr,
)
def test_an_index_names_files_beside_it_only(tmp_path, name):
    source = source_in(tmp_path, "bin, sharded")
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | {"more": name}}))
    assert refusal(tmp_path, source) is not None


WRONG = (
    *(None, True, "", "x", "16", [], [1], {}, {"a": {}}, -1, 0, 1.5, 2**31, 2**63, 10**30, -(10**30)),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-308, "\ud800", "../llama", "clex"),
)


def test_settings_of_any_kind_are_taken_or_refused(tmp_path):
    source = source_in(tmp_path)
    config, refused, draw = settings(source), 0, random.Random(0)
    names = [*config, "rope_parameters", "partial_rotary_factor", "text_config", "quantization_config", "dtype"]
    for _ in range(150):
        changed = json.loads(json.dumps(config))
        within = changed["rope_scaling"] if draw.random() < 0.4 else changed
        within[draw.choice(list(within) if within is not changed else names)] = draw.choice(WRONG)
        (source / "config.json").write_text(json.dumps(changed))
        try:
            refused += refusal(tmp_path, source) is not None
        except BaseException as error:
            error.add_note(json.dumps(changed))
            raise
    assert 50 < refused < 150


@pytest.mark.parametrize(
    "text",
    ["{" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "1" * 10_000, '{"rope_theta": ' + "1" * 5000 + "}", "NaN", "\x00"],
    ids=["open", "deep", "long number", "long setting", "NaN", "zero"],
)
def test_text_that_is_no_configuration_is_refused(tmp_path, text):
    source = source_in(tmp_path)
    (source / "config.json").write_text(text)
    assert "config.json" in (refusal(tmp_path, source) or "")


def test_a_deep_setting_is_written_whole_or_not_at_all(tmp_path):
    source = source_in(tmp_path)
    depth = sys.getrecursionlimit() - 150
    text = json.dumps(settings(source))[:-1] + ', "extra": ' + "[" * depth + "]" * depth + "}"
    (source / "config.json").write_text(text)
    refusal(tmp_path, source)


def ode_of(source: Path) -> ClexRotaryEmbedding:
    """The module that apply_clex would load from a checkpoint."""
    rope = ClexRotaryEmbedding(ClexConfig.from_transformers(settings(source)))
    model = torch.nn.Module()
    model.config = type("Config", (), {"_name_or_path": str(source)})()
    checkpoints.read_ode_weights(model, rope)
    return rope


@pytest.mark.parametrize("case", [*(f"bin: {case}" for case in BINS), *(f"safetensors: {case}" for case in HEADERS)])
def test_loading_into_a_model_refuses_them_too(tmp_path, monkeypatch, case):
    form, _, name = case.partition(": ")
    source = source_in(tmp_path, form)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    next(source.glob(f"*.{form}")).write_bytes(BINS[name]() if form == "bin" else HEADERS[name])
    rope, message = None, str(source)
    # without weights of an ODE it says that they start afresh.
    with warnings.catch_warnings(action="ignore"):
        try:
            rope = ode_of(source)
        except ValueError as error:
            message = str(error)
    assert str(source) in message
    assert list(work.iterdir()) == []
    assert rope is None or all(weight.isfinite().all() for weight in rope.parameters())


@pytest.mark.parametrize("name", ["../pytorch_model.bin", "/etc/passwd", "..", "", "x" * 5000, "gone.bin"])
def test_loading_into_a_model_stays_in_the_directory(tmp_path, name):
    source = source_in(tmp_path, "bin, sharded")
    index = source / "pytorch_model.bin.index.json"
    (source / "pytorch_model-00001-of-00002.bin").rename(tmp_path / "pytorch_model.bin")
    index.write_text(json.dumps({"weight_map": {UP: name, DOWN: name, INV_FREQ: name}}))
    with pytest.raises(ValueError, match=r"index\.json|source"):
        ode_of(source)
