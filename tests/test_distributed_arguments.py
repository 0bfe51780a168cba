"""What the distributed functions are given by mistake is refused by name, with and without a process group."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from clex_kernels import ClexAttention, ClexConfig, ClexRotaryEmbedding, RotaryTable
from clex_kernels.distributed import (
    StepGenerator,
    name_projections,
    parallelize_attention,
    replicate_table,
    ring_attention,
    shard_rotary,
    split_append_kv,
    split_decode_attention,
    sum_gradients,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from clex_kernels.integrations.parallel import shard_context, shard_heads

CONFIG = ClexConfig(head_dim=4, train_length=8)


def table() -> RotaryTable:
    return RotaryTable.from_frequencies(torch.tensor([1.0, 0.1], dtype=torch.float64), 64)


def tokens(*names: str) -> dict[str, Any]:
    return {name: torch.ones(1, 4, 2, 4) for name in names}


def rules() -> dict[str, Any]:
    return dict.fromkeys(("kv_start", "lengths", "scale", "window", "softcap"))


# right arguments, made anew for every call.
CALLS: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    ring_attention: lambda: {
        **tokens("q", "k", "v"),
        "table": table(),
        "group": None,
        "is_causal": True,
        **rules(),
        "offset": 0,
    },
    zigzag_shard: lambda: {**tokens("x"), "group": None, "dim": 1},
    zigzag_unshard: lambda: {**tokens("x"), "group": None, "dim": 1},
    zigzag_positions: lambda: {"length": 8, "group": None, "device": None},
    split_decode_attention: lambda: {
        **tokens("q", "k_cache", "v_cache"),
        "table": table(),
        "kv_end": 3,
        "group": None,
        **rules(),
        "return_lse": False,
    },
    split_append_kv: lambda: {**tokens("k", "v", "k_cache", "v_cache"), "kv_end": 3, "group": None},
    sum_gradients: lambda: {**tokens("x"), "group": None},
    shard_rotary: lambda: {"rope": ClexRotaryEmbedding(CONFIG), "mesh": None},
    parallelize_attention: lambda: {"layer": ClexAttention(CONFIG, 8, 2), "mesh": mesh_of_one()},
    name_projections: lambda: {"layer": ClexAttention(CONFIG, 8, 2)},
    replicate_table: lambda: {"table": table(), "mesh": mesh_of_one()},
    StepGenerator: lambda: {"seed": 0, "stream": 0, "step": 0},
    # a model of transformers takes long to make: all else is wrong too.
    shard_heads: lambda: {"model": nn.Linear(2, 2), "mesh": mesh_of_one()},
    shard_context: lambda: {"model": nn.Linear(2, 2), "group": None},
}
WRONG = ("x", b"1", [1], {}, object(), max, nn.Linear(2, 2), 2**64, -(2**64), float("nan"), torch.ones(5, 1, 5, 1, 5))
MODELS = (shard_heads, shard_context)
ids = {"ids": lambda call: call.__name__}


def mesh_of_one() -> DeviceMesh | None:
    return init_device_mesh("cpu", (1,)) if dist.is_initialized() else None


@pytest.fixture
def group_of_one(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def complaints(call: Callable[..., Any], named: Callable[[str, str], bool]) -> list[str]:
    found = []
    for name in CALLS[call]():
        for wrong in WRONG:
            # any tensor is an x, and a window may be of any size.
            if isinstance(wrong, {"x": torch.Tensor, "window": int}.get(name, ())):
                continue
            try:
                call(**CALLS[call]() | {name: wrong})
            except (TypeError, ValueError) as error:
                if not named(name, str(error)):
                    found.append(f"{name}={wrong!r}: {error}")
            # whatever else comes out is a finding.
            except Exception as error:
                found.append(f"{name}={wrong!r}: {type(error).__name__}: {error}")
            else:
                found.append(f"{name}={wrong!r}: taken")
    return found


@pytest.mark.parametrize("call", CALLS, **ids)
def test_a_wrong_argument_is_refused_without_a_group(call):
    assert not dist.is_initialized()
    assert complaints(call, lambda name, text: re.match(r"[a-z_]+: ", text) is not None) == []


@pytest.mark.parametrize("call", CALLS, **ids)
def test_a_wrong_argument_is_refused_by_its_own_name(call, group_of_one):
    if call not in MODELS:
        call(**CALLS[call]())

    def names(name: str, text: str) -> bool:
        # others are compared with q or k, and are not what it is.
        others = {"q": "[kv]", "k": "[kv]|k_cache", "k_cache": "v_cache"}.get(name, name)
        return re.match(f"({name}|{others}|model): " if call in MODELS else f"({name}|{others}): ", text) is not None

    assert complaints(call, names) == []


@pytest.mark.parametrize("call", [call for call in CALLS if "group" in CALLS[call]() and call not in MODELS], **ids)
def test_without_a_group_it_says_so(call):
    with pytest.raises(ValueError, match=r"^group: expected torch\.distributed\.init_process_group"):
        call(**CALLS[call]())


def test_weights_are_not_sharded_without_a_group():
    rope = ClexRotaryEmbedding(CONFIG)
    with pytest.raises(ValueError, match=r"^group: expected torch\.distributed\.init_process_group"):
        shard_rotary(rope)
    assert set(vars(rope)) == set(vars(ClexRotaryEmbedding(CONFIG)))
