"""What accepted calls must give: plain torch in fp64, sequence by sequence, from the rows that tables hold."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clex_kernels import RotaryTable, RotaryTableStack, reference

from .values import tensors_in

# relative to the largest number, in roundings of the result's dtype.
SLACK = 60
# products of larger ones overflow, or are off by more than any bound can tell.
LARGEST = 1e3


def is_plain(*arguments: Any) -> bool:
    """Whether all numbers are finite and of a size that rounding errors are known for, and on the host."""
    for x in tensors_in(list(arguments)):
        if x.is_meta or x.layout != torch.strided or x.is_complex():
            return False
        if x.is_floating_point() and not (x.detach().double().abs() <= LARGEST).all():
            return False
    return True


def assert_within(name: str, actual: Tensor, truth: Tensor, eps: float) -> None:
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    if actual.is_meta or truth.is_meta or truth.numel() == 0:
        return
    actual, truth = actual.detach().double(), truth.detach().double()
    assert torch.equal(actual.isinf(), truth.isinf()), f"{name}: infinite elsewhere than the truth"
    finite = truth.isfinite()
    assert torch.equal(actual[~finite], truth[~finite]), f"{name}: another infinity than the truth's"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} NaN"
    if finite.any():
        error = (actual - truth)[finite].abs().max().item()
        bound = eps * (1 + truth[finite].abs().max().item())
        assert error <= bound, f"{name}: off by {error:.3g}, more than {bound:.3g}"


def slack(dtype: torch.dtype) -> float:
    """Of results in dtype; fp64 comes with fp64 tables."""
    return 1e-10 if dtype == torch.float64 else SLACK * torch.finfo(dtype).eps


def rows_of(table: RotaryTable | RotaryTableStack) -> Tensor:
    """All rows as complex numbers [T, C F, R], fp64."""
    coarse, fine = (
        torch.complex(x[..., 0, :].double(), x[..., 1, :].double())
        for x in ((x[None] if x.dim() == 3 else x) for x in (table.coarse, table.fine))
    )
    rows = (coarse[:, :, None] * fine[:, None]).flatten(1, 2)
    if not table.freq.requires_grad:
        return rows
    positions = torch.arange(float(rows.shape[1])).double() if table.positions is None else table.positions
    freq = table.freq[None] if table.freq.dim() == 1 else table.freq
    angle = positions[..., None] * freq[:, None]
    # their values are the table's, and their derivatives those by its frequencies.
    return rows * torch.polar(torch.ones_like(angle), angle - angle.detach())


def choice_of(table: RotaryTable | RotaryTableStack, b: int, length: int | None = None) -> int:
    """The number of the table that sequence b uses."""
    if isinstance(table, RotaryTable):
        return 0
    if table.index is not None:
        return int(table.index[b])
    if table.train_length is not None and length is not None:
        return min(max(math.ceil(length / table.train_length), 1), len(table.freq)) - 1
    return b if len(table.freq) > 1 else 0


def turned(x: Tensor, rows: Tensor) -> Tensor:
    """x [L, H, D] rotated by rows [L, R]."""
    pairs = rows.shape[-1]
    first, second, rest = x.double().split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    both = torch.complex(first, second) * rows[:, None]
    return torch.cat((both.real, both.imag, rest), dim=-1)


def rotary(
    x: Tensor, table: RotaryTable | RotaryTableStack, position_ids: Tensor | None = None, offset: int = 0
) -> Tensor:
    """apply_rotary's output for x [B, L, H, D]."""
    rows, out = rows_of(table), torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        at = torch.arange(x.shape[1])
        if position_ids is not None:
            at = position_ids[b if len(position_ids) > 1 else 0]
        out[b] = turned(x[b], rows[choice_of(table, b)][at + offset])
    return out


