"""Decode steps, one feature or pair of features each, and what the reference makes of them, sequence by sequence."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from tolerance import assert_within_rule
from torch import Tensor

from clex_kernels import reference
from clex_kernels.attention_terms import Rule
from clex_kernels.tables import RotaryTableStack


class Case(NamedTuple):
    """A step: kv_end and the like by sequence, `slots` a contiguous cache has room for, and what logits are made of.

    page: slots of a page, None for a contiguous cache. head_major: whether a head's slots lie in a row.
    """

    kv_end: tuple[int, ...] = (37, 150)
    queries: int = 1
    slots: int = 200
    h: int = 4
    g: int = 2
    d: int = 16
    r: int = 8
    kv_start: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    page: int | None = None
    head_major: bool = False
    rule: Mapping[str, Any] = MappingProxyType({})
    tables: int = 1
    index: tuple[int, ...] | None = None
    train_length: int | None = None
    amplitude: float = 1.0
    rotate_q: bool = True
    rotate_k: bool = True


CASES = {
    "one token": Case(),
    "one token, head-major": Case(head_major=True),
    "one token among thousands": Case(kv_end=(3000, 1100), slots=3000, h=2, g=1),
    "a full cache": Case(kv_end=(200, 200)),
    "five tokens": Case(queries=5),
    "sixteen tokens, one key head": Case(queries=16, g=1, kv_end=(65, 64)),
    "more tokens than keys": Case(queries=7, kv_end=(3, 130)),
    "nothing cached": Case(queries=2, kv_end=(0, 130)),
    "seven heads a key head": Case(h=7, g=1, kv_end=(129, 64)),
    "as many key heads": Case(h=3, g=3),
    "few channels rotated": Case(d=80, r=16),
    "odd R and D": Case(d=20, r=7, queries=3),
    "one pair": Case(d=16, r=1),
    "D 96, NeoX-20B": Case(d=96, r=12),
    "D 128": Case(d=128, r=64, kv_end=(70, 129)),
    "D 256": Case(d=256, r=128, h=2, g=1, kv_end=(70, 129)),
    "left padding": Case(kv_start=(5, 130), queries=3),
    "left padding, nothing left": Case(kv_start=(37, 150)),
    "padding within the new tokens": Case(kv_start=(35, 148), queries=4),
    "window": Case(rule={"window": 20}),
    "window of several tokens": Case(rule={"window": 66}, queries=9, kv_start=(0, 100)),
    "window of one": Case(rule={"window": 1}, queries=3),
    "softcap": Case(rule={"softcap": 1.5}, queries=2),
    "sharp logits": Case(rule={"scale": 2.0}, d=64, r=32),
    "softcap and window": Case(rule={"softcap": 2.0, "window": 30}, kv_start=(2, 7)),
    "log-n": Case(rule={"log_base": math.log(12)}, kv_start=(36, 20)),
    "log-n of nothing": Case(rule={"log_base": math.log(12)}, kv_end=(1, 0)),
    "log-n clamped by lengths": Case(rule={"log_base": math.log(50), "log_clamped": True}, lengths=(4, 300)),
    "a table of each sequence": Case(tables=2),
    "tables by index": Case(kv_end=(37, 150, 64), tables=2, index=(1, 0, 1)),
    "tables by length": Case(kv_end=(32, 33, 97, 200, 0), tables=4, train_length=32),
    "tables by given lengths": Case(kv_end=(32, 33), tables=4, train_length=32, lengths=(96, 1000)),
    "tables by length after padding": Case(kv_end=(40, 40), kv_start=(8, 7), tables=4, train_length=32),
    "amplitude": Case(amplitude=1.3, d=24, queries=2),
    "only q": Case(rotate_k=False),
    "only k": Case(rotate_q=False, amplitude=1.2),
    "nothing rotated": Case(rotate_q=False, rotate_k=False),
    "pages of 16": Case(page=16),
    "pages of 48": Case(page=48, queries=2, kv_start=(10, 70)),
    "pages of 64, head-major": Case(page=64, head_major=True, tables=4, train_length=32),
    "pages of 256": Case(page=256, kv_end=(257, 511), rule={"window": 256}),
}
EMPTY = [
    Case(kv_end=()),
    Case(queries=0),
    Case(slots=0, kv_end=(0, 0)),
    Case(h=0),
    Case(page=16, kv_end=(0, 0)),
]


class Inputs(NamedTuple):
    """q [B, L, H, D], and keys and values of every sequence [B, S, G, D], whatever the cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    freq: Tensor


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """fp64 numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).double()

    batch, slots = len(case.kv_end), room(case)
    q = normal(batch, case.queries, case.h, case.d)
    k, v = (normal(batch, slots, case.g, case.d) for _ in range(2))
    decay = torch.linspace(0, -3, case.r, dtype=torch.float64)
    return Inputs(q, k, v, 10 ** (decay * (1 + torch.arange(case.tables)[:, None] / 8)))


def room(case: Case) -> int:
    """S: slots of a sequence."""
    if case.page is None:
        return case.slots
    return -(-max(case.kv_end, default=0) // case.page) * case.page


class Step(NamedTuple):
    """The tensors of clex::decode's arguments."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    coarse: Tensor
    fine: Tensor
    index: Tensor | None
    kv_end: Tensor
    kv_start: Tensor | None
    lengths: Tensor | None
    block_table: Tensor | None


