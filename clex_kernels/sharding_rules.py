"""Sharding rules of the operators, for DTensors that meet them without the public functions, as in a captured graph.

A dimension of the mesh may split the batch or the heads of every tensor that has them, or nothing; dfreq, a sum over
both, comes out as parts of a sum (Partial), and reduces when it is used. DTensor takes what costs least to get to.

Heads are split where n ranks divide H and G. (Ranks that share key heads are for the public functions, which know the
ranks; see sharding.py.) The batch is not split where sequences are packed in a row, or have a table each without an
index. `append`, `rotary_` and whatever else writes to its arguments has no rule, and DTensor refuses it: it would move
them first, and what is written to the copy would be lost.
"""

from collections.abc import Callable
from typing import Any

import torch

if torch.distributed.is_available():
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard

# the dimensions of the batch and of the heads, by the arguments' names; other tensors are whole on every rank.
_OPERAND, _BY_HEAD, _BY_SEQUENCE, _WHOLE = (0, 2), (0, 1), (0, None), (None, None)
_ARGUMENTS = {
    **dict.fromkeys(
        ("q", "k", "v", "out", "dout", "dq_out", "dk_out", "q_out", "k_out", "k_cache", "v_cache"), _OPERAND
    ),
    **dict.fromkeys(("lse", "dlse"), _BY_HEAD),
    **dict.fromkeys(("x", "index", "position_ids", "block_table"), _BY_SEQUENCE),
    **dict.fromkeys(("kv_start", "kv_end", "lengths", "q_offsets", "k_offsets"), _BY_SEQUENCE),
}
_SUM = "sum"


def _attention(given: dict[str, Any]) -> list[Any]:
    # what is not saved comes back empty.
    saved = (given["save"] and given[name] for name in ("rotate_q", "rotate_k"))
    return [_OPERAND, _BY_HEAD, *(_OPERAND if is_saved else _WHOLE for is_saved in saved)]


def _attention_bwd(given: dict[str, Any]) -> list[Any]:
    return [_OPERAND, _OPERAND, _OPERAND, _SUM if given["wants_dfreq"] else _WHOLE]


def _rotary(given: dict[str, Any]) -> list[Any]:
    return [_OPERAND, _WHOLE if given["k"] is None else _OPERAND]


def _rotary_bwd(given: dict[str, Any]) -> list[Any]:
    return [
        _OPERAND,
        _WHOLE if given["dk_out"] is None else _OPERAND,
        _WHOLE if given["q_out"] is None else _SUM,
    ]


def _decode(given: dict[str, Any]) -> list[Any]:
    return [_OPERAND, _BY_HEAD if given["with_lse"] else _WHOLE]


def _qkv_rotary(given: dict[str, Any]) -> list[Any]:
    # heads of q, k and v lie in one dimension of qkv, no part of which is a rank's.
    return [_BY_SEQUENCE, _BY_SEQUENCE if given["rotated_keys"] and given["raw_keys"] else _WHOLE]


_OUTPUTS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "attention": _attention,
    "attention_bwd": _attention_bwd,
    "rotary": _rotary,
    "rotary_bwd": _rotary_bwd,
    "decode": _decode,
    "qkv_rotary": _qkv_rotary,
}


def _splits(given: dict[str, Any]) -> list[int]:
    """What may be split: 0, the batch; 1, the heads."""
    splits = []
    has_own_tables = given["coarse"].shape[0] > 1 and given["index"] is None and given.get("train_length") is None
    if given.get("cu_seqlens_q") is None and not has_own_tables:
        splits.append(0)
    operands = [x for name, x in given.items() if _ARGUMENTS.get(name) == _OPERAND and x is not None]
    # a rule is one for each dimension of the mesh, any of which may split heads.
    if operands and all(x.shape[2] % x.mesh.size() == 0 for x in operands):
        splits.append(1)
    return splits


def _dims(name: str, given: dict[str, Any]) -> tuple[int | None, int | None]:
    batch, heads = _ARGUMENTS.get(name, _WHOLE)
    is_pool = name in ("k_cache", "v_cache") and given["block_table"] is not None
    is_row = name == "position_ids" and given[name].shape[0] == 1
    return None if is_pool or is_row else batch, heads


def _place(dim: int | None) -> "Placement":
    return Replicate() if dim is None else Shard(dim)


def _rule(names: list[str], outputs: Callable[[dict[str, Any]], list[Any]]) -> Callable[..., list[Any]]:
    def rule(*arguments: Any) -> list[Any]:
        given = dict(zip(names, arguments, strict=True))
        results = outputs(given)
        tensors = [name if hasattr(x, "tensor_meta") else None for name, x in given.items()]
        whole = [None if name is None else Replicate() for name in tensors]
        accepted = [([Replicate() for _ in results], whole)]
        for split in _splits(given):
            out = [Partial() if dims == _SUM else _place(dims[split]) for dims in results]
            accepted.append((out, [None if name is None else _place(_dims(name, given)[split]) for name in tensors]))
        return accepted

    return rule


def register_rules() -> None:
    """Tells DTensor, once, what it may do with the operators, all of which must have been defined."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor.experimental import register_sharding

    for name, outputs in _OUTPUTS.items():
        op = getattr(torch.ops.clex, name).default
        register_sharding(op)(_rule([argument.name for argument in op._schema.arguments], outputs))
