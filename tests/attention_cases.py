"""Calls of attention, one feature or pair of features each, and what the reference makes of them."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tolerance import assert_within_rule
from torch import Tensor
from torch.utils._pytree import tree_map_only

from clex_kernels import reference
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.tables import RotaryTableStack


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
    table_length: int = 448


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
    "an empty sequence at the end of its table": Case(
        queries=64, keys=64, tokens={"kv_start": [0, 64]}, rule={"is_causal": True}, table_length=64
    ),
    "keys that end at 0 without order": Case(queries=5, keys=8, tokens={"kv_end": [8, 0]}),
    "bounds that do not start at 0": Case(
        queries=40, keys=40, tokens={"cu_seqlens_q": [7, 20, 40], "cu_seqlens_k": [7, 20, 40]}, rule={"is_causal": True}
    ),
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
EMPTY = [
    Case(b=0),
    Case(queries=0),
    Case(keys=0),
    Case(h=0),
    Case(h=0, g=0),
    Case(keys=0, rule={"window": 3}),
    Case(queries=0, keys=5, tokens={"cu_seqlens_q": [0, 0], "cu_seqlens_k": [0, 5]}),
    Case(queries=200, keys=200, tokens={"cu_seqlens_q": [0], "cu_seqlens_k": [0]}),
]


FAR_ROWS = torch.arange(60.0, dtype=torch.float64)[None]
# calls whose positions are far from 0, and sampled positions or None.
FAR = {
    "sampled positions": (Case(b=1, rule={"is_causal": True}), FAR_ROWS + 1e6),
    "far rows of sampled positions": (
        Case(b=1, tokens={"q_offset": 20, "k_offset": 20}, rule={"is_causal": True}),
        torch.cat((FAR_ROWS[:, :20], FAR_ROWS[:, 20:] + 1e6), dim=1),
    ),
    "rows of a table": (
        Case(b=1, tokens={"k_offset": 100_000}, rule={"is_causal": True}, table_length=100_100),
        None,
    ),
    "rows of each sequence": (
        Case(tokens={"q_offsets": [100_000, 7], "k_offsets": [100_000, 3]}, rule={"window": 9}, table_length=100_100),
        None,
    ),
    "left padding": (
        Case(b=1, queries=9, keys=3000, tokens={"kv_start": [2980]}, rule={"is_causal": True}, table_length=3008),
        None,
    ),
}


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
        length=case.table_length if positions is None else None,
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
        positions = torch.arange(case.table_length, dtype=torch.float64).expand(case.tables, -1)
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


def computed(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    ints: torch.dtype = torch.int64,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """out, lse, dq, dk, dv and dfreq of an implementation: two functions like those of attention_cpu.py."""
    terms = (make_tables(case, inputs.freq, dtype, positions), make_tokens(case, ints), make_rule(case))
    terms = (*tree_map_only(Tensor, lambda x: x.to(device), terms), case.rotate_q, case.rotate_k)
    q, k, v, dout = (x.to(device, dtype) for x in inputs[:4])
    out, lse, q_rotated, k_rotated = forward(q, k, v, *terms, True)
    assert (q_rotated.shape, k_rotated.shape) == (
        q.shape if case.rotate_q else (0,),
        k.shape if case.rotate_k else (0,),
    )
    dlse = None if inputs.dlse is None else inputs.dlse.to(device, lse.dtype)
    q, k = q_rotated if case.rotate_q else q, k_rotated if case.rotate_k else k
    outputs = [out, lse, *backward(dout, dlse, q, k, v, out, lse, *terms, True)]
    assert [x.dtype for x in outputs] == [dtype, lse.dtype, dtype, dtype, dtype, torch.float64]
    assert all(x.is_contiguous() for x in outputs)
    return [x.cpu() for x in outputs]


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs as dtype holds them, in fp64."""
    return Inputs(*(None if x is None else x.to(dtype).double() for x in inputs[:5]), inputs.freq)


def assert_close(actual: list[Tensor], case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    """The tolerance rule for everything computed from inputs that dtype holds exactly."""
    in_dtype, truth = expected(case, inputs, dtype), expected(case, inputs, torch.float64)
    in_dtype[1] = in_dtype[1].float()
    for x, y, z in zip(actual[:5], in_dtype[:5], truth[:5], strict=True):
        assert_within_rule(x, y, z)
    # dfreq is fp64 by dtype only.
    assert_within_rule(actual[5].to(dtype), in_dtype[5].to(dtype), truth[5])
