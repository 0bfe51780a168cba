"""Calls of what makes tables and trains them: settings, solver, tables, modules, packing, optimizer groups."""

import math
from typing import Any

import torch
from torch import Tensor, nn

import clex_kernels
from clex_kernels import ClexAttention, ClexConfig, ClexRotaryEmbedding, RotaryTable, RotaryTableStack, reference

from . import truths
from .calls_attention import make_table
from .gradients import Derivative
from .judge import Case
from .truths import assert_within, is_plain, slack
from .values import FLOATS, Draw, wild

LENGTHS = (0, 1, 31, 32, 33, 64, 200, 256, 257, 1000)


def config_of(draw: Draw) -> dict[str, Any]:
    head_dim = draw.choice((4, 6, 16, 32))
    return {
        "head_dim": head_dim,
        "train_length": draw.choice((2, 7, 32)),
        "max_factor": draw.choice((1, 2, 8)),
        "rotary_dim": draw.choice((None, 4)),
        "rope_base": draw.choice((10000.0, 500000, 1.5)),
        "ntk_base": draw.choice((10000.0, 2.0)),
        "hidden_factor": draw.choice((1, 2)),
        "activation": draw.choice(("tanh", "silu")),
        "step_size": draw.choice((0.01, 0.3)),
        "scale_policy": draw.choice(("integer", "continuous")),
        "log_scale": draw.choice((False, True, "clamped")),
    }


def huge_config(draw: Draw) -> ClexConfig:
    """As right as any other, but for what it takes to compute with it."""
    sizes = {"head_dim": 2**20, "max_factor": 2**20, "hidden_factor": 2**20, "train_length": 2**33}
    names = draw.sample(list(sizes), 2)
    return ClexConfig(**config_of(draw) | {name: draw.choice((1 << 18, sizes[name])) for name in names})


def config(draw: Draw) -> Case:
    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result == ClexConfig(**before), "not the same twice"
        assert result.pairs >= 2, f"{result.pairs} pairs"

    return Case(ClexConfig, config_of(draw), check)


def length_factor(draw: Draw) -> Case:
    made = ClexConfig(**config_of(draw))

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        t = before["length"] / made.train_length if before["length"] < 10**300 else math.inf
        t = math.ceil(min(t, 1e15)) if made.scale_policy == "integer" else t
        assert result == min(max(t, 1.0), made.max_factor), f"{result}, expected {t}"

    return Case(made.length_factor, {"length": draw.choice(LENGTHS)}, check)


def from_transformers(draw: Draw) -> Case:
    made = ClexConfig(**config_of(draw))
    given = {"head_dim": made.head_dim, "max_position_embeddings": 99, "rope_parameters": made.to_transformers()}
    if draw.maybe(0.7):
        where = given if draw.maybe(0.3) else given["rope_parameters"]
        where[draw.choice(list(where))] = wild(draw)

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert isinstance(result, ClexConfig), f"{result!r}"

    return Case(ClexConfig.from_transformers, {"config": given}, check, how=["a field wild"])


def rope_of(draw: Draw) -> ClexRotaryEmbedding:
    rope = ClexRotaryEmbedding(ClexConfig(**config_of(draw)))
    with torch.no_grad():
        for weight in rope.parameters():
            weight.copy_(0.05 * draw.normal(*weight.shape))
    rope = rope.double() if draw.maybe(0.3) else rope
    return rope.train(draw.maybe(0.3))


def _assert_rows(table: RotaryTable | RotaryTableStack) -> None:
    """That rows are cosines and sines of freq times positions."""
    if table.coarse.is_meta or table.coarse.numel() * table.tile > 2**21:
        return
    freq, positions = table.freq.detach(), table.positions
    freq = freq[None] if isinstance(table, RotaryTable) else freq
    rows = truths.rows_of(table)
    assert rows.isfinite().all(), "rows that are not finite"
    if positions is None:
        positions = torch.arange(float(table.length)).double()
    positions = positions[None] if positions.dim() == 1 else positions
    angle = positions[..., None] * freq[:, None]
    size = table.amplitude[:, None, None] if isinstance(table.amplitude, Tensor) else table.amplitude
    # the product's rounding moves far angles.
    bound = (
        slack(torch.float64)
        + (3e-7 if table.dtype == torch.float32 else 0)
        + 4e-16 * max(angle.abs().flatten().tolist(), default=0)
    )
    for name, part, truth in (("cos", rows.real, angle.cos()), ("sin", rows.imag, angle.sin())):
        assert_within(name, part / size, truth.expand(part.shape), bound)


