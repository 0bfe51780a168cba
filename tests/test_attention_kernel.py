"""The Triton kernels of attention, by way of their operators' functions, against autograd through the reference."""

import math
from functools import partial
from typing import Any

import attention_cases
import pytest
import torch
from attention_cases import CASES, Case, Inputs, assert_close, expected, make_inputs, rounded
from torch import Tensor
from torch.utils._pytree import tree_map_only

pytest.importorskip("triton")

from clex_kernels.attention import _attention_bwd_cuda, _attention_cuda
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels import attention_bwd, attention_fwd, attention_launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def forward(
    q: Tensor, k: Tensor, v: Tensor, tables: Tables, tokens: Tokens, rule: Rule, *rest: bool
) -> tuple[Tensor, ...]:
    return _attention_cuda(q, k, v, q, *tables, *tokens, *rule, *rest)


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, (tables, tokens, rule), rest = arguments[:7], arguments[7:10], arguments[10:]
    return _attention_bwd_cuda(*tensors, *tables, *tokens, *rule, *rest)


# beyond the CPU's cases, what tiles make special; a tile has up to 128 queries and keys.
TILED = {
    "several tiles of both": Case(b=1, queries=290, keys=290, h=2, g=1, rule={"is_causal": True}),
    "several tiles in a window": Case(b=1, queries=290, keys=290, h=2, g=1, rule={"window": 70}),
    "more keys than queries": Case(b=1, queries=70, keys=400, h=2, g=1, rule={"is_causal": True}),
    "a packed sequence over several tiles": Case(
        queries=420,
        keys=420,
        h=2,
        tokens={"cu_seqlens_q": [0, 3, 3, 260, 261, 400], "cu_seqlens_k": [0, 3, 3, 260, 261, 400]},
        rule={"window": 90},
    ),
    "D 96, all of it rotated": Case(b=1, queries=40, keys=40, d=96, r=48, rule={"is_causal": True}),
    "D 96, NeoX-20B": Case(b=1, queries=40, keys=40, d=96, r=12, rule={"is_causal": True}),
    "D 128": Case(b=1, queries=140, keys=140, d=128, r=64, rule={"is_causal": True}),
    "D 256": Case(b=1, queries=70, keys=70, h=2, g=1, d=256, r=128, rule={"is_causal": True}),
    "D 20, odd R, softcap": Case(b=1, d=20, r=7, rule={"is_causal": True, "softcap": 2.0}),
}
ALL = CASES | TILED
FEW = ["several tiles of both", "packed with windows", "softcap over padding", "tables by index", "D 96, NeoX-20B"]
FEW += ["gradient through lse", "log-n clamped by lengths", "D 256", "one key head, few channels rotated"]


def run(case: Case, inputs: Inputs, dtype: torch.dtype, device: str, **settings: Any) -> list[Tensor]:
    return attention_cases.computed(forward, backward, case, inputs, dtype, device=device, **settings)


def assert_exact(actual: list[Tensor], truth: list[Tensor]) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dfreq"), actual, truth, strict=True):
        scale = max(1.0, y[y.isfinite()].abs().max().item())
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * scale, msg=partial("{}: {}".format, name))