def both_rotated(given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """apply_rotary's results."""
    where = (given["table"], given.get("position_ids"), given.get("offset", 0))
    q, k = (None if x is None else rotary(x, *where) for x in (given["q"], given.get("k")))
    return q, k


def _at(value: Any, b: int, default: Any) -> Any:
    return default if value is None else int(value[b]) if isinstance(value, Tensor) else int(value)


def attention(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse of attention's arguments."""
    q, k, v, table = (given[name] for name in ("q", "k", "v", "table"))
    is_flat, bounds = q.dim() == 3, given.get("cu_seqlens_q")
    q, k, v = ((x[None] if x.dim() == 3 else x).double() for x in (q, k, v))
    spans = [(b, slice(0, q.shape[1]), slice(0, k.shape[1])) for b in range(q.shape[0])]
    if bounds is not None:
        pairs = (pairwise(given[name].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        spans = [(0, slice(*queries), slice(*keys)) for queries, keys in zip(*pairs, strict=True)]
    rows, rotated = rows_of(table), given.get("rotated", "none")
    # no tensor holds larger ones.
    window = None if given.get("window") is None else min(given["window"], 2**40)
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
    for b, (row, queries, keys) in enumerate(spans):
        one = q[row, queries], k[row, keys], v[row, keys]
        start, end = _at(given.get("kv_start"), b, 0), _at(given.get("kv_end"), b, len(one[1]))
        length = _at(given.get("lengths"), b, end - start)
        k_first = _at(given.get("k_offset"), b, 0)
        q_first = _at(given.get("q_offset"), b, k_first + end - len(one[0]))
        mask = reference.visible(
            *(len(one[0]), len(one[1]), given.get("is_causal", False), window),
            *(start, end, q_first, k_first),
        )
        if not mask.any():
            continue
        own = rows[choice_of(table, b, length)]
        parts = []
        for name, x, first, seen in (("q", one[0], q_first, mask[0].any(1)), ("k", one[1], k_first, mask[0].any(0))):
            at = torch.where(seen, first + torch.arange(len(x)), 0)
            parts.append(x if name in rotated and rotated != "none" else turned(x, own[at]))
        seen = mask[0].any(1)
        factor = None
        if table.log_scale:
            factor = math.log(max(length, 1)) / math.log(table.train_length)
            factor = max(factor, 1.0) if table.log_scale == "clamped" else factor
            factor = torch.tensor([factor], dtype=torch.float64)
        # what is not seen has no effect, whatever it holds.
        parts[1] = torch.where(mask[0].any(0)[:, None, None], parts[1], 0.0)
        parts[0], mask = parts[0][seen], mask[:, seen]
        found = reference.attention(
            *(x[None] for x in (*parts, one[2])), mask, given.get("scale"), given.get("softcap"), factor
        )
        out[row, queries][seen], lse[row, :, queries][:, seen] = found[0][0], found[1][0]
    return (out[0], lse[0]) if is_flat else (out, lse)


def merged(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """merge_attention's out and lse."""
    stacked = torch.stack([x.double() for x in lses])
    is_empty = (stacked == -math.inf).all(0)
    stacked = stacked.masked_fill(is_empty, 0.0)
    weights = stacked.softmax(0).masked_fill(is_empty, 0.0)
    out = sum(x.double() * weight.mT[..., None] for x, weight in zip(outs, weights, strict=True))
    return out, stacked.logsumexp(0).masked_fill(is_empty, -math.inf)


def projected(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """qkv_rotary's results."""
    x, weight, bias = given["x"], given["weight"], given.get("bias")
    weight, bias = (torch.cat(y) if isinstance(y, (tuple, list)) else y for y in (weight, bias))
    product = x.double() @ weight.double().mT + (0 if bias is None else bias.double())
    many, groups, keys = given["num_heads"], given["num_kv_heads"], given.get("keys", "rotated")
    q, k, v = product.unflatten(2, (many + 2 * groups, -1)).split((many, groups, groups), dim=2)
    where = (given["table"], given.get("position_ids"), given.get("offset", 0))
    q, rotated = (rotary(y, *where) for y in (q, k))
    return {"rotated": (q, rotated, v), "raw": (q, k, v), "both": (q, rotated, v, k)}[keys]


def gathered(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A cache [B, S, G, D], of pages where it is in pages; slots of pages that do not exist hold zeros."""
    if block_table is None:
        return cache
    exists = (block_table >= 0) & (block_table < len(cache))
    pages = cache[torch.where(exists, block_table, 0).long()]
    return torch.where(exists[..., None, None, None], pages, 0.0).flatten(1, 2)


def decode(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """out and lse of decode_attention's arguments."""
    block_table = given.get("block_table")
    k, v = (gathered(given[name], block_table) for name in ("k_cache", "v_cache"))
    kv_end = given["kv_end"]
    if not isinstance(kv_end, Tensor):
        kv_end = torch.full((len(given["q"]),), kv_end)
    return attention({**given, "k": k, "v": v, "kv_end": kv_end, "is_causal": True})