def is_dead(case: Case) -> Tensor:
    """Slots [B, S] outside a sequence's bounds."""
    slot, end = torch.arange(room(case)), torch.tensor(case.kv_end, dtype=torch.int64)[:, None]
    start = torch.zeros_like(end) if case.kv_start is None else torch.tensor(case.kv_start)[:, None]
    return (slot < start) | (slot >= end)


def make_step(case: Case, inputs: Inputs, dtype: torch.dtype, ints: torch.dtype = torch.int64) -> Step:
    """What the operator takes; dead slots hold NaN, and so do pages of nobody."""
    dead = is_dead(case)[..., None, None]
    caches = [x.masked_fill(dead, math.nan).to(dtype) for x in (inputs.k, inputs.v)]
    block_table = None
    if case.page is not None:
        caches, block_table = to_pages(case, caches)
        block_table = block_table.to(ints)
    if case.head_major:
        caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in caches]

    def numbers(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=ints)

    stack = make_stack(case, inputs.freq, dtype)
    slots = [numbers(x) for x in (case.kv_end, case.kv_start, case.lengths)]
    return Step(inputs.q.to(dtype), *caches, stack.coarse, stack.fine, stack.index, *slots, block_table)


def to_pages(case: Case, caches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The caches in shuffled pages of a pool that has some to spare; ids of pages without live slots are nonsense."""
    batch, pages = len(case.kv_end), room(case) // case.page
    order = torch.randperm(batch * pages + 3, generator=torch.Generator().manual_seed(1))[: batch * pages]
    block_table = order.reshape(batch, pages).clone()
    pools = []
    for x in caches:
        pool = x.new_full((batch * pages + 3, case.page, case.g, case.d), math.nan)
        pool[block_table.flatten()] = x.reshape(-1, case.page, case.g, case.d)
        pools.append(pool)
    dead = is_dead(case).reshape(batch, pages, case.page).all(dim=2)
    block_table[dead] = torch.tensor([-7, 10**6])[torch.arange(int(dead.sum())) % 2]
    return pools, block_table


def make_stack(case: Case, freq: Tensor, dtype: torch.dtype) -> RotaryTableStack:
    return RotaryTableStack.from_frequencies(
        freq,
        torch.arange(1.0, case.tables + 1, dtype=torch.float64),
        length=max(room(case), 1),
        amplitude=case.amplitude,
        index=None if case.index is None else torch.tensor(case.index),
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )


def make_rule(case: Case) -> Rule:
    return Rule(**{"scale": case.d**-0.5, "is_causal": True, **case.rule})


def arguments(case: Case, step: Step, with_lse: bool = True) -> tuple[Any, ...]:
    """Of clex::decode."""
    rule = make_rule(case)
    rest = (rule.scale, rule.window, rule.softcap, rule.log_base, rule.log_clamped)
    return *step, case.train_length, *rest, case.rotate_q, case.rotate_k, with_lse


def expected(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """out and lse by the reference in dtype."""
    outs = [torch.empty(0, case.queries, case.h, case.d, dtype=dtype)]
    lses = [torch.empty(0, case.h, case.queries, dtype=dtype)]
    for b in range(len(case.kv_end)):
        out, lse = one_sequence(case, b, *(x[b : b + 1].to(dtype) for x in inputs[:3]), inputs.freq)
        outs.append(out)
        lses.append(lse)
    return [torch.cat(outs), torch.cat(lses)]


def one_sequence(case: Case, b: int, q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    rule = make_rule(case)
    start, end = 0 if case.kv_start is None else case.kv_start[b], case.kv_end[b]
    length = end - start if case.lengths is None else case.lengths[b]
    if case.index is not None:
        table = case.index[b]
    elif case.train_length is not None:
        table = min(max(-(-length // case.train_length), 1), case.tables) - 1
    else:
        table = min(b, case.tables - 1)
    rows = torch.arange(end - case.queries, end).clamp(min=0), torch.arange(k.shape[1])
    q_table, k_table = (reference.tables(freq[table], x.double()) for x in rows)
    if case.rotate_q:
        q = reference.rotary(q, *(case.amplitude * x for x in q_table))
    if case.rotate_k:
        k = reference.rotary(k, *(case.amplitude * x for x in k_table))
    mask = reference.visible(case.queries, k.shape[1], True, rule.window, start, end)
    factor = 1.0
    if rule.log_base is not None:
        factor = math.log(max(length, 1)) / rule.log_base
        factor = max(factor, 1.0) if rule.log_clamped else factor
    factor = torch.tensor([factor], dtype=torch.float64)
    return reference.attention(q, k, v, mask, rule.scale, rule.softcap, factor)


def assert_close(actual: list[Tensor], case: Case, inputs: Inputs, dtype: torch.dtype) -> None:
    """The tolerance rule for out and lse computed from inputs that dtype holds exactly."""
    in_dtype, truth = expected(case, inputs, dtype), expected(case, inputs, torch.float64)
    in_dtype[1] = in_dtype[1].float()
    for x, y, z in zip(actual, in_dtype, truth, strict=True):
        assert_within_rule(x, y, z)


def assert_exact(actual: list[Tensor], truth: list[Tensor]) -> None:
    """For fp64: within 1e-12 of the largest value."""
    for name, x, y in zip(("out", "lse"), actual, truth, strict=True):
        scale = max(1.0, y[y.isfinite()].abs().max().item()) if y.isfinite().any() else 1.0
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12 * scale, msg=lambda text, name=name: f"{name}: {text}")
