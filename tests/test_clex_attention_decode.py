"""ClexAttention.decode: its steps are the rows of a prefill, alone and in a batch, compiled, and refused in words."""

from dataclasses import replace

import pytest
import torch
from layers import C, assert_same, inputs, make_layer
from ropes import CONFIG, make_rope
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from clex_kernels.modules import ClexAttention


def make_caches(layer: ClexAttention, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    shape = (batch, slots, layer.num_kv_heads, layer.config.head_dim)
    return tuple(torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_decoding_steps_are_the_rows_of_a_prefill(new, kind):
    rope, layer, x = make_rope().double(), make_layer(bias=True).double(), inputs(2, 45).detach()
    caches = make_caches(layer, 2, 64)
    # the length crosses t = 1, 2 on the way, and the last step's table is that of all its keys.
    for end in range(new, 46, new):
        kv_end = end if kind == "int" else torch.full((2,), end)
        out = layer.decode(x[:, end - new : end], rope(end), *caches, kv_end)
        assert_same(out, layer(x[:, :end], rope(end))[:, -new:])
    heads = layer.qkv_proj(x).unflatten(-1, (-1, 16))
    assert_same(caches[0][:, :45], heads[:, :, 4:6])
    assert_same(caches[1][:, :45], heads[:, :, 6:])


@pytest.mark.parametrize("choice", ["stack", "index", "at"])
def test_sequences_of_a_decoding_batch_are_as_each_alone(choice):
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(3, 70).detach()
    ends, caches = torch.tensor([70, 20, 0]), make_caches(layer, 3, 80)
    for b, end in enumerate(ends.tolist()):
        if end > 1:
            layer.decode(x[b : b + 1, :1], rope(end), *(cache[b : b + 1] for cache in caches), 1)
            heads = layer.qkv_proj(x[b, : end - 1]).unflatten(-1, (-1, 16))
            caches[0][b, : end - 1], caches[1][b, : end - 1] = heads[:, 4:6], heads[:, 6:]
    last = torch.stack([x[b, max(end - 1, 0)] for b, end in enumerate(ends.tolist())])[:, None]
    table = {"stack": rope.stack(), "index": rope.stack().select(ends), "at": rope.at(ends)}[choice]
    out = layer.decode(last, table, *caches, ends)
    for b, end in enumerate(ends.tolist()):
        if end == 0:
            assert_same(out[b], torch.zeros_like(out[b]))
            continue
        alone = rope.at(ends[b : b + 1]) if choice == "at" else rope(end)
        assert_same(out[b : b + 1], layer(x[b : b + 1, :end], alone)[:, -1:])


def test_left_padding_leaves_a_decoding_step_alone():
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(2, 40).detach()
    start, end = torch.tensor([0, 11]), torch.tensor([40, 40])
    caches = make_caches(layer, 2, 40)
    for step in range(1, 41):
        out = layer.decode(
            x[:, step - 1 : step], rope.stack(), *caches, torch.full((2,), step), kv_start=start.clamp(max=step)
        )
    assert_same(out[:1], layer(x[:1], rope(40))[:, -1:])
    assert_same(out[1:], layer(x[1:, 11:], rope(29))[:, -1:])
    assert_same(out, layer(x, rope.stack(), kv_start=start, kv_end=end)[:, -1:])


def test_decoding_steps_compile_once():
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(2, 45).detach()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer.decode, fullgraph=True, backend=counter)
    caches, expected = make_caches(layer, 2, 64), make_caches(layer, 2, 64)
    for end in range(1, 46):
        kv_end = torch.full((2,), end)
        outs = [
            decode(x[:, end - 1 : end], rope.stack(), *into, kv_end)
            for decode, into in ((compiled, caches), (layer.decode, expected))
        ]
        assert_same(*outs)
    assert counter.frame_count == 1


X = torch.ones(2, 5, C)
PARTIAL = make_rope(replace(CONFIG, rotary_dim=8))(5)
BAD_STEP = {
    "kv_end none": (TypeError, "kv_end: expected an integer", {"kv_end": None}),
    "kv_end negative": (ValueError, "kv_end: expected at least 0, got -1", {"kv_end": -1}),
    "kv_end dtype": (TypeError, "kv_end: expected a torch.int32 or torch.int64 tensor", {"kv_end": torch.ones(2)}),
    "kv_end shape": (ValueError, r"kv_end: expected shape \[B=2\]", {"kv_end": torch.ones(2, 1, dtype=torch.int64)}),
    "kv_start": (TypeError, "kv_start: expected a torch.int32 or torch.int64 tensor, got list", {"kv_start": [0, 0]}),
    "tokens": (ValueError, "x: expected L of at most 16 new tokens, got 17", {"x": torch.ones(2, 17, C)}),
    "short table": (ValueError, "table: expected positions for all keys up to kv_end = 65", {"kv_end": 65}),
    "past the cache": (ValueError, r"kv_end: expected .*S", {"kv_end": 9}),
    "x": (ValueError, r"x: expected shape \[B, L, C\]", {"x": X[0]}),
    "rotated": (ValueError, "rotated: expected no such option", {"rotated": "none"}),
    "table": (ValueError, "table: expected rotary_dim = 16, got 8", {"table": PARTIAL}),
}


@pytest.mark.parametrize(("error", "match", "changed"), BAD_STEP.values(), ids=BAD_STEP)
def test_a_bad_decoding_step_is_named(error, match, changed):
    arguments = {"x": X, "table": make_rope()(32), "kv_end": 5, **changed}
    caches = {name: torch.zeros(2, 8, 2, 16) for name in ("k_cache", "v_cache")}
    with pytest.raises(error, match=match):
        make_layer().decode(**arguments, **caches)
    assert not caches["k_cache"].any()
