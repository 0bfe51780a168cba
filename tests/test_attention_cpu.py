"""The CPU's attention operators, called as functions, against autograd through the reference in fp64."""

import math
from functools import partial
from typing import Any

import attention_cases
import pytest
import torch
from attention_cases import (
    CASES,
    EMPTY,
    FAR,
    Case,
    Inputs,
    assert_close,
    expected,
    make_inputs,
    make_rule,
    make_tables,
    make_tokens,
    rounded,
)

from clex_kernels.attention_cpu import attention, attention_bwd
from clex_kernels.attention_terms import Tokens

computed = partial(attention_cases.computed, attention, attention_bwd)
# one case for each way through.
FEW = ["causal square", "keys before the queries", "left padding", "packed with windows", "softcap", "only q"]
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def check_exact(case: Case, inputs: Inputs, **settings: Any) -> None:
    truth = expected(case, inputs, torch.float64, settings.get("positions"))
    actual = computed(case, inputs, torch.float64, **settings)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dfreq"), actual, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11, msg=lambda message, name=name: f"{name}: {message}")


@cases
def test_values_and_gradients_are_the_references_in_fp64(case: Case) -> None:
    check_exact(case, make_inputs(case), ints=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_values_and_gradients_keep_the_tolerance_rule(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = rounded(make_inputs(case), dtype)
    assert_close(computed(case, inputs, dtype), case, inputs, dtype)


@pytest.mark.parametrize("name", ["only k", "softcap over padding", "tables by index in packed sequences"])
def test_sampled_positions_move_nothing_but_angles(name: str) -> None:
    case = CASES[name]
    positions = torch.arange(case.keys, dtype=torch.float64) * torch.linspace(1.5, 2, case.tables)[:, None] + 20
    truth = expected(case, make_inputs(case), torch.float64, positions)
    actual = computed(case, make_inputs(case), torch.float64, positions=positions)
    torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", FAR)
def test_far_positions_leave_dfreq_exact(way: str) -> None:
    case, positions = FAR[way]
    inputs = rounded(make_inputs(case), torch.float32)
    truth = expected(case, inputs, torch.float64, positions)[5]
    dfreq = computed(case, inputs, torch.float32, positions)[5]
    assert (dfreq - truth).abs().max() <= 3e-6 * truth.abs().max()


@pytest.mark.parametrize("name", ["left padding", "right padding and an empty cache", "softcap over padding"])
def test_dead_slots_may_hold_nan(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    clean = computed(case, inputs, torch.float32)
    starts, ends = case.tokens["kv_start"], case.tokens.get("kv_end", [case.keys] * case.b)
    for b, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for x in (inputs.k, inputs.v):
            x[b, :start] = x[b, end:] = torch.nan
    for x, y in zip(computed(case, inputs, torch.float32), clean, strict=True):
        assert torch.equal(x, y)


def test_tokens_that_no_table_holds_matter_only_if_seen() -> None:
    # slots up to 99 of a table of 64 rows; the first queries are before position 0.
    case = Case(queries=50, keys=100, tokens={"kv_end": [40, 60]}, rule={"is_causal": True})
    inputs = make_inputs(case)
    whole, short = make_tables(case, inputs.freq, torch.float64), make_tables(case, inputs.freq, torch.float64)
    short = short._replace(coarse=short.coarse[:, :1])
    results = []
    for tables in (whole, short):
        terms = (tables, make_tokens(case), make_rule(case), True, True)
        out, lse, q, k = attention(*inputs[:3], *terms, True)
        results.append((out, lse, *attention_bwd(inputs.dout, None, q, k, inputs.v, out, lse, *terms, True)))
    for x, y in zip(*results, strict=True):
        assert not x.isnan().any()
        assert torch.equal(x, y)


@pytest.mark.parametrize("window", [None, 11])
def test_a_padded_sequence_has_the_bits_it_has_alone(window: int | None) -> None:
    case = Case(b=3, tokens={"kv_start": [0, 9, 30]}, rule={"is_causal": True, "window": window}, tables=3)
    inputs = make_inputs(case)
    together = computed(case, inputs, torch.bfloat16)
    for b in range(case.b):
        alone = case._replace(b=1, tokens={"kv_start": case.tokens["kv_start"][b : b + 1]}, tables=1)
        own = Inputs(*(x[b : b + 1] for x in inputs[:4]), None, inputs.freq[b : b + 1])
        for x, y in zip(together, computed(alone, own, torch.bfloat16), strict=True):
            assert torch.equal(x[b], y[0])


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_to_attend_gives_zeros_and_an_lse_of_minus_infinity(case: Case) -> None:
    out, lse, *gradients = computed(case, make_inputs(case), torch.float32)
    assert (lse == -math.inf).all()
    for x in (out, *gradients):
        assert not x.any()


def test_any_strides_do() -> None:
    case = CASES["causal square"]
    inputs = make_inputs(case)
    tables = make_tables(case, inputs.freq, torch.float64)
    terms = (tables, Tokens(), make_rule(case), True, False)
    shared = inputs.k[:, :1].expand_as(inputs.k)
    scalar = torch.ones((), dtype=torch.float64).expand_as(inputs.q)
    results = []
    for relay in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        q, k, v = relay(inputs.q.transpose(1, 2).contiguous().transpose(1, 2)), relay(shared), relay(shared)
        out, lse, q, _ = attention(q, k, v, *terms, True)
        results.append((out, lse, *attention_bwd(relay(scalar), None, q, k, v, out, lse, *terms, True)))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_outputs_share_no_memory_with_inputs_and_inputs_stay() -> None:
    case = CASES["nothing rotated"]
    inputs = make_inputs(case)
    before = [x.clone() for x in inputs[:4]]
    outputs = computed(case, inputs, torch.float64)
    addresses = {x.untyped_storage().data_ptr() for x in inputs[:4]}
    assert not addresses & {x.untyped_storage().data_ptr() for x in outputs}
    for x, y in zip(inputs[:4], before, strict=True):
        assert torch.equal(x, y)


def test_autocast_reaches_no_block() -> None:
    case = CASES["softcap"]
    inputs = make_inputs(case)
    plain = computed(case, inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(computed(case, inputs, torch.float32), plain, strict=True):
            assert torch.equal(x, y)


def test_gradients_without_dfreq_are_the_same() -> None:
    case = CASES["left padding"]
    inputs = make_inputs(case)
    terms = (make_tables(case, inputs.freq, torch.float64), make_tokens(case), make_rule(case), True, True)
    out, lse, q, k = attention(*inputs[:3], *terms, True)
    with_dfreq, without = (
        attention_bwd(inputs.dout, None, q, k, inputs.v, out, lse, *terms, wanted) for wanted in (True, False)
    )
    assert without[3].shape == (0,)
    torch.testing.assert_close(with_dfreq[:3], without[:3], rtol=1e-14, atol=1e-14)
