"""attention called as users call it, and the reference called the same way."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels import reference
from clex_kernels.tables import RotaryTable, RotaryTableStack

Table = RotaryTable | RotaryTableStack
LENGTH, TRAIN_LENGTH = 256, 16


class Call(NamedTuple):
    """Sizes, settings of the table (a stack of T if `tables` says so) and options of attention, tensors as lists.

    positions among the settings: [T, S], or how many rows of them to make up.
    """

    b: int = 2
    queries: int = 37
    keys: int = 37
    h: int = 4
    g: int = 2
    d: int = 16
    r: int = 8
    tables: int | None = None
    settings: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    is_flat: bool = False


class Given(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    freq: Tensor


def make(call: Call, dtype: torch.dtype = torch.float64) -> Given:
    generator = torch.Generator().manual_seed(0)
    rows = () if call.is_flat else (1,) if "cu_seqlens_q" in call.options else (call.b,)
    sizes = ((call.queries, call.h), (call.keys, call.g), (call.keys, call.g))
    q, k, v = (torch.randn(*rows, *size, call.d, generator=generator, dtype=torch.float64) for size in sizes)
    freq = 10 ** (torch.linspace(0, -3, call.r, dtype=torch.float64))
    if call.tables is not None:
        freq = freq / torch.arange(1, call.tables + 1)[:, None] ** 0.3
    return Given(q.to(dtype), k.to(dtype), v.to(dtype), freq)


def make_table(call: Call, freq: Tensor, dtype: torch.dtype = torch.float64) -> Table:
    settings: dict[str, Any] = {"length": LENGTH, "train_length": TRAIN_LENGTH, **call.settings}
    settings["dtype"] = torch.promote_types(dtype, torch.float32)
    if "positions" in settings:
        rows = settings["positions"]
        if isinstance(rows, int):
            rows = torch.arange(float(call.keys)).double() * torch.linspace(1.5, 2, rows)[:, None] + 20
        settings |= {"length": None, "positions": rows}
    if call.tables is None:
        settings |= {"positions": settings["positions"][0]} if "positions" in settings else {}
        return RotaryTable.from_frequencies(freq, **settings)
    if "positions" in settings:
        settings["index"] = torch.arange(call.tables)
    return RotaryTableStack.from_frequencies(freq, torch.arange(1.0, call.tables + 1).double(), **settings)


def options_of(call: Call) -> dict[str, Any]:
    return {name: torch.tensor(x) if isinstance(x, list) else x for name, x in call.options.items()}


def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Table,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rotated: str = "none",
    return_lse: bool = False,
    **tokens: Any,
) -> Any:
    """The reference, sequence by sequence, called as attention is."""
    is_flat = q.dim() == 3
    q, k, v = (x[None] if is_flat else x for x in (q, k, v))
    rows = [(b, slice(None), slice(None)) for b in range(q.shape[0])]
    if "cu_seqlens_q" in tokens:
        spans = (pairwise(tokens.pop(name).tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        rows = [(0, slice(*queries), slice(*keys)) for queries, keys in zip(*spans, strict=True)]
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    for b, (row, queries, keys) in enumerate(rows):
        own = {name: int(x[b]) if isinstance(x, Tensor) else x for name, x in tokens.items()}
        one = (q[row, queries][None], k[row, keys][None], v[row, keys][None])
        given = (own.pop("lengths", None), own.get("kv_start", 0), own.get("kv_end", one[1].shape[1]))
        length = given[2] - given[1] if given[0] is None else given[0]
        mask = reference.visible(one[0].shape[1], one[1].shape[1], is_causal, window, **own)
        factor = None
        if table.log_scale:
            factor = torch.tensor([math.log(length) / math.log(table.train_length)], dtype=torch.float64)
            factor = factor.clamp(min=1.0) if table.log_scale == "clamped" else factor
        one = (*rotated_by_reference(*one[:2], table, b, length, own, rotated), one[2])
        out_b, lse_b = reference.attention(*one, mask, scale, softcap, factor)
        out[row, queries], lse[row, :, queries] = out_b[0], lse_b[0]
    out, lse = (out[0], lse[0]) if is_flat else (out, lse)
    return (out, lse) if return_lse else out


def rotated_by_reference(
    q: Tensor, k: Tensor, table: Table, b: int, length: int, own: dict[str, int], rotated: str
) -> tuple[Tensor, Tensor]:
    freq, positions = table.freq, table.positions
    if isinstance(table, RotaryTableStack):
        t = math.ceil(length / TRAIN_LENGTH) - 1 if table.index is None else int(table.index[b])
        freq, positions = freq[t], None if positions is None else positions[t]
    positions = torch.arange(float(table.length)).double() if positions is None else positions
    k_first = own.get("k_offset", 0)
    q_first = own.get("q_offset", k_first + own.get("kv_end", k.shape[1]) - q.shape[1])
    turned = []
    for name, x, first in (("q", q, q_first), ("k", k, k_first)):
        # rows outside the table belong to tokens that neither see nor are seen.
        at = positions[(first + torch.arange(x.shape[1])).clamp(0, len(positions) - 1)]
        tables = reference.tables(freq, at, table.amplitude)
        turned.append(x if name in rotated and rotated != "none" else reference.rotary(x, *tables))
    return tuple(turned)


def outputs_and_gradients(
    function: Callable[..., Any], call: Call, given: Given, dtype: torch.dtype = torch.float64, **more: Any
) -> dict[str, Tensor]:
    """out, lse if asked for, and the gradients of a loss that weighs every number differently."""
    leaves = dict(zip(Given._fields, (x.detach().clone().requires_grad_() for x in given), strict=True))
    q, k, v, freq = leaves.values()
    options = options_of(call) | more
    outputs = function(q, k, v, make_table(call, freq, dtype), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((x.masked_fill(x == -math.inf, 0.0) * weights(x)).sum() for x in outputs)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = dict(zip(("out", "lse"), (x.detach() for x in outputs), strict=False))
    return named | {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def weights(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(x.dtype)


def assert_same(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor], rtol: float = 1e-11) -> None:
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        torch.testing.assert_close(x, truth[name], rtol=rtol, atol=rtol, msg=partial("{}: {}".format, name))