def _check_table(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
    _assert_rows(result)


def embedding(draw: Draw) -> Case:
    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result.proj_func.ode_down_proj.is_meta or (result.proj_func.ode_down_proj == 0).all(), "down is not 0"

    given = {"config": ClexConfig(**config_of(draw)), "cache_bytes": draw.choice((0, 1 << 20))}
    huge = draw.maybe(0.1)
    if huge:
        given |= {"config": huge_config(draw), "device": "meta"}
    return Case(ClexRotaryEmbedding, given, check, how=["a huge config"] * huge)


def forward(draw: Draw) -> Case:
    rope = rope_of(draw)

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result.t == rope.config.length_factor(before["length"]), f"t = {result.t}"
        assert result.length >= before["length"], f"{result.length} rows"
        _assert_rows(result)

    return Case(rope.forward, {"length": draw.choice(LENGTHS)}, check, costly=("length",))


def stack(draw: Draw) -> Case:
    rope = rope_of(draw)

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result.t.tolist() == list(range(1, rope.config.max_factor + 1)), f"t = {result.t}"
        assert result.length >= (before.get("max_length") or 0), f"{result.length} rows"
        _assert_rows(result)

    return Case(rope.stack, {"max_length": draw.choice((None, *LENGTHS))}, check, costly=("max_length",))


def at(draw: Draw) -> Case:
    rope = rope_of(draw)
    lengths = [draw.choice(LENGTHS) for _ in range(draw.choice((1, 2, 5)))]
    given = {"lengths": draw.integers(lengths), "max_length": draw.choice((None, max(lengths)))}

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        t = (before["lengths"].double() / rope.config.train_length).clamp(1, rope.config.max_factor)
        assert torch.equal(result.t, t), f"t = {result.t}, expected {t}"
        assert result.length >= max(before["lengths"].tolist()), f"{result.length} rows"
        _assert_rows(result)

    return Case(rope.at, given, check, costly=("lengths", "max_length"))


def sample(draw: Draw) -> Case:
    rope = rope_of(draw)
    given = {
        "length": draw.choice((1, 2, 3, 31, 64, 100)),
        "batch": draw.choice((None, 1, 3)),
        "generator": draw.choice((None, torch.Generator())),
        "positions": draw.choice(("uniform", "runs")),
        "factors": draw.choice(("integer", "continuous")),
        "plain_share": draw.choice((0, 0.25, 1.0)),
    }

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        positions, length = result.positions, before["length"]
        assert positions.shape[-1] == length, f"positions {list(positions.shape)}"
        assert positions.dim() == (1 if before.get("batch") is None else 2), f"positions {list(positions.shape)}"
        assert (positions.diff() > 0).all(), "positions that do not grow"
        assert (positions[..., 0] == 0).all(), "a first position other than 0"
        _assert_rows(result)

    return Case(rope.sample, given, check, costly=("length", "batch"))


def table(draw: Draw) -> Case:
    given: dict[str, Any] = {
        "freq": draw.laid_out(draw.normal(draw.choice((1, 2, 9))), unit=False),
        "amplitude": draw.choice((1.0, 1, 0.3)),
        "dtype": draw.choice((torch.float32, torch.float64)),
        "t": draw.choice((1.0, 2, 1.5)),
    }
    if draw.maybe(0.5):
        given["length"] = draw.choice((0, 1, 63, 64, 65, 5000))
    else:
        positions = draw.normal(draw.choice((0, 1, 5))) * draw.choice((1, 1e4, 2.0**31))
        given["positions"] = draw.laid_out(positions if draw.maybe(0.7) else positions.long(), unit=False)
    if draw.maybe(0.3):
        given |= {"train_length": draw.choice((2, 2**53)), "log_scale": draw.choice((False, True, "clamped"))}
    return Case(RotaryTable.from_frequencies, given, _check_table, costly=("length",))


def table_stack(draw: Draw) -> Case:
    factors = draw.choice((1, 2, 5))
    given: dict[str, Any] = {
        "freq": draw.laid_out(draw.normal(factors, draw.choice((1, 2, 9))), unit=False),
        "t": draw.laid_out(torch.arange(1, factors + 1).double(), unit=False),
        "amplitude": draw.choice((1.0, 0.3, draw.laid_out(draw.normal(factors).abs() + 0.1, unit=False))),
        "dtype": draw.choice((torch.float32, torch.float64)),
    }
    if draw.maybe(0.5):
        given["length"] = draw.choice((0, 1, 64, 500))
    else:
        positions = 1e4 * draw.normal(draw.choice((1, factors)), draw.choice((0, 1, 5)))
        given["positions"] = draw.laid_out(positions, unit=False)
    if draw.maybe(0.5):
        given["index"] = draw.laid_out(torch.tensor([draw.randrange(factors) for _ in range(3)]), unit=False)
    return Case(RotaryTableStack.from_frequencies, given, _check_table, costly=("length",))


def select(draw: Draw) -> Case:
    factors, train_length = draw.choice((1, 4)), draw.choice((1, 32))
    made = RotaryTableStack.from_frequencies(
        draw.normal(factors, 2), torch.arange(1, factors + 1).double(), length=64, train_length=train_length
    )

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        truth = [min(max(-(-n // train_length), 1), factors) - 1 for n in before["lengths"].tolist()]
        assert result.index.tolist() == truth, f"{result.index.tolist()}, expected {truth}"

    return Case(
        made.select, {"lengths": draw.integers([draw.choice(LENGTHS) for _ in range(draw.choice((0, 1, 4)))])}, check
    )


def solve_frequencies(draw: Draw) -> Case:
    settings = ClexConfig(**config_of(draw) | {"step_size": 0.05})
    dtype = draw.choice((torch.float32, torch.float64))
    up, down = (0.1 * draw.normal(*shape, dtype=dtype) for shape in _weights(settings))
    times = torch.tensor(sorted(1 + draw.random() * 4 for _ in range(draw.choice((0, 1, 3)))), dtype=torch.float64)
    given = {name: draw.laid_out(x, unit=False, overlaps=False) for name, x in (("up", up), ("down", down))}
    given |= {"times": draw.laid_out(times, unit=False), "config": settings}

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert result.shape == (len(before["times"]), before["config"].pairs), f"freq {list(result.shape)}"
        up, down, times = before["up"].double(), before["down"].double(), before["times"]
        moderate = is_plain(up, down) and len(times) and max(up.abs().max(), down.abs().max()) < 1 and times.max() < 20
        if not result.is_meta:
            assert result.isfinite().all(), "frequencies that are not finite"
            if moderate:
                truth = reference.frequencies(up, down, times, before["config"])
                assert_within("freq", result, truth, 1e-4)

    def is_moderate(given: dict[str, Any]) -> bool:
        large = max(given["up"].abs().max(), given["down"].abs().max())
        return len(given["times"]) > 0 and large < 1 and given["times"].max() < 20

    derivative = Derivative(
        ("up", "down"),
        lambda given: (reference.frequencies(given["up"], given["down"], given["times"], given["config"]),),
        slack=1e-4,
        applies=is_moderate,
    )
    refusals = ("did not converge within",)
    return Case(clex_kernels.solve_frequencies, given, check, refusals=refusals, derivative=derivative)


def _weights(settings: ClexConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    return (settings.pairs, settings.hidden_size), (settings.hidden_size, settings.pairs)


def _projections(draw: Draw) -> nn.Module:
    module, bias, width = nn.Module(), draw.maybe(0.5), draw.choice((1, 3, 8))
    for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        setattr(module, name, nn.Linear(width, rows, bias))
    return module


def pack_qkv(draw: Draw) -> Case:
    module = _projections(draw)
    names = list(module._modules)
    weight = torch.cat([getattr(module, name).weight.detach() for name in names])

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert torch.equal(result.weight, weight), "other rows than the three had"

    return Case(clex_kernels.pack_qkv, {"module": module, "names": tuple(names)}, check)


def unpack_qkv(draw: Draw) -> Case:
    module = _projections(draw)
    packed = clex_kernels.pack_qkv(module)
    rows = packed.weight.detach().split((8, 4, 4))

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        for name, row in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
            assert torch.equal(getattr(module, name).weight, row), f"{name}: other rows than it had"

    return Case(clex_kernels.unpack_qkv, {"module": module}, check)


def param_groups(draw: Draw) -> Case:
    model = nn.ModuleDict({"rope": rope_of(draw), "rest": nn.Linear(2, 2)})
    given = {"model": model, "lr": draw.choice((0, 1e-3))}
    given |= {
        name: draw.choice((0.5, 1))
        for name in ("ode_lr", "weight_decay", "max_norm", "ode_max_norm")
        if draw.maybe(0.3)
    }

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        names = {id(x) for group in result for x in group["params"]}
        assert names == {id(x) for x in before["model"].parameters() if x.requires_grad}, "other parameters"
        torch.optim.AdamW(result)

    return Case(clex_kernels.param_groups, given, check)


def clip_gradients(draw: Draw) -> Case:
    model = nn.ModuleDict({"rope": rope_of(draw), "rest": nn.Linear(2, 2)})
    norm = draw.choice((0.1, 1, math.inf))
    optimizer = torch.optim.SGD(clex_kernels.param_groups(model, lr=1.0, max_norm=norm))
    for weight in model.parameters():
        weight.grad = draw.normal(*weight.shape, dtype=weight.dtype) if draw.maybe(0.8) else None

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        for group in before["optimizer"].param_groups:
            grads = [x.grad.flatten() for x in group["params"] if x.grad is not None]
            assert not grads or torch.cat(grads).norm() <= group["max_norm"] * 1.001, "a longer gradient"

    return Case(clex_kernels.clip_gradients, {"optimizer": optimizer}, check)


def layer(draw: Draw) -> Case:
    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert isinstance(result, ClexAttention), f"{result!r}"

    given = {"config": ClexConfig(**config_of(draw)), "hidden_size": draw.choice((1, 8)), "num_heads": 4}
    given |= {"num_kv_heads": draw.choice((None, 2)), "bias": draw.maybe(0.5), "dtype": draw.choice((None, *FLOATS))}
    return Case(ClexAttention, given, check)


def _layer_of(draw: Draw) -> tuple[ClexAttention, torch.dtype]:
    dtype = draw.choice(FLOATS)
    settings = ClexConfig(head_dim=8, train_length=16, rotary_dim=draw.choice((4, 8)))
    return ClexAttention(settings, 6, 4, draw.choice((2, 4)), bias=draw.maybe(0.5), dtype=dtype), dtype


def _table_for(draw: Draw, made: ClexAttention, dtype: torch.dtype, batch: int, length: int) -> Any:
    while True:
        found = make_table(draw, dtype, made.config.head_dim, batch, length, by_length=True)
        if found.rotary_dim == made.config.rotary_dim:
            return found


def layer_forward(draw: Draw) -> Case:
    made, dtype = _layer_of(draw)
    batch, length = draw.choice((1, 2)), draw.choice((0, 1, 9, 40))
    given = {"x": draw.laid_out(draw.normal(batch, length, 6, dtype=dtype)), "is_causal": draw.maybe(0.7)}
    given["table"] = _table_for(draw, made, dtype, batch, length)

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        x = before["x"]
        assert (result.shape, result.dtype) == (x.shape, x.dtype), f"{result.dtype}{list(result.shape)}"
        if is_plain(x, before["table"]):
            packed = nn.functional.linear(x, made.qkv_proj.weight, made.qkv_proj.bias).unflatten(2, (-1, 8))
            q, k, v = packed.split((made.num_heads, made.num_kv_heads, made.num_kv_heads), dim=2)
            settings = {"table": before["table"], "is_causal": before.get("is_causal", True)}
            out, _ = truths.attention({"q": q, "k": k, "v": v, **settings})
            bias = 0 if made.o_proj.bias is None else made.o_proj.bias.double()
            assert_within("out", result, out.flatten(2) @ made.o_proj.weight.double().mT + bias, 3 * slack(x.dtype))

    return Case(made.forward, given, check)


def layer_decode(draw: Draw) -> Case:
    made, dtype = _layer_of(draw)
    batch, length, slots = draw.choice((1, 2)), draw.choice((0, 1, 3)), draw.choice((3, 40))
    shape = (batch, slots, made.num_kv_heads, made.config.head_dim)
    given: dict[str, Any] = {"x": draw.laid_out(draw.normal(batch, length, 6, dtype=dtype))}
    caches = {name: draw.laid_out(draw.normal(*shape, dtype=dtype), overlaps=False) for name in ("k_cache", "v_cache")}
    given |= {"table": _table_for(draw, made, dtype, batch, slots), **caches}
    given["kv_end"] = draw.choice((slots, draw.integers([draw.randint(0, slots) for _ in range(batch)])))

    def check(before: dict[str, Any], result: Any, after: dict[str, Any]) -> None:
        assert (result.shape, result.dtype) == (before["x"].shape, dtype), f"{result.dtype}{list(result.shape)}"
        if is_plain(before["x"], before["k_cache"], before["v_cache"], before["table"]):
            assert result.isfinite().all(), "numbers that are not finite"

    refusals = ("has no gradients", "inference tensor")
    return Case(made.decode, given, check, ("k_cache", "v_cache"), refusals, writes_early=True)
