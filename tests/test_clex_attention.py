"""ClexAttention: one layer equals its computation written out, with gradients, in every precision and compiled."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from layers import C, assert_same, inputs, make_layer
from ropes import CONFIG, make_rope, seeded
from tolerance import assert_within_rule
from torch import Tensor, nn
from torch.nn import functional

from clex_kernels import attention_layer, reference
from clex_kernels.modules import ClexAttention
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack

Table = RotaryTable | RotaryTableStack


def written_out(layer: ClexAttention, x: Tensor, table: Table, is_causal: bool = True, **options: Any) -> Tensor:
    """The layer in plain torch, each projection a slice of the packed weight."""
    sizes = [heads * layer.config.head_dim for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)]
    weights = layer.qkv_proj.weight.split(sizes)
    biases = (None, None, None) if layer.qkv_proj.bias is None else layer.qkv_proj.bias.split(sizes)
    q, k, v = (
        functional.linear(x, weight, bias).unflatten(-1, (-1, layer.config.head_dim))
        for weight, bias in zip(weights, biases, strict=True)
    )
    q, k = apply_rotary(q, k, table)
    mask = reference.visible(x.shape[1], x.shape[1], is_causal, options.pop("window", None))
    out, _ = reference.attention(q, k, v, mask, **options)
    return functional.linear(out.flatten(2), layer.o_proj.weight, layer.o_proj.bias)


def gradients(out: Tensor, x: Tensor, *owners: nn.Module) -> dict[str, Tensor]:
    """Of a loss whose gradient differs from element to element, by name."""
    named = {"x": x} | {name: weight for owner in owners for name, weight in owner.named_parameters()}
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rotary_dim", "settings"),
    [
        (4, 2, 16, {}),
        (4, None, 16, {"bias": True}),
        (3, 1, 8, {"bias": True, "out_bias": False}),
        (2, 2, 12, {"out_bias": True}),
    ],
    ids=["H4-G2", "H4-G4-bias", "H3-G1-partial-qkv_bias", "H2-G2-partial-out_bias"],
)
@pytest.mark.parametrize("batch", [None, 2], ids=["one_table", "stack"])
def test_it_is_the_computation_written_out(heads, kv_heads, rotary_dim, settings, batch):
    config = replace(CONFIG, rotary_dim=rotary_dim)
    rope, layer, x = make_rope(config).double().train(), make_layer(config, heads, kv_heads, **settings), inputs(2, 40)
    layer = layer.double()
    assert (layer.qkv_proj.bias is not None) == settings.get("bias", False)
    assert (layer.o_proj.bias is not None) == settings.get("out_bias", settings.get("bias", False))
    outs, found = [], []
    for run in (layer, lambda *arguments: written_out(layer, *arguments)):
        out = run(x, rope.sample(40, batch=batch, generator=seeded(2)))
        outs.append(out)
        found.append(gradients(out, x, layer, rope))
    assert_same(*outs)
    assert outs[0].shape == x.shape
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        assert_same(gradient, found[1][name])


@pytest.mark.parametrize(
    "options",
    [{"is_causal": False}, {"window": 7}, {"softcap": 2.0}, {"scale": 0.5, "backend": "auto"}],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_attention(options):
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(2, 40)
    table = rope(40)
    expected = written_out(layer, x, table, **{name: value for name, value in options.items() if name != "backend"})
    assert_same(layer(x, table, **options), expected)
    assert not torch.allclose(expected, written_out(layer, x, table))


@pytest.mark.parametrize(("log_scale", "least"), [(True, 0.0), ("clamped", 1.0)])
def test_the_log_scale_is_the_configs(log_scale, least):
    config = replace(CONFIG, log_scale=log_scale)
    rope, layer = make_rope(config).double(), make_layer(config).double()
    for length in (16, 90):
        x, table = inputs(2, length), rope(length)
        factor = reference.log_factor(torch.tensor([length]), config)
        assert factor.item() == pytest.approx(max(math.log(length) / math.log(32), least))
        assert_same(layer(x, table), written_out(layer, x, table, query_factor=factor))


@pytest.mark.parametrize("log_scale", [False, True, "clamped"])
def test_every_table_of_a_rope_knows_the_log_scale(log_scale):
    rope = make_rope(replace(CONFIG, log_scale=log_scale))
    stack = rope.stack()
    lengths = torch.tensor([40, 90])
    for table in (rope(40), stack, stack.select(lengths), rope.at(lengths), rope.sample(40), rope.sample(40, batch=2)):
        assert table.train_length == 32
        assert table.log_scale is log_scale


def test_packed_sequences_are_as_each_alone():
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(1, 50)
    table, bounds = rope(64), [0, 20, 21, 50]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = layer(x, table, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    assert packed.shape == (1, 50, C)
    for first, last in pairwise(bounds):
        assert_same(packed[:, first:last], layer(x[:, first:last], table))


def test_attention_gets_views_of_one_rotated_projection(monkeypatch):
    seen = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, table: Table, **options: Any) -> Tensor:
        seen.update(q=q, k=k, v=v, options=options)
        return q

    monkeypatch.setattr(attention_layer, "attention", spy)
    layer, x, rope = make_layer(kv_heads=2), inputs(3, 5, torch.float32), make_rope()
    layer(x, rope(5), window=4)
    assert seen.pop("options") == {"is_causal": True, "window": 4, "rotated": "qk"}
    assert {name: tuple(x.shape) for name, x in seen.items()} == {
        "q": (3, 5, 4, 16),
        "k": (3, 5, 2, 16),
        "v": (3, 5, 2, 16),
    }
    assert len({x.untyped_storage().data_ptr() for x in seen.values()}) == 1
    assert all(x.stride() == (5 * 128, 128, 16, 1) for x in seen.values())
    # lengths choose from the stack, so attention rotates.
    layer(x, rope.stack())
    assert seen.pop("options") == {"is_causal": True}
    # what is saved for the backward pass must not keep the raw q and k.
    assert seen["v"].untyped_storage().nbytes() == 3 * 5 * 2 * 16 * 4
    assert seen["q"].untyped_storage().data_ptr() == seen["k"].untyped_storage().data_ptr()


class Doubled(nn.Linear):
    """What a LoRA or quantized layer is to us: no plain product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(layer: ClexAttention) -> ClexAttention:
    """The layer with the same projection in a module that has to be called."""
    layer.qkv_proj.__class__ = Doubled
    with torch.no_grad():
        layer.qkv_proj.weight /= 2
    return layer


