"""RotaryTable and RotaryTableStack: pytrees, autograd, compile, selection of a factor, bad input."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from clex_kernels import append_kv, apply_rotary, attention, decode_attention, reference
from clex_kernels.tables import TILE, RotaryTable, RotaryTableStack


def frequencies(pairs: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


FREQ = frequencies(4)


def test_a_stack_holds_the_tables_of_its_frequencies():
    freq = torch.stack((frequencies(8), frequencies(8, 300.0), frequencies(8, 77.0)))
    t = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64)
    positions = torch.rand(3, 9, dtype=torch.float64) * 1e4
    even = RotaryTableStack.from_frequencies(freq, t, length=5000, amplitude=1.1)
    sampled = RotaryTableStack.from_frequencies(freq, t, positions=positions)
    shared = RotaryTableStack.from_frequencies(freq, t, positions=positions[:1])
    assert (even.length, even.tile, even.rotary_dim) == (5056, TILE, 16)
    assert torch.equal(shared.positions, positions[:1].expand(3, 9))
    for i in range(3):
        table = RotaryTable.from_frequencies(freq[i], length=5000, amplitude=1.1)
        assert torch.equal(even.coarse[i], table.coarse)
        assert torch.equal(even.fine[i], table.fine)
        assert torch.equal(sampled.coarse[i], RotaryTable.from_frequencies(freq[i], positions=positions[i]).coarse)
        assert torch.equal(shared.coarse[i], RotaryTable.from_frequencies(freq[i], positions=positions[0]).coarse)


def make_stack(factors: int = 3, **kwargs) -> RotaryTableStack:
    freq = frequencies(4).expand(factors, 4)
    t = torch.arange(1, factors + 1, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(freq, t, length=64, **kwargs)


def test_select_takes_the_factor_of_each_length():
    stack = make_stack(train_length=100)
    lengths = torch.tensor([0, 1, 100, 101, 200, 201, 300])
    assert stack.select(lengths).index.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert stack.select(lengths.int()).index.dtype == torch.int64
    assert stack.index is None


def test_select_past_the_largest_factor_warns_and_stays_there():
    with pytest.warns(UserWarning, match="keep the frequencies of t = 3"):
        assert make_stack(train_length=100).select(torch.tensor([301, 10**6])).index.tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_stack(train_length=100).select(torch.tensor([300]))


def test_tables_carry_frequencies_with_their_gradient_and_nothing_else():
    freq = frequencies(8).requires_grad_()
    table = RotaryTable.from_frequencies(freq, length=100)
    assert table.freq is freq
    assert not table.coarse.requires_grad
    assert not table.fine.requires_grad


def test_tables_built_in_inference_mode_can_be_saved_by_autograd():
    with torch.inference_mode():
        table = RotaryTable.from_frequencies(frequencies(8), length=100)
        stack = RotaryTableStack.from_frequencies(
            frequencies(8)[None],
            torch.ones(1, dtype=torch.float64),
            positions=torch.ones(1, 3, dtype=torch.float64),
            index=torch.zeros(2, dtype=torch.int64),
        )
        chosen = make_stack(train_length=100).select(torch.tensor([1, 101]))
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    for leaf in pytree.tree_leaves((table, stack, chosen)):
        if isinstance(leaf, Tensor):
            (weight * leaf).sum().backward()
    assert weight.grad.isfinite()


AMPLITUDES = torch.tensor([1.3, 0.8, 1.7], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", [{"length": 300}, {"positions": torch.tensor([[0.5, 3.0, 1e5]]).double()}])
def test_each_table_of_a_stack_has_an_amplitude_of_its_own(where, dtype):
    freq, t = torch.stack((frequencies(8), frequencies(8, 300.0), frequencies(8, 77.0))), torch.ones(3).double()
    stack = RotaryTableStack.from_frequencies(freq, t, amplitude=AMPLITUDES, dtype=dtype, **where)
    plain = RotaryTableStack.from_frequencies(freq, t, dtype=torch.float64, **where)
    assert stack.amplitude is AMPLITUDES
    assert stack.coarse.dtype == stack.fine.dtype == dtype
    assert torch.equal(stack.fine, plain.fine.to(dtype))
    for table, amplitude in enumerate(AMPLITUDES.tolist()):
        error = (stack.coarse[table] - amplitude * plain.coarse[table]).abs().max()
        assert error <= amplitude * torch.finfo(dtype).eps


def rotated(x: Tensor, stack: RotaryTableStack, first: int, plain: Tensor) -> Tensor:
    """x [B, L, H, D] by the reference, from position `first`, of sequences that stand at tables 2, 0 and 1."""
    rows = []
    for row, table in zip(x, stack.index.tolist(), strict=True):
        positions = first + torch.arange(x.shape[1])
        rows.append(reference.rotary(row[None], *reference.tables(plain[table], positions, AMPLITUDES[table])))
    return torch.cat(rows)


def test_rotary_attention_and_decoding_take_each_sequences_amplitude():
    # D = 20 of which 16 are rotated, so that an amplitude is no scale of the logits.
    generator = torch.Generator().manual_seed(0)
    freq = torch.stack((frequencies(8), frequencies(8, 300.0), frequencies(8, 77.0))).requires_grad_()
    stack = RotaryTableStack.from_frequencies(
        freq,
        torch.ones(3).double(),
        length=128,
        amplitude=AMPLITUDES,
        index=torch.tensor([2, 0, 1]),
        dtype=torch.float64,
    )
    q, k, v = (torch.randn(3, 70, heads, 20, generator=generator).double() for heads in (4, 2, 2))
    truth_q, truth_k = (rotated(x, stack, 0, freq) for x in (q, k))
    for ours, truth in zip(apply_rotary(q, k, stack), (truth_q, truth_k), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    expected, _ = reference.attention(truth_q, truth_k, v, reference.visible(70, 70, is_causal=True))
    out = attention(q, k, v, stack, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(x.square().sum(), freq, retain_graph=True)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    caches = torch.zeros(3, 80, 2, 20).double(), torch.zeros(3, 80, 2, 20).double()
    end = torch.full((3,), 70)
    append_kv(k, v, *caches, end)
    with torch.no_grad():
        step = decode_attention(q[:, -2:], *caches, stack, end)
    torch.testing.assert_close(step, expected[:, -2:], rtol=0, atol=1e-12)


def test_pytree_round_trip_keeps_every_field():
    table = RotaryTable.from_frequencies(frequencies(4), length=70, amplitude=1.5, t=2.5)
    sampled = RotaryTable.from_frequencies(frequencies(4), positions=torch.ones(3, dtype=torch.float64))
    stack = make_stack(train_length=100, index=torch.tensor([2, 0]))
    scaled = [make_scaled(kind, log_scale) for kind in (RotaryTable, RotaryTableStack) for log_scale in LOG_SCALES]
    amplified = make_stack(amplitude=AMPLITUDES)
    for item in (table, sampled, stack, amplified, *scaled):
        leaves, spec = pytree.tree_flatten({"x": item})
        back = pytree.tree_unflatten(leaves, spec)["x"]
        assert type(back) is type(item)
        for name, value in vars(item).items():
            assert getattr(back, name) is value
    doubled = pytree.tree_map_only(Tensor, lambda x: 2 * x, table)
    assert torch.equal(doubled.coarse, 2 * table.coarse)
    assert doubled.t == 2.5


LOG_SCALES = [False, True, "clamped"]


def make_scaled(
    kind: type[RotaryTable] | type[RotaryTableStack], log_scale: bool | str, train_length: int = 100
) -> RotaryTable | RotaryTableStack:
    if kind is RotaryTableStack:
        return make_stack(1, train_length=train_length, log_scale=log_scale)
    return RotaryTable.from_frequencies(FREQ, length=64, train_length=train_length, log_scale=log_scale)


def scaled_step(x: Tensor, table: RotaryTable | RotaryTableStack, lengths: Tensor) -> Tensor:
    """What attention reads of a table."""
    factor = lengths.double() if table.log_scale else torch.ones_like(lengths)
    if table.log_scale:
        factor = factor.log() / math.log(table.train_length)
    if table.log_scale == "clamped":
        factor = factor.clamp(min=1.0)
    return x * table.coarse[..., -1, 0, :].view(1, -1) * factor[:, None]


class ScaledStep(nn.Module):
    def forward(self, x: Tensor, table: RotaryTable | RotaryTableStack, lengths: Tensor) -> Tensor:
        return scaled_step(x, table, lengths)


@pytest.mark.parametrize("kind", [RotaryTable, RotaryTableStack], ids=["table", "stack"])
@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_the_log_scale_goes_wherever_a_table_goes(kind, log_scale):
    table, x, lengths = make_scaled(kind, log_scale), torch.randn(2, 4), torch.tensor([30, 700])
    exported = torch.export.export(ScaledStep(), (x, table, lengths)).module()
    traced = make_fx(scaled_step, tracing_mode="fake")(x, table, lengths)
    for way in (exported, traced):
        torch.testing.assert_close(way(x, table, lengths), scaled_step(x, table, lengths))
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, (x, table, lengths))
        assert scaled_step(*fake).shape == (2, 4)
    for other in (copy.deepcopy(table), replace(table, amplitude=2.0), fake[1]):
        assert other.log_scale is log_scale
        assert other.train_length == 100
    spec = pytree.tree_structure(table)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize("kind", [RotaryTable, RotaryTableStack], ids=["table", "stack"])
def test_a_step_compiles_once_per_log_scale(kind):
    x, lengths = torch.randn(2, 4), torch.tensor([30, 700])
    tables = [make_scaled(kind, log_scale) for log_scale in 2 * LOG_SCALES]
    assert compiled_graphs(scaled_step, [(x, table, lengths) for table in tables]) == 3


def test_tables_can_be_copied():
    table = copy.deepcopy(RotaryTable.from_frequencies(frequencies(4), length=70, t=2.0))
    assert torch.equal(table.coarse, RotaryTable.from_frequencies(frequencies(4), length=70).coarse)
    assert table.t == 2.0


BAD_TABLES = {
    "freq list": (TypeError, "freq: expected a tensor", {"freq": [1.0], "length": 4}),
    "freq fp32": (TypeError, "freq: expected torch.float64.*got torch.float32", {"freq": FREQ.float(), "length": 4}),
    "freq shape": (ValueError, r"freq: expected shape \[R\]", {"freq": FREQ[None], "length": 4}),
    "freq empty": (ValueError, r"freq: expected shape \[R\]", {"freq": FREQ[:0], "length": 4}),
    "neither": (ValueError, "length, positions: expected exactly one", {}),
    "both": (ValueError, "length, positions: expected exactly one", {"length": 1, "positions": FREQ}),
    "freq nan": (ValueError, "freq: expected finite", {"freq": FREQ * math.nan, "length": 4}),
    "freq inf": (ValueError, "freq: expected finite", {"freq": FREQ + math.inf, "length": 4}),
    "negative length": (ValueError, "length: expected 0 to .*, got -1", {"length": -1}),
    "length past fp64": (ValueError, "length: expected 0 to .*, got 9223372036854775807", {"length": 2**63 - 1}),
    "float length": (TypeError, "length: expected an int, got float", {"length": 4.0}),
    "bool length": (TypeError, "length: expected an int, got bool", {"length": True}),
    "positions list": (TypeError, "positions: expected a tensor", {"positions": [1.0]}),
    "positions fp32": (TypeError, "positions: expected torch.float64.*got torch.float32", {"positions": FREQ.float()}),
    "positions shape": (ValueError, r"positions: expected shape \[L\], got \[1, 4\]", {"positions": FREQ[None]}),
    "positions device": (ValueError, "positions: expected on cpu", {"positions": FREQ.to("meta")}),
    "positions nan": (ValueError, "positions: expected finite", {"positions": FREQ * math.nan}),
    "positions inf": (ValueError, "positions: expected finite", {"positions": FREQ + math.inf}),
    "amplitude zero": (ValueError, "amplitude: expected a finite number > 0", {"length": 4, "amplitude": 0.0}),
    "amplitude nan": (ValueError, "amplitude: expected a finite number > 0", {"length": 4, "amplitude": math.nan}),
    "amplitude text": (TypeError, "amplitude: expected a number, got str", {"length": 4, "amplitude": "1"}),
    "amplitude past fp32": (ValueError, "amplitude: expected .* of torch.float32", {"length": 4, "amplitude": 1e300}),
    "dtype": (TypeError, "dtype: expected torch.float32 or", {"length": 4, "dtype": torch.bfloat16}),
    "t": (ValueError, "t: expected a finite number >= 1, got 0.5", {"length": 4, "t": 0.5}),
    "t none": (TypeError, "t: expected a number, got NoneType", {"length": 4, "t": None}),
    "train_length": (ValueError, "train_length: expected 1 to .*, got 0", {"length": 4, "train_length": 0}),
    "log_scale text": (ValueError, "log_scale: expected one of .*, got 'on'", {"length": 4, "log_scale": "on"}),
    "log_scale int": (ValueError, "log_scale: expected one of False, True, 'clamped', got 1", {"log_scale": 1}),
    "log_scale alone": (ValueError, "log_scale: expected a train_length > 1.*got None", {"log_scale": True}),
    "log_scale of 1": (ValueError, "log_scale: expected.*got 1", {"log_scale": "clamped", "train_length": 1}),
    "t nan": (ValueError, "t: expected a finite number >= 1", {"length": 4, "t": math.nan}),
}


@pytest.mark.parametrize(("error", "match", "kwargs"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table_input_is_named(error: type[Exception], match: str, kwargs: dict):
    with pytest.raises(error, match=match):
        RotaryTable.from_frequencies(**{"freq": FREQ, **kwargs})


T2 = torch.tensor([1.0, 2.0], dtype=torch.float64)
BAD_STACKS = {
    "freq shape": (ValueError, r"freq: expected shape \[T, R\]", {"freq": FREQ}),
    "t dtype": (TypeError, "t: expected a torch.float64 tensor, got torch.float32", {"t": T2.float()}),
    "t float": (TypeError, "t: expected a torch.float64 tensor, got float", {"t": 1.0}),
    "t shape": (ValueError, r"t: expected shape \[T\] = \[2\]", {"t": T2[:1]}),
    "t below 1": (ValueError, "t: expected finite numbers >= 1", {"t": T2 - 0.5}),
    "positions rows": (
        ValueError,
        r"positions: expected shape \[T, L\]",
        {"length": None, "positions": FREQ.expand(3, 4)},
    ),
    "positions dim": (ValueError, r"positions: expected shape \[T, L\]", {"length": None, "positions": FREQ}),
    "index dtype": (TypeError, "index: expected torch.int64", {"index": torch.tensor([0.0])}),
    "index shape": (ValueError, r"index: expected shape \[B\]", {"index": torch.tensor(0)}),
    "index range": (ValueError, r"index: expected in \[0, T\) = \[0, 2\), got 0 to 2", {"index": torch.tensor([0, 2])}),
    "index negative": (ValueError, "index: expected in", {"index": torch.tensor([-1])}),
    "index list": (TypeError, "index: expected torch.int64, got list", {"index": [0, 1]}),
    "train_length": (ValueError, "train_length: expected 1 to .*, got 0", {"train_length": 0}),
    "train_length large": (ValueError, "train_length: expected 1 to", {"train_length": 2**63}),
    "log_scale": (ValueError, "log_scale: expected one of", {"log_scale": None}),
    "log_scale alone": (ValueError, "log_scale: expected a train_length > 1.*got None", {"log_scale": "clamped"}),
    "train_length float": (TypeError, "train_length: expected an int, got float", {"train_length": 1.5}),
    "amplitude dtype": (TypeError, "amplitude: expected a number or .*, got torch.float32", {"amplitude": T2.float()}),
    "amplitude int": (TypeError, "amplitude: expected a number or .*, got torch.int64", {"amplitude": T2.long()}),
    "amplitude list": (TypeError, "amplitude: expected a number, got list", {"amplitude": [1.0, 2.0]}),
    "amplitude shape": (ValueError, r"amplitude: expected shape \[T\] = \[2\] on cpu", {"amplitude": T2[:1]}),
    "amplitude number": (ValueError, r"amplitude: expected shape \[T\] = \[2\].*got \[\]", {"amplitude": T2[0]}),
    "amplitude device": (ValueError, "amplitude: expected .* on cpu, got .* on meta", {"amplitude": T2.to("meta")}),
    "amplitude zero": (ValueError, "amplitude: expected a finite number > 0 .*, got 0.0", {"amplitude": T2 - 1}),
    "amplitude negative": (ValueError, "amplitude: expected a finite number > 0", {"amplitude": -T2}),
    "amplitude nan": (ValueError, "amplitude: expected .*, got nan", {"amplitude": T2 * math.nan}),
    "amplitude inf": (ValueError, "amplitude: expected .*, got inf", {"amplitude": T2 / 0}),
    "amplitude past fp32": (ValueError, "amplitude: expected .* of torch.float32", {"amplitude": T2 * 1e300}),
}


@pytest.mark.parametrize(("error", "match", "kwargs"), BAD_STACKS.values(), ids=BAD_STACKS)
def test_bad_stack_input_is_named(error: type[Exception], match: str, kwargs: dict):
    with pytest.raises(error, match=match):
        RotaryTableStack.from_frequencies(**{"freq": FREQ.expand(2, 4), "t": T2, "length": 4, **kwargs})


@pytest.mark.filterwarnings("ignore:lengths past")
def test_the_longest_length_there_is_keeps_the_last_table():
    lengths = torch.tensor([0, 1, 100, 101, 2**63 - 1])
    assert make_stack(train_length=100).select(lengths).index.tolist() == [0, 0, 0, 1, 2]


def test_bad_lengths_are_named():
    with pytest.raises(ValueError, match="train_length: expected from"):
        make_stack().select(torch.tensor([3]))
    stack = make_stack(train_length=100)
    with pytest.raises(TypeError, match="lengths: expected torch"):
        stack.select(torch.tensor([3.0]))
    with pytest.raises(TypeError, match=r"lengths: expected torch.*got list"):
        stack.select([3])
    with pytest.raises(ValueError, match=r"lengths: expected shape \[B\]"):
        stack.select(torch.tensor([[3]]))
    with pytest.raises(ValueError, match="lengths: expected >= 0, got -3"):
        stack.select(torch.tensor([5, -3]))
    with pytest.raises(ValueError, match="index: expected None"):
        make_stack(train_length=100, index=torch.tensor([1])).select(torch.tensor([3]))


@pytest.mark.parametrize(
    "positions", [None, torch.rand(2, 7, dtype=torch.float64), torch.rand(1, 7, dtype=torch.float64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(positions: Tensor | None, dtype: torch.dtype):
    freq = torch.stack((frequencies(6), frequencies(6, 500.0)))
    torch.library.opcheck(torch.ops.clex.tables.default, (freq, 130, positions, 1.5, dtype))


def compiled_graphs(step, inputs) -> int:
    """How many graphs a compiled step needs for these inputs, its results checked against eager ones."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for args in inputs:
        torch.testing.assert_close(compiled(*args), step(*args))
    return counters["stats"]["unique_graphs"]