def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_are_the_references_in_fp64(name: str, device: str) -> None:
    case = ALL[name]
    inputs = make_inputs(case)
    assert_exact(run(case, inputs, torch.float64, device, ints=torch.int32), expected(case, inputs, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_values_and_gradients_keep_the_tolerance_rule(name: str, dtype: torch.dtype, device: str) -> None:
    case = ALL[name]
    inputs = rounded(make_inputs(case), dtype)
    assert_close(run(case, inputs, dtype, device), case, inputs, dtype)


@pytest.mark.parametrize("name", ["only k", "only q", "softcap over padding", "tables by index in packed sequences"])
def test_sampled_positions_move_nothing_but_angles(name: str, device: str) -> None:
    case = CASES[name]
    positions = torch.arange(case.keys, dtype=torch.float64) * torch.linspace(1.5, 2, case.tables)[:, None] + 20
    inputs = make_inputs(case)
    truth = expected(case, inputs, torch.float64, positions)
    assert_exact(run(case, inputs, torch.float64, device, positions=positions), truth)


@pytest.mark.parametrize("name", ["left padding", "right padding and an empty cache", "softcap over padding"])
def test_dead_slots_may_hold_nan(name: str, device: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    clean = run(case, inputs, torch.float32, device)
    starts, ends = case.tokens["kv_start"], case.tokens.get("kv_end", [case.keys] * case.b)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for x in (inputs.k, inputs.v):
            x[b, :start] = x[b, end:] = torch.nan
    for x, y in zip(run(case, inputs, torch.float32, device), clean, strict=True):
        assert torch.equal(x, y)


def test_nan_in_one_sequence_stays_there(device: str) -> None:
    case = CASES["packed with windows"]
    inputs = make_inputs(case)
    clean = run(case, inputs, torch.float32, device)
    for x in inputs[:3]:
        x[0, :20] = torch.nan
    for x, y in zip(run(case, inputs, torch.float32, device)[:5], clean[:5], strict=True):
        x, y = (value.transpose(1, 2) if value.dim() == 3 else value for value in (x, y))
        assert torch.equal(x[0, 20:], y[0, 20:])
        assert x[0, :20].isnan().all()


def test_a_padded_sequence_has_the_bits_it_has_alone(device: str) -> None:
    case = Case(b=3, tokens={"kv_start": [0, 9, 30]}, rule={"window": 11}, tables=3)
    inputs = make_inputs(case)
    together = run(case, inputs, torch.bfloat16, device)
    for b in range(case.b):
        alone = case._replace(b=1, tokens={"kv_start": case.tokens["kv_start"][b : b + 1]}, tables=1)
        own = Inputs(*(x[b : b + 1] for x in inputs[:4]), None, inputs.freq[b : b + 1])
        for x, y in zip(together, run(alone, own, torch.bfloat16, device), strict=True):
            assert torch.equal(x[b], y[0])


def test_equal_inputs_give_equal_bits(device: str) -> None:
    case = TILED["several tiles of both"]
    inputs = make_inputs(case)
    for x, y in zip(*(run(case, inputs, torch.float32, device) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("way", attention_cases.FAR)
def test_far_positions_leave_dfreq_exact(way: str, device: str) -> None:
    case, positions = attention_cases.FAR[way]
    inputs = rounded(make_inputs(case), torch.float32)
    truth = expected(case, inputs, torch.float64, positions)[5]
    dfreq = run(case, inputs, torch.float32, device, positions=positions)[5]
    assert (dfreq - truth).abs().max() <= 3e-6 * truth.abs().max()


@pytest.mark.parametrize("name", ["causal square", "only q", "only k"])
def test_dfreq_is_as_exact_far_out_as_at_the_start(name: str, device: str) -> None:
    case = CASES[name]
    inputs = rounded(make_inputs(case), torch.float32)
    errors = []
    for offset in (0.0, 1e5):
        positions = torch.arange(case.keys, dtype=torch.float64)[None] + offset
        truth = expected(case, inputs, torch.float64, positions)[5]
        dfreq = run(case, inputs, torch.float32, device, positions=positions)[5]
        errors.append((dfreq - truth).abs().max() / truth.abs().max())
    assert errors[1] <= 2 * errors[0] + 1e-6


@pytest.mark.parametrize("bounds", [[1000, 1100], [-300, 40], [150, 50], [0, 2**31 - 1]], ids=str)
def test_bounds_that_lie_write_nothing_outside(bounds: list[int], device: str) -> None:
    case = Case(queries=200, keys=200, h=2, g=1, tokens={"cu_seqlens_q": bounds, "cu_seqlens_k": bounds})
    inputs = make_inputs(case)
    guarded = [torch.full((600, heads, 16), 7.0, dtype=torch.float64, device=device) for heads in (2, 2, 1, 1, 1)]
    out, dq, k_rotated, dk, dv = (memory[None, 200:400] for memory in guarded)
    lse = torch.zeros(3, 2, 200, dtype=torch.float64, device=device)
    q, k, v, dout = (x.to(device) for x in inputs[:4])
    tables = attention_cases.make_tables(case, inputs.freq, torch.float64)
    tokens, rule = attention_cases.make_tokens(case), attention_cases.make_rule(case)
    tables, tokens = tree_map_only(Tensor, lambda x: x.to(device), (tables, tokens))
    attention_fwd.launch_attention_fwd_keys(k, k_rotated, tables, tokens, 200)
    attention_fwd.launch_attention_fwd(q, k_rotated, v, tables, tokens, rule, True, out, lse[1:2], None)
    saved = (dout, None, q, k_rotated, v, out, lse[1:2])
    attention_bwd.launch_attention_bwd(*saved, tables, tokens, rule, (True, True), True, dq, dk, dv)
    for memory in guarded:
        assert (memory[:200] == 7).all()
        assert (memory[400:] == 7).all()
    assert not lse[[0, 2]].any()


def test_nan_in_queries_that_see_nothing_reaches_no_key(device: str) -> None:
    case = CASES["window that ends before the queries"]
    inputs = make_inputs(case)
    clean = run(case, inputs, torch.float32, device)
    inputs.q[:, 20:] = inputs.dout[:, 20:] = torch.nan
    for x, y in zip(run(case, inputs, torch.float32, device)[3:5], clean[3:5], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", attention_cases.EMPTY, ids=str)
def test_nothing_to_attend_gives_zeros_and_an_lse_of_minus_infinity(case: Case, device: str) -> None:
    out, lse, *gradients = run(case, make_inputs(case), torch.float32, device)
    assert (lse == -math.inf).all()
    for x in (out, *gradients):
        assert not x.any()


def test_any_strides_do(device: str) -> None:
    case = CASES["causal square"]
    inputs = make_inputs(case)
    contiguous = run(case, inputs, torch.float64, device)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    for x, y in zip(run(case, Inputs(*views, None, inputs.freq), torch.float64, device), contiguous, strict=True):
        assert torch.equal(x, y)


def test_halves_joined_for_products_from_shared_memory_change_nothing(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    case = TILED["D 128"]
    inputs = make_inputs(case)
    monkeypatch.setattr(attention_fwd, "architecture_of", lambda _: "sm_90")
    monkeypatch.setattr(attention_fwd, "dtype_kind", lambda _: "half")
    assert_exact(run(case, inputs, torch.float64, device), expected(case, inputs, torch.float64))


@pytest.mark.parametrize(
    "case",
    [
        TILED["D 128"],
        Case(b=1, queries=140, keys=140, h=2, g=1, d=32, r=16, rotate_k=False, rule={"is_causal": True}),
        Case(b=1, queries=140, keys=140, h=2, g=1, d=32, r=16, rotate_q=False, rule={"window": 70}),
    ],
    ids=["D 128", "only q", "only k in a window"],
)
def test_gradients_are_right_where_the_loops_have_heads_in_one_part(
    case: Case, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    inputs = make_inputs(case)
    monkeypatch.setattr(attention_bwd, "architecture_of", lambda _: "sm_90")
    monkeypatch.setattr(attention_bwd, "dtype_kind", lambda _: "half")
    assert_exact(run(case, inputs, torch.float64, device), expected(case, inputs, torch.float64))


def test_fp32_is_multiplied_as_torch_does() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert attention_launch.precision(torch.empty(1)) == setting
            assert attention_launch.precision(torch.empty(1, dtype=torch.bfloat16)) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="4 GiB of a GPU would have to be there")
@pytest.mark.parametrize("tensor", ["q", "k"])
def test_offsets_past_two_to_the_31_are_reached(tensor: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    # pages that are never touched are free.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = Case(b=1, queries=3, keys=3, h=3, g=3, rule={"is_causal": True})
    inputs = rounded(make_inputs(case), torch.bfloat16)
    near = run(case, inputs, torch.bfloat16, device)
    given = {name: getattr(inputs, name).bfloat16() for name in ("q", "k", "v")}
    # every stride fits 32 bits, the last head's offset does not.
    far = torch.empty(2**31 + 3 * 16, dtype=torch.bfloat16).as_strided((1, 3, 3, 16), (16, 16, 2**30, 1))
    far.copy_(given[tensor])
    given[tensor] = far
    tables, rule = attention_cases.make_tables(case, inputs.freq, torch.bfloat16), attention_cases.make_rule(case)
    out, lse, *_ = forward(*given.values(), tables, Tokens(), rule, True, True, True)
    assert torch.equal(out, near[0])
    assert torch.equal(lse, near[1])