def hooked(layer: ClexAttention) -> ClexAttention:
    """The layer with a hook that undoes what was done to the weight."""
    layer.qkv_proj.register_forward_hook(lambda module, arguments, out: 2 * out)
    with torch.no_grad():
        layer.qkv_proj.weight /= 2
    return layer


@pytest.mark.parametrize("change", [replaced, hooked])
def test_a_projection_that_is_more_than_its_weight_is_called(change):
    rope, layer, x = make_rope().double().train(), make_layer().double(), inputs(2, 40)
    table = rope.sample(40, generator=seeded(2))
    changed = change(copy.deepcopy(layer))
    outs = [module(x, table) for module in (layer, changed)]
    assert_same(*outs)
    (dfreq,), (expected,) = (torch.autograd.grad(out.square().sum(), table.freq, retain_graph=True) for out in outs)
    assert_same(dfreq, expected)
    caches = [torch.zeros(2, 8, 2, 16, dtype=torch.float64) for _ in range(4)]
    steps = [
        module.decode(x[:, :3].detach(), rope.eval()(8), *pair, 3)
        for module, pair in ((layer, caches[:2]), (changed, caches[2:]))
    ]
    assert_same(*steps)
    assert_same(caches[0], caches[2])


def test_a_quantized_weight_goes_through_its_module():
    class Quantized(nn.Parameter):
        pass

    rope, layer, x = make_rope(), make_layer(), inputs(2, 40, torch.float32)
    expected = layer(x, rope(40))
    layer.qkv_proj.weight = Quantized(layer.qkv_proj.weight.detach())
    assert attention_layer._is_plain(make_layer().qkv_proj)
    assert not attention_layer._is_plain(layer.qkv_proj)
    torch.testing.assert_close(layer(x, rope(40)), expected)


@pytest.mark.parametrize("change", ["instance", "global"])
def test_a_forward_or_hook_from_outside_is_honoured(change):
    rope, layer, x = make_rope().double(), make_layer().double(), inputs(2, 40)
    expected = layer(x / 2, rope(40))
    handle = None
    if change == "instance":
        forward = layer.qkv_proj.forward
        layer.qkv_proj.forward = lambda y: forward(y) / 2
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, out: out / 2 if module is layer.qkv_proj else None
        )
    try:
        assert_same(layer(x, rope(40)), expected)
    finally:
        if handle is not None:
            handle.remove()