def test_a_step_over_32_tables_compiles_at_most_twice():
    def step(x: Tensor, table: RotaryTable) -> Tensor:
        return x * table.coarse[-1, 0] * table.amplitude + table.fine[-1, 1] * table.t

    x = torch.randn(4)
    grown = [
        (x, RotaryTable.from_frequencies(FREQ, length=128 + 64 * i, t=1 + i / 7, amplitude=1 + i / 9))
        for i in range(32)
    ]
    sampled = [
        (x, RotaryTable.from_frequencies(FREQ, positions=torch.rand(10 + i, dtype=torch.float64), t=1 + i / 7))
        for i in range(32)
    ]
    assert compiled_graphs(step, grown) <= 2
    assert compiled_graphs(step, sampled) <= 2


def test_a_step_that_selects_from_32_stacks_compiles_at_most_twice():
    def step(x: Tensor, stack: RotaryTableStack, lengths: Tensor) -> Tensor:
        chosen = stack.select(lengths)
        return x * chosen.coarse[chosen.index, -1, 0] + chosen.t[chosen.index, None]

    freq, t = FREQ.expand(3, 4), torch.arange(1, 4, dtype=torch.float64)
    lengths = torch.tensor([1, 150, 300])
    stacks = (RotaryTableStack.from_frequencies(freq, t, length=128 + 64 * i, train_length=100) for i in range(32))
    assert compiled_graphs(step, [(torch.randn(3, 4), stack, lengths) for stack in stacks]) <= 2


def test_tables_can_be_built_inside_a_compiled_step():
    def step(freq: Tensor, positions: Tensor, t: float) -> Tensor:
        table = RotaryTable.from_frequencies(freq, positions=positions, t=t)
        return table.coarse[:, 0] * freq + table.t

    freq = FREQ.clone().requires_grad_()
    assert compiled_graphs(step, [(freq, torch.rand(9 + i, dtype=torch.float64), 1 + i / 7) for i in range(8)]) <= 2
