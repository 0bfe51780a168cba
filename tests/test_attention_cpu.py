"""The CPU's attention operators, called as functions, against autograd through the reference in fp64."""

import math
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor

from clex_kernels import reference
from clex_kernels.attention_cpu import attention, attention_bwd
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.tables import RotaryTableStack

LENGTH = 448


class Case(NamedTuple):
    """A call: B sequences, tokens as lists, and what logits are made of."""

    b: int = 2
    queries: int = 37
    keys: int = 37
    h: int = 4
    g: int = 2
    d: int = 16
    r: int = 8
    tokens: Mapping[str, Any] = MappingProxyType({})
    rule: Mapping[str, Any] = MappingProxyType({})
    tables: int = 1
    index: list[int] | None = None
    rotate_q: bool = True
    rotate_k: bool = True
    with_dlse: bool = False


CASES = {
    "full": Case(),
    "causal square": Case(queries=65, keys=65, rule={"is_causal": True}),
    "one key head, few channels rotated": Case(g=1, d=80, r=16, rule={"is_causal": True}),
    "keys before the queries": Case(queries=150, keys=300, rule={"is_causal": True}),
    "queries that see nothing": Case(queries=41, keys=23, rule={"is_causal": True}),
    "one token": Case(queries=1, keys=19, rule={"is_causal": True}),
    "two tokens": Case(queries=2, keys=19, rule={"is_causal": True}),
    "window one token short": Case(rule={"window": 36}),
    "window of several blocks": Case(b=1, queries=301, keys=301, rule={"window": 150}),
    "window beside keys left behind": Case(queries=20, keys=90, rule={"window": 7}),
    "window that ends before the queries": Case(queries=30, keys=9, tokens={"q_offset": 0}, rule={"window": 4}),
    "softcap": Case(queries=140, keys=300, rule={"is_causal": True, "softcap": 2.0}),
    "softcap without order": Case(g=4, rule={"softcap": 1.5}),
    "offsets": Case(queries=9, keys=30, tokens={"q_offset": 15, "k_offset": 5}, rule={"is_causal": True}),
    "offsets of each sequence": Case(
        queries=9, keys=30, tokens={"q_offsets": [40, 12], "k_offsets": [3, 11]}, rule={"is_causal": True}
    ),
    "left padding": Case(b=3, tokens={"kv_start": [5, 0, 36], "kv_end": [37, 37, 37]}, rule={"is_causal": True}),
    "right padding and an empty cache": Case(
        b=3, queries=5, tokens={"kv_start": [0, 2, 9], "kv_end": [20, 37, 9]}, rule={"is_causal": True}
    ),
    "ends past the cache": Case(tokens={"kv_start": [-3, 4], "kv_end": [37, 99]}, rule={"is_causal": True}),
    "softcap over padding": Case(tokens={"kv_start": [5, 0]}, rule={"is_causal": True, "softcap": 1.0}),
    "packed": Case(
        queries=70,
        keys=80,
        tokens={"cu_seqlens_q": [0, 20, 20, 33, 66], "cu_seqlens_k": [0, 20, 25, 45, 60]},
        rule={"is_causal": True},
    ),
    "packed past the end": Case(tokens={"cu_seqlens_q": [0, 9, 99], "cu_seqlens_k": [0, 9, 99]}, rule={"window": 4}),
    "packed with windows": Case(
        queries=70,
        keys=70,
        tokens={"cu_seqlens_q": [0, 20, 20, 70], "cu_seqlens_k": [0, 20, 20, 70]},
        rule={"window": 9},
        tables=3,
    ),
    "a table of each sequence": Case(b=3, rule={"is_causal": True}, tables=3),
    "tables by index": Case(b=3, rule={"is_causal": True}, tables=2, index=[1, 0, 1]),
    "tables by index in packed sequences": Case(
        queries=50,
        keys=50,
        tokens={"cu_seqlens_q": [0, 18, 50], "cu_seqlens_k": [0, 18, 50]},
        rule={"is_causal": True},
        tables=3,
        index=[2, 0],
    ),
    "log-n": Case(b=3, tokens={"kv_start": [36, 20, 0]}, rule={"is_causal": True, "log_base": math.log(12)}),
    "log-n clamped by lengths": Case(
        b=3, tokens={"lengths": [1, 4, 300]}, rule={"log_base": math.log(8), "log_clamped": True, "softcap": 3.0}
    ),
    "log-n of the whole batch": Case(rule={"log_base": math.log(100)}),
    "gradient through lse": Case(rule={"is_causal": True}, with_dlse=True),
    "gradient through lse of padding": Case(
        queries=45, tokens={"kv_start": [3, 30]}, rule={"is_causal": True}, with_dlse=True
    ),
    "only q": Case(queries=9, keys=30, rule={"is_causal": True}, rotate_k=False),
    "only k": Case(rule={"is_causal": True}, rotate_q=False),
    "nothing rotated": Case(rule={"is_causal": True}, rotate_q=False, rotate_k=False),
}
# one case for each way through.
FEW = ["causal square", "keys before the queries", "left padding", "packed with windows", "softcap", "only q"]
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
EMPTY = [
    Case(b=0),
    Case(queries=0),
    Case(keys=0),
    Case(h=0),
    Case(h=0, g=0),
    Case(keys=0, rule={"window": 3}),
    Case(queries=0, keys=5, tokens={"cu_seqlens_q": [0, 0], "cu_seqlens_k": [0, 5]}),
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    freq: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    b = 1 if "cu_seqlens_q" in case.tokens else case.b

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    q, dout = (normal(b, case.queries, case.h, case.d) for _ in range(2))
    k, v = (normal(b, case.keys, case.g, case.d) for _ in range(2))
    dlse = normal(b, case.h, case.queries) if case.with_dlse else None
    decay = torch.linspace(0, -3, case.r, dtype=torch.float64)
    return Inputs(q, k, v, dout, dlse, 10 ** (decay * (1 + torch.arange(case.tables)[:, None] / 8)))


def make_tables(case: Case, freq: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> Tables:
    index = None if case.index is None else torch.tensor(case.index)
    stack = RotaryTableStack.from_frequencies(
        freq,
        torch.arange(1.0, case.tables + 1, dtype=torch.float64),
        length=LENGTH if positions is None else None,
        positions=positions,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    return Tables(stack.coarse, stack.fine, stack.positions, index)


def make_tokens(case: Case, dtype: torch.dtype = torch.int64) -> Tokens:
    return Tokens(
        **{name: torch.tensor(x, dtype=dtype) if isinstance(x, list) else x for name, x in case.tokens.items()}
    )


def make_rule(case: Case) -> Rule:
    return Rule(case.d**-0.5, **case.rule)


def sequences(case: Case) -> list[tuple[int, slice, slice]]:
    """Row of the batch, queries and key slots of each sequence."""
    edges = [case.tokens.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    if edges[0] is None:
        return [(b, slice(0, case.queries), slice(0, case.keys)) for b in range(case.b)]
    return [(0, slice(*q), slice(*k)) for q, k in zip(*(pairwise(x) for x in edges), strict=True)]


def one_sequence(
    case: Case, i: int, q: Tensor, k: Tensor, v: Tensor, freq: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference's out and lse of sequence i, from tensors of its own [1, L or S, heads, D]."""
    tokens, rule = make_tokens(case), make_rule(case)
    queries, keys = q.shape[1], k.shape[1]

    def own(values: Tensor | None, default: int | None) -> int | None:
        return default if values is None else int(values[i])

    start, end = (min(max(own(x, y), 0), keys) for x, y in ((tokens.kv_start, 0), (tokens.kv_end, keys)))
    k_offset = own(tokens.k_offsets, tokens.k_offset)
    q_offset = own(tokens.q_offsets, tokens.q_offset)
    mask = reference.visible(queries, keys, rule.is_causal, rule.window, start, end, q_offset, k_offset)
    first = k_offset + end - queries if q_offset is None else q_offset
    # rows outside the table belong to tokens that neither see nor are seen.
    rows = ((first + torch.arange(queries)), k_offset + torch.arange(keys))
    table = 0 if case.tables == 1 else i if case.index is None else case.index[i]
    freq, positions = freq[table], positions[table]
    q_rows, k_rows = (positions[x.clamp(0, len(positions) - 1)] for x in rows)
    if case.rotate_q:
        q = reference.rotary(q, *reference.tables(freq, q_rows))
    if case.rotate_k:
        k = reference.rotary(k, *reference.tables(freq, k_rows))
    factor = 1.0
    if rule.log_base is not None:
        factor = math.log(max(own(tokens.lengths, max(end - start, 0)), 1)) / rule.log_base
        factor = max(factor, 1.0) if rule.log_clamped else factor
    factor = torch.tensor([factor], dtype=torch.float64)
    return reference.attention(q, k, v, mask, rule.scale, rule.softcap, factor)


def expected(case: Case, inputs: Inputs, dtype: torch.dtype, positions: Tensor | None = None) -> list[Tensor]:
    """out, lse, dq, dk, dv and dfreq by the reference in dtype, from the same rounded inputs."""
    given = [x.to(dtype) for x in inputs[:3]]
    q, k, v = (x.clone().requires_grad_() for x in given)
    freq = inputs.freq.clone().requires_grad_()
    if positions is None:
        positions = torch.arange(LENGTH, dtype=torch.float64).expand(case.tables, -1)
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    loss = torch.zeros((), dtype=dtype)
    for i, (b, queries, keys) in enumerate(sequences(case)):
        tensors = (q[b, queries][None], k[b, keys][None], v[b, keys][None])
        out_i, lse_i = one_sequence(case, i, *tensors, freq, positions)
        out[b, queries], lse[b, :, queries] = out_i[0].detach(), lse_i[0].detach()
        loss = loss + (out_i[0] * inputs.dout[b, queries].to(dtype)).sum()
        if inputs.dlse is not None:
            lse_i = lse_i[0].masked_fill(lse_i[0] == -math.inf, 0.0)
            loss = loss + (lse_i * inputs.dlse[b, :, queries].to(dtype)).sum()
    gradients = torch.autograd.grad(loss, (q, k, v, freq), allow_unused=True, materialize_grads=True)
    return [out.detach(), lse, *gradients]


def computed(case: Case, inputs: Inputs, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
    positions, ints = settings.get("positions"), settings.get("ints", torch.int64)
    tables = make_tables(case, inputs.freq, dtype, positions)
    q, k, v, dout = (x.to(dtype) for x in inputs[:4])
    terms = (tables, make_tokens(case, ints), make_rule(case), case.rotate_q, case.rotate_k)
    out, lse, q_rotated, k_rotated = attention(q, k, v, *terms, True)
    assert (q_rotated.shape, k_rotated.shape) == (
        q.shape if case.rotate_q else (0,),
        k.shape if case.rotate_k else (0,),
    )
    dlse = None if inputs.dlse is None else inputs.dlse.to(lse.dtype)
    q, k = q_rotated if case.rotate_q else q, k_rotated if case.rotate_k else k
    outputs = [out, lse, *attention_bwd(dout, dlse, q, k, v, out, lse, *terms, True)]
    assert [x.dtype for x in outputs] == [dtype, lse.dtype, dtype, dtype, dtype, torch.float64]
    assert all(x.is_contiguous() for x in outputs)
    return outputs


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
    inputs = make_inputs(case)
    inputs = Inputs(*(None if x is None else x.to(dtype).double() for x in inputs[:5]), inputs.freq)
    in_dtype, truth = expected(case, inputs, dtype), expected(case, inputs, torch.float64)
    actual = computed(case, inputs, dtype)
    assert actual[1].dtype == torch.float32
    in_dtype[1] = in_dtype[1].float()
    for x, y, z in zip(actual[:5], in_dtype[:5], truth[:5], strict=True):
        assert_within_rule(x, y, z)
    # dfreq is fp64 by dtype only.
    assert (actual[5] - truth[5]).abs().max() <= 30 * torch.finfo(dtype).eps * truth[5].abs().max()


@pytest.mark.parametrize("name", ["only k", "softcap over padding", "tables by index in packed sequences"])
def test_sampled_positions_move_nothing_but_angles(name: str) -> None:
    case = CASES[name]
    positions = torch.arange(case.keys, dtype=torch.float64) * torch.linspace(1.5, 2, case.tables)[:, None] + 20
    truth = expected(case, make_inputs(case), torch.float64, positions)
    actual = computed(case, make_inputs(case), torch.float64, positions=positions)
    torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-11)


def test_far_positions_leave_dfreq_exact() -> None:
    case = CASES["causal square"]
    near = torch.arange(65, dtype=torch.float64)[None]
    truth = expected(case, make_inputs(case), torch.float64, near)[5]
    dfreq = computed(case, make_inputs(case), torch.float32, positions=near + 10**6)[5]
    assert (dfreq - truth).abs().max() <= 1e-5 * truth.abs().max()


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