def test_a_bf16_model_keeps_an_fp32_ode():
    model = nn.ModuleDict({"rope": make_rope(), "layer": make_layer(bias=True)}).to(torch.bfloat16).train()
    rope, layer, x = model["rope"], model["layer"], inputs(2, 40, torch.bfloat16)
    table = rope.sample(40, generator=seeded(2))
    assert table.dtype == torch.float32
    out = layer(x, table)
    exact = RotaryTable.from_frequencies(table.freq.detach(), positions=table.positions, dtype=torch.float64)
    truth = written_out(copy.deepcopy(layer).double(), x.double(), exact)
    assert_within_rule(out, written_out(layer, x, table), truth)
    found = gradients(out, x, layer, rope)
    assert {gradient.dtype for name, gradient in found.items() if "ode" in name} == {torch.float32}
    assert {gradient.dtype for name, gradient in found.items() if "ode" not in name} == {torch.bfloat16}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_autocast_computes_in_bf16_with_fp32_gradients():
    rope, layer, x = make_rope().train(), make_layer(bias=True), inputs(2, 40, torch.float32)
    table = rope.sample(40, generator=seeded(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, table)
    half = copy.deepcopy(layer).bfloat16()
    exact = RotaryTable.from_frequencies(table.freq.detach(), positions=table.positions, dtype=torch.float64)
    truth = written_out(copy.deepcopy(layer).double(), x.double(), exact)
    assert_within_rule(out, written_out(half, x.bfloat16(), table), truth)
    for name, gradient in gradients(out, x, layer, rope).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(("backend", "log_scale"), [("aot_eager", False), ("inductor", "clamped")])
def test_a_training_step_compiles_to_one_graph(backend, log_scale):
    config = replace(CONFIG, log_scale=log_scale)
    rope, layer, x = make_rope(config).double().train(), make_layer(config, bias=True).double(), inputs(2, 40)

    def step(x: Tensor, table: Table) -> Tensor:
        return x + layer(x, table).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (None, 2):
        outs = [run(x, rope.sample(40, batch=batch, generator=seeded(2))) for run in (compiled, step)]
        assert_same(*outs)
        found = [gradients(out, x, layer, rope) for out in outs]
        for name, gradient in found[0].items():
            assert gradient.abs().max() > 0, name
            assert_same(gradient, found[1][name])


def test_weights_are_packed_and_described():
    layer = ClexAttention(replace(CONFIG, rotary_dim=8), C, 4, 2, bias=True, device="meta", dtype=torch.float16)
    assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
        "qkv_proj.weight": (128, C),
        "qkv_proj.bias": (128,),
        "o_proj.weight": (C, 64),
        "o_proj.bias": (C,),
    }
    assert {(weight.device.type, weight.dtype) for weight in layer.parameters()} == {("meta", torch.float16)}
    assert "num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8" in repr(layer)


BAD_SETTINGS = {
    "config": (TypeError, "config: expected a ClexConfig, got dict", ({}, C, 4)),
    "hidden_size": (ValueError, "hidden_size: expected at least 1, got 0", (CONFIG, 0, 4)),
    "num_heads float": (TypeError, "num_heads: expected an integer, got 4.0", (CONFIG, C, 4.0)),
    "num_heads": (ValueError, "num_heads: expected at least 1, got -4", (CONFIG, C, -4)),
    "num_kv_heads zero": (ValueError, "num_kv_heads: expected at least 1, got 0", (CONFIG, C, 4, 0)),
    "num_kv_heads": (ValueError, "num_kv_heads: expected a divisor of num_heads = 4, got 3", (CONFIG, C, 4, 3)),
}


@pytest.mark.parametrize(("error", "match", "settings"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_named(error, match, settings):
    with pytest.raises(error, match=match):
        ClexAttention(*settings)


X = torch.ones(2, 5, C)
TABLE = make_rope()(5)
PARTIAL = make_rope(replace(CONFIG, rotary_dim=8))(5)
BAD_INPUT = {
    "x list": (TypeError, "x: expected a tensor, got list", ([1.0], TABLE), {}),
    "x dims": (ValueError, r"x: expected shape \[B, L, C\] with C = 24, got \[5, 24\]", (X[0], TABLE), {}),
    "x width": (ValueError, r"x: expected shape .*, got \[2, 5, 12\]", (X[..., :12], TABLE), {}),
    "table type": (TypeError, "table: expected a RotaryTable", (X, TABLE.coarse), {}),
    "table rotary_dim": (ValueError, "table: expected rotary_dim = 16, got 8", (X, PARTIAL), {}),
    "return_lse": (ValueError, "return_lse: expected no such option", (X, TABLE), {"return_lse": True}),
    "rotated": (ValueError, "rotated: expected no such option", (X, TABLE), {"rotated": "qk"}),
    "unknown": (TypeError, "causal", (X, TABLE), {"causal": True}),
}


@pytest.mark.parametrize(("error", "match", "arguments", "options"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_named(error, match, arguments, options):
    with pytest.raises(error, match=match):
        make_layer()(*arguments, **options)
