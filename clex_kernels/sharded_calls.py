"""Public functions given DTensors: each rank calls the same function with its part, placed as sharding.py says.

Every function here takes as its first argument the public function it serves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from clex_kernels.qkv_rotary_checks import Weights
from clex_kernels.rotary_checks import check_kind
from clex_kernels.sharding import BATCH, HEADS, NOTHING, Layout, check_mesh, is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Shard


def _check_dims(name: str, x: "DTensor", *dims: int) -> None:
    if x.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {list(x.shape)}")


def sharded_attention(
    attend: Callable[..., Any], q: "DTensor", k: Any, v: Any, table: Any, return_lse: bool, debug: bool, **options: Any
) -> Any:
    """attention() of DTensors, by `attend`, attention() itself."""
    packed = [name for name in ("cu_seqlens_q", "cu_seqlens_k") if options[name] is not None]
    _check_dims("q", q, *((3, 4) if packed else (4,)))
    heads, batch = q.dim() - 2, None if packed else 0
    layout = Layout.of(q, batch, heads)
    for name, x in (("k", k), ("v", v)):
        check_mesh(name, x, layout.mesh)
        _check_dims(name, x, q.dim())
    layout.check_heads("q", q.shape[heads], k.shape[heads])
    sequences = q.shape[0]
    for name in packed:
        bounds = options[name]
        options[name] = bounds.full_tensor() if is_dtensor(bounds) else bounds
        sequences = len(bounds) - 1
    for name in ("kv_start", "kv_end", "q_offset", "k_offset", "lengths"):
        options[name] = layout.rows(name, options[name], sequences)
    results = attend(
        layout.local("q", q, batch, heads),
        *(layout.local_keys(name, x, x.shape[heads], batch, heads) for name, x in (("k", k), ("v", v))),
        layout.local_table(table, sequences, True, debug),
        return_lse=return_lse,
        debug=debug,
        **options,
    )
    out, *lse = results if return_lse else (results,)
    out = layout.whole(out, batch, heads, {dim: q.shape[dim] for dim in (0, heads)})
    if not return_lse:
        return out
    # [B, H, L], or [H, N].
    sizes = {heads - 1: q.shape[heads]} | ({} if heads == 1 else {0: q.shape[0]})
    return out, layout.whole(lse[0], batch, heads - 1, sizes)


def sharded_rotary(
    rotate: Callable[..., Any],
    q: "DTensor",
    k: Any,
    table: Any,
    position_ids: Any,
    inplace: bool,
    out: Any,
    debug: bool,
    offset: int,
) -> "tuple[DTensor, DTensor | None]":
    """apply_rotary() of DTensors, by `rotate`, apply_rotary() itself."""
    if out is not None:
        raise ValueError("out: expected None with DTensors, which can be rotated in place or to new ones")
    named = [("q", q)] if k is None else [("q", q), ("k", k)]
    layouts = []
    for name, x in named:
        check_mesh(name, x, q.device_mesh)
        _check_dims(name, x, 4)
        layouts.append(Layout.of(x, 0, 2))
        layouts[-1].check_heads(name, x.shape[2])
        if inplace:
            _check_in_place(name, x, layouts[-1], table)
    if isinstance(position_ids, Tensor) and position_ids.shape[:1] == (1,):
        position_ids = position_ids.expand(q.shape[0], -1)
    # placed otherwise than q, k needs another part of the index, and more or fewer ranks count it in dfreq.
    calls = [(layouts[0], named)] if len(set(layouts)) == 1 else [(x, [y]) for x, y in zip(layouts, named, strict=True)]
    results: list[Any] = []
    for layout, call in calls:
        parts = [layout.local(name, x, 0, 2) for name, x in call]
        rotated = rotate(
            *(parts if len(parts) == 2 else (*parts, None)),
            layout.local_table(table, q.shape[0], False, debug),
            layout.rows("position_ids", position_ids, q.shape[0]),
            offset=offset,
            inplace=inplace,
            debug=debug,
        )
        results += [
            layout.whole(y, 0, 2, {0: x.shape[0], 2: x.shape[2]}) for (_, x), y in zip(call, rotated, strict=False)
        ]
    if inplace:
        results = [x for _, x in named]
        increment_version(results)
    return results[0], None if k is None else results[1]


def sharded_decode(
    attend: Callable[..., Any],
    q: "DTensor",
    k_cache: Any,
    v_cache: Any,
    table: Any,
    return_lse: bool,
    debug: bool,
    **options: Any,
) -> Any:
    """decode_attention() of DTensors, by `attend`, decode_attention() itself."""
    _check_dims("q", q, 4)
    layout = Layout.of(q, 0, 2)
    # sequences own slots of a cache, but not pages of a pool.
    batch = 0 if options["block_table"] is None else None
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_mesh(name, x, layout.mesh)
        _check_dims(name, x, 4)
    layout.check_heads("q", q.shape[2], k_cache.shape[2])
    for name in ("kv_end", "kv_start", "lengths", "block_table"):
        options[name] = layout.rows(name, options[name], q.shape[0])
    results = attend(
        layout.local("q", q, 0, 2),
        *(layout.local_cache(name, x, q, batch) for name, x in (("k_cache", k_cache), ("v_cache", v_cache))),
        layout.local_table(table, q.shape[0], True, debug),
        return_lse=return_lse,
        debug=debug,
        **options,
    )
    out, *lse = results if return_lse else (results,)
    out = layout.whole(out, 0, 2, {0: q.shape[0], 2: q.shape[2]})
    return (out, layout.whole(lse[0], 0, 1, {0: q.shape[0], 1: q.shape[2]})) if return_lse else out


def sharded_append(
    append: Callable[..., None],
    k: "DTensor",
    v: Any,
    k_cache: Any,
    v_cache: Any,
    kv_end: Any,
    block_table: Any,
    debug: bool,
) -> None:
    """append_kv() of DTensors, by `append`, append_kv() itself."""
    batch = 0 if block_table is None else None
    check_mesh("k_cache", k_cache, k.device_mesh)
    layout = Layout.of(k_cache, batch, 2)
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_mesh(name, x, layout.mesh)
        _check_dims(name, x, 4)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        layout.check_heads(name, x.shape[2])
        if x.placements != layout.placed(batch, 2):
            kinds = "Shard(0), " if batch == 0 else ""
            raise ValueError(
                f"{name}: expected placements among {kinds}Shard(2) and Replicate, the same of both caches, got"
                f" {x.placements}"
            )
    append(
        *(layout.local(name, x, batch, 2) for name, x in (("k", k), ("v", v))),
        *(x.to_local() for x in (k_cache, v_cache)),
        *(layout.rows(name, x, k.shape[0]) for name, x in (("kv_end", kv_end), ("block_table", block_table))),
        debug=debug,
    )
    increment_version((k_cache, v_cache))


def sharded_projection(
    project: Callable[..., Any],
    x: "DTensor",
    weight: Any,
    table: Any,
    num_heads: int,
    num_kv_heads: int,
    bias: Any,
    position_ids: Any,
    debug: bool,
    **options: Any,
) -> "tuple[DTensor, ...]":
    """qkv_rotary() of DTensors, by `project`, qkv_rotary() itself."""
    _check_dims("x", x, 3)
    Weights.of(weight, bias)
    is_split = isinstance(weight, (tuple, list))
    first = weight[0] if is_split else weight
    check_mesh("weight", first, x.device_mesh)
    # rows of a packed weight in a row belong to q or k or v: a part of them is no head's.
    places = zip(x.placements, first.placements, strict=True)
    splits = tuple(BATCH if a == Shard(0) else HEADS if is_split and b == Shard(0) else NOTHING for a, b in places)
    layout = Layout(x.device_mesh, splits)
    layout.check_heads("num_heads", num_heads, num_kv_heads)
    ranks = layout.count(HEADS)

    def local(name: str, whole: Any) -> Any:
        if whole is None or not is_split:
            return whole if whole is None else layout.local(name, whole, None, None)
        parts = [layout.local(f"{name}[0] (q)", whole[0], None, 0)]
        for i, letter in ((1, "k"), (2, "v")):
            parts.append(layout.local_keys(f"{name}[{i}] ({letter})", whole[i], num_kv_heads, None, 0))
        return parts

    if isinstance(position_ids, Tensor) and position_ids.shape[:1] == (1,):
        position_ids = position_ids.expand(x.shape[0], -1)
    results = project(
        layout.local("x", x, 0, None),
        local("weight", weight),
        layout.local_table(table, x.shape[0], False, debug),
        num_heads // ranks,
        max(num_kv_heads // ranks, 1),
        local("bias", bias),
        position_ids=layout.rows("position_ids", position_ids, x.shape[0]),
        debug=debug,
        **options,
    )
    return tuple(layout.whole(y, 0, 2, {0: x.shape[0], 2: y.shape[2] * ranks}) for y in results)


def _check_in_place(name: str, x: "DTensor", layout: Layout, table: RotaryTable | RotaryTableStack) -> None:
    """That what is written to is x's own memory, and that no gradient is lost."""
    if x.placements != layout.placed(0, 2):
        raise ValueError(f"{name}: expected Shard(0), Shard(2) or Replicate to be rotated in place, got {x.placements}")
    check_kind(table)
    if torch.is_grad_enabled() and (x.requires_grad or table.freq.requires_grad):
        raise ValueError("inplace: expected False where gradients of DTensors are wanted, or torch.no_grad()")
