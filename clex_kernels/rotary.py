"""Rotary embedding of q and k by a RotaryTable, with gradients for q, k and freq.

For the pairs (x0, x1) = (x[..., i], x[..., R + i]), i < R, of a token at position p, with angle = p * freq[i]:

    y0 = x0 cos(angle) - x1 sin(angle)        y1 = x1 cos(angle) + x0 sin(angle)

Dimensions past 2R pass through. With x the gradient of y, the transposed map is the same rotation by -angle, and

    dangle = dy1 * y0 - dy0 * y1              dfreq[i] = sum of p * dangle over tokens and heads

so the rotated tensors are all that the backward pass needs, and they are saved only if freq wants a gradient. freq enters
the operators for that alone: the angles come from the factored tables, row p being the complex product
coarse[p // F] * fine[p % F], and no gradient flows to those.

Shapes: q [B, L, H, D], k [B, L, G, D], freq [T, R], coarse [T, C, 2, R], fine [T, F, 2, R], positions [T or 1, C F],
index [B], position_ids [B or 1, L].
"""

from typing import Any

import torch
from torch import Tensor

from clex_kernels.extension import library
from clex_kernels.tables import RotaryTable, RotaryTableStack

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

library.define(
    "rotary(Tensor q, Tensor? k, Tensor freq, Tensor coarse, Tensor fine, Tensor? positions, Tensor? index, "
    "Tensor? position_ids, SymInt offset) -> (Tensor, Tensor)"
)
library.define(
    "rotary_(Tensor(a!) q, Tensor(b!)? k, Tensor coarse, Tensor fine, Tensor? index, Tensor? position_ids, "
    "SymInt offset, bool conjugate) -> ()"
)
library.define(
    "rotary_out(Tensor q, Tensor? k, Tensor coarse, Tensor fine, Tensor? index, Tensor? position_ids, SymInt offset, "
    "bool conjugate, Tensor(a!) q_out, Tensor(b!)? k_out) -> ()"
)
library.define(
    "rotary_bwd(Tensor dq_out, Tensor? dk_out, Tensor? q_out, Tensor? k_out, Tensor coarse, Tensor fine, "
    "Tensor? positions, Tensor? index, Tensor? position_ids, SymInt offset) -> (Tensor, Tensor, Tensor)"
)


def _empty_outputs(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _rotary_fake(
    q: Tensor,
    k: Tensor | None,
    freq: Tensor,
    coarse: Tensor,
    fine: Tensor,
    positions: Tensor | None,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, k)


def _rotary_in_place_fake(*arguments: Any) -> None:
    return None


def _rotary_bwd_fake(
    dq_out: Tensor,
    dk_out: Tensor | None,
    q_out: Tensor | None,
    k_out: Tensor | None,
    coarse: Tensor,
    fine: Tensor,
    positions: Tensor | None,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = (0,) if q_out is None else (coarse.shape[0], coarse.shape[3])
    return *_empty_outputs(dq_out, dk_out), dq_out.new_empty(size, dtype=torch.float64)


torch.library.register_fake("clex::rotary", _rotary_fake, lib=library)
torch.library.register_fake("clex::rotary_", _rotary_in_place_fake, lib=library)
torch.library.register_fake("clex::rotary_out", _rotary_in_place_fake, lib=library)
torch.library.register_fake("clex::rotary_bwd", _rotary_bwd_fake, lib=library)


def _rotary_out_cuda(
    q: Tensor,
    k: Tensor | None,
    coarse: Tensor,
    fine: Tensor,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    conjugate: bool,
    q_out: Tensor,
    k_out: Tensor | None,
) -> None:
    # imported at the first call: Triton does not exist on every platform.
    from clex_kernels.kernels.rotary import launch_rotary

    launch_rotary(q, k, q_out, k_out, coarse, fine, index, position_ids, offset, conjugate)


def _rotary_in_place_cuda(
    q: Tensor,
    k: Tensor | None,
    coarse: Tensor,
    fine: Tensor,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    conjugate: bool,
) -> None:
    _rotary_out_cuda(q, k, coarse, fine, index, position_ids, offset, conjugate, q, k)


def _rotary_cuda(
    q: Tensor,
    k: Tensor | None,
    freq: Tensor,
    coarse: Tensor,
    fine: Tensor,
    positions: Tensor | None,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty_outputs(q, k)
    kept_k = None if k is None else k_out
    _rotary_out_cuda(q, k, coarse, fine, index, position_ids, offset, False, q_out, kept_k)
    return q_out, k_out


def _rotary_bwd_cuda(
    dq_out: Tensor,
    dk_out: Tensor | None,
    q_out: Tensor | None,
    k_out: Tensor | None,
    coarse: Tensor,
    fine: Tensor,
    positions: Tensor | None,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from clex_kernels.kernels.rotary import launch_rotary_bwd

    dq, dk = _empty_outputs(dq_out, dk_out)
    kept_dk = None if dk_out is None else dk
    if q_out is None:
        _rotary_out_cuda(dq_out, dk_out, coarse, fine, index, position_ids, offset, True, dq, kept_dk)
        return dq, dk, dq_out.new_empty(0, dtype=torch.float64)
    per_sequence = launch_rotary_bwd(
        dq_out, dk_out, q_out, k_out, dq, kept_dk, coarse, fine, positions, index, position_ids, offset
    )
    tables = torch.arange(coarse.shape[0], device=dq.device)
    if index is None:
        index = tables.expand(dq.shape[0])
    # a masked sum, since index_add_ on CUDA adds in no fixed order and a product with a mask would spread NaN.
    chosen = (index == tables[:, None])[:, :, None]
    return dq, dk, torch.where(chosen, per_sequence, 0.0).sum(dim=1)


library.impl("rotary", _rotary_cuda, "CUDA")
library.impl("rotary_", _rotary_in_place_cuda, "CUDA")
library.impl("rotary_out", _rotary_out_cuda, "CUDA")
library.impl("rotary_bwd", _rotary_bwd_cuda, "CUDA")


def _gradients(
    ctx: Any, gradients: tuple[Tensor | None, ...], rotated: tuple[Tensor | None, ...], *tables: Any
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of the rotated tensors' sources, None where none came, and dfreq."""
    present = [i for i, gradient in enumerate(gradients) if gradient is not None]
    sources: list[Tensor | None] = [None] * len(gradients)
    if not present:
        return sources, None
    # the gradient of a sum is an expanded scalar, and the kernels need unit stride in D.
    dense = [gradients[i] if gradients[i].stride(-1) == 1 else gradients[i].contiguous() for i in present]
    saved = [rotated[i] for i in present]
    pad = [None] * (2 - len(present))
    *outputs, dfreq = torch.ops.clex.rotary_bwd(*dense, *pad, *saved, *pad, *tables, ctx.offset)
    for i, gradient in zip(present, outputs, strict=False):
        sources[i] = gradient
    return sources, None if saved[0] is None else dfreq


def _rotary_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, freq, coarse, fine, positions, index, position_ids, offset = inputs
    q_out, k_out = output if freq.requires_grad else (None, None)
    ctx.has_k, ctx.offset = k is not None, offset
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_out, k_out if ctx.has_k else None, coarse, fine, positions, index, position_ids)


def _rotary_backward(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None) -> tuple[Tensor | None, ...]:
    q_out, k_out, *tables = ctx.saved_tensors
    (dq, dk), dfreq = _gradients(ctx, (dq_out, dk_out if ctx.has_k else None), (q_out, k_out), *tables)
    return dq, dk, dfreq, None, None, None, None, None, None


def _rotary_bwd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _rotary_bwd_backward(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("apply_rotary: its gradient can't be differentiated again (no second derivatives)")


torch.library.register_autograd("clex::rotary", _rotary_backward, setup_context=_rotary_setup, lib=library)
torch.library.register_autograd("clex::rotary_bwd", _rotary_bwd_backward, setup_context=_rotary_bwd_setup, lib=library)


class _Unwritten:
    """Notices writes to rotated tensors that dfreq still needs.

    Autograd's own check can't serve in place: q and k may be views of one packed buffer, whose version counter moves on
    when k is rotated after q was saved.
    """

    def __init__(self) -> None:
        self._versions: list[tuple[Tensor, int]] = []

    def seal(self, *rotated: Tensor | None) -> None:
        self._versions = [(x.detach(), x._version) for x in rotated if x is not None]

    def check(self) -> None:
        for x, version in self._versions:
            if x._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{list(x.shape)}, rotated in place by apply_rotary, is at version {x._version}; "
                    f"expected version {version} instead"
                )


class _RotaryInPlace(torch.autograd.Function):
    """One tensor per call: autograd lets a function write to one view of a buffer only."""

    @staticmethod
    def forward(
        x: Tensor,
        freq: Tensor,
        coarse: Tensor,
        fine: Tensor,
        positions: Tensor | None,
        index: Tensor | None,
        position_ids: Tensor | None,
        offset: int,
        unwritten: _Unwritten,
    ) -> Tensor:
        torch.ops.clex.rotary_(x, None, coarse, fine, index, position_ids, offset, False)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, freq, *tables, offset, unwritten = inputs
        ctx.mark_dirty(x)
        ctx.offset, ctx.unwritten = offset, unwritten
        # .data has a version counter of its own: `unwritten` checks in its place.
        ctx.save_for_backward(x.data if freq.requires_grad else None, *tables)

    @staticmethod
    def backward(ctx: Any, dx_out: Tensor) -> tuple[Tensor | None, ...]:
        rotated, *tables = ctx.saved_tensors
        if rotated is not None:
            ctx.unwritten.check()
        (dx,), dfreq = _gradients(ctx, (dx_out,), (rotated,), *tables)
        return dx, dfreq, None, None, None, None, None, None, None


def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    table: RotaryTable | RotaryTableStack,
    position_ids: Tensor | None = None,
    offset: int = 0,
    inplace: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
    debug: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates q and k; differentiable in q, k and the table's freq.

    Args:
        q: [B, L, H, D], any strides with unit stride in D; fp32, fp16, bf16, or fp64 on the CPU (with an fp64 table).
        k: [B, L, G, D] of q's dtype and device, or None.
        table: angles of the positions 0..length-1, for all sequences, or a stack that holds one table per sequence.
        position_ids: int64 [B or 1, L], each token's row of the table; default 0..L-1.
        offset: added to every position (tokens).
        inplace: overwrite q and k, which may be views of one buffer but must not share elements.
        out: tensors to write to, like q and k; they may be q and k themselves but not overlap them otherwise. Not
            differentiable.
        debug: also check values that live on a device (synchronises); otherwise a bad position there gives NaN rows.

    Returns:
        The rotated q and k: new tensors, or q and k (inplace), or out.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or strides don't fit, or a position lies outside the table.
        RuntimeError: a leaf that requires grad is rotated in place.
    """
    _check_operand("q", q, q, table)
    if k is not None:
        _check_operand("k", k, q, table)
    freq, coarse, fine, positions, index = _stacked(q, table, debug)
    _check_positions(q, coarse.shape[1] * fine.shape[1], position_ids, offset, debug)
    wants_grad = torch.is_grad_enabled() and (
        q.requires_grad or freq.requires_grad or (k is not None and k.requires_grad)
    )
    if out is not None:
        q_out, k_out = _check_out(q, k, out, inplace, wants_grad)
        torch.ops.clex.rotary_out(q, k, coarse, fine, index, position_ids, offset, False, q_out, k_out)
        return q_out, k_out
    if not inplace:
        q_out, k_out = torch.ops.clex.rotary(q, k, freq, coarse, fine, positions, index, position_ids, offset)
        return q_out, None if k is None else k_out

    _check_in_place(q, k, wants_grad)
    if not wants_grad:
        torch.ops.clex.rotary_(q, k, coarse, fine, index, position_ids, offset, False)
        return q, k
    tables = (freq, coarse, fine, positions, index, position_ids, offset)
    if torch.compiler.is_compiling():
        # the compiler turns in-place code into functions anyway, and then knows nothing of versions.
        q_out, k_out = torch.ops.clex.rotary(q, k, *tables)
        return q.copy_(q_out), None if k is None else k.copy_(k_out)
    unwritten = _Unwritten()
    q = _RotaryInPlace.apply(q, *tables, unwritten)
    if k is not None:
        k = _RotaryInPlace.apply(k, *tables, unwritten)
    unwritten.seal(q, k)
    return q, k


def _on_host(x: Tensor) -> bool:
    """Whether x's values can be looked at for nothing: not on a device, nor while something is traced."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _check_operand(name: str, x: Tensor, q: Tensor, table: RotaryTable | RotaryTableStack) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x is not q and (x.dtype != q.dtype or x.device != q.device):
        error = TypeError if x.dtype != q.dtype else ValueError
        raise error(f"{name}: expected q's {q.dtype} on {q.device}, got {x.dtype} on {x.device}")
    if x.dtype not in _DTYPES or (x.dtype == torch.float64 and x.device.type == "cuda"):
        raise TypeError(f"{name}: expected float32, float16, bfloat16, or float64 on the CPU, got {x.dtype}")
    heads = "H" if x is q else "G"
    if x.dim() != 4:
        raise ValueError(f"{name}: expected shape [B, L, {heads}, D], got {list(x.shape)}")
    if x is not q and (x.shape[0], x.shape[1], x.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        b, length, _, d = q.shape
        raise ValueError(f"{name}: expected shape [B={b}, L={length}, G, D={d}] as q's, got {list(x.shape)}")
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"{name}: expected unit stride in D, got strides {list(x.stride())}")
    if not isinstance(table, (RotaryTable, RotaryTableStack)):
        raise TypeError(f"table: expected a RotaryTable or RotaryTableStack, got {type(table).__name__}")
    rotary_dim = 2 * table.coarse.shape[-1]
    if rotary_dim > x.shape[3]:
        raise ValueError(f"table: expected a rotary dimension 2R of at most D={x.shape[3]}, got {rotary_dim}")


def _stacked(
    q: Tensor, table: RotaryTable | RotaryTableStack, debug: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """freq, coarse, fine and positions with a leading T, and the index of each sequence."""
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if table.coarse.dtype != wanted:
        raise TypeError(f"table: expected dtype {wanted} for q of {q.dtype}, got {table.coarse.dtype}")
    if table.coarse.device != q.device:
        raise ValueError(f"table: expected it on q's device {q.device}, got {table.coarse.device}")
    if isinstance(table, RotaryTable):
        positions = None if table.positions is None else table.positions.unsqueeze(0)
        return table.freq.unsqueeze(0), table.coarse.unsqueeze(0), table.fine.unsqueeze(0), positions, None
    _check_index(q, table.index, table.coarse.shape[0], debug)
    return table.freq, table.coarse, table.fine, table.positions, table.index


def _check_index(q: Tensor, index: Tensor | None, tables: int, debug: bool) -> None:
    batch = q.shape[0]
    if index is None:
        if tables not in (1, batch):
            raise ValueError(f"table: a stack of T={tables} needs an index [B={batch}], call table.select(lengths)")
        return
    if index.dtype != torch.int64:
        raise TypeError(f"table.index: expected int64, got {index.dtype}")
    if index.shape != (batch,) or index.device != q.device:
        raise ValueError(
            f"table.index: expected shape [B={batch}] on {q.device}, got {list(index.shape)} on {index.device}"
        )
    if index.numel() > 0 and (_on_host(index) or debug):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= tables:
            raise ValueError(f"table.index: expected values in [0, T={tables}), got {low} to {high}")


def _check_positions(q: Tensor, length: int, position_ids: Tensor | None, offset: int, debug: bool) -> None:
    batch, tokens = q.shape[:2]
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset: expected an int, got {type(offset).__name__}")
    if position_ids is None:
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        if offset + tokens > length:
            raise ValueError(
                f"offset: expected offset + L to stay within the table's {length} positions, got {offset} + {tokens}"
            )
        return
    if not isinstance(position_ids, Tensor) or position_ids.dtype != torch.int64:
        got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids: expected an int64 tensor, got {got}")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise ValueError(
            f"position_ids: expected shape [B={batch} or 1, L={tokens}], got {list(position_ids.shape)}"
        )
    if position_ids.device != q.device:
        raise ValueError(f"position_ids: expected it on q's device {q.device}, got {position_ids.device}")
    if position_ids.numel() > 0 and (_on_host(position_ids) or debug):
        low, high = (int(bound) + offset for bound in position_ids.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"position_ids: expected positions in [0, {length}), got {low} to {high}")


def _check_writable(name: str, x: Tensor) -> None:
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name}: can't be written to, since elements share memory (strides {list(x.stride())})")


def _check_distinct(names: str, first: Tensor, second: Tensor | None) -> None:
    if second is None:
        return
    shared = first is second
    if not shared and _on_host(first) and _on_host(second) and first.numel() > 0 and second.numel() > 0:
        shared = first.data_ptr() == second.data_ptr()
    if shared:
        raise ValueError(f"{names}: expected tensors that share no memory")


def _check_in_place(q: Tensor, k: Tensor | None, wants_grad: bool) -> None:
    _check_distinct("q, k", q, k)
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        _check_writable(name, x)
        # autograd says the same, but only after the values are gone.
        base = x._base if x._is_view() else x
        if wants_grad and base.is_leaf and base.requires_grad:
            raise RuntimeError(f"{name}: a leaf (or a view of one) that requires grad can't be rotated in place")


def _check_out(
    q: Tensor, k: Tensor | None, out: tuple[Tensor, Tensor | None], inplace: bool, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    if inplace:
        raise ValueError("out: expected None together with inplace=True")
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError("out: expected (q_out, k_out)")
    q_out, k_out = out
    if (k_out is None) != (k is None):
        raise ValueError("out: expected k_out to be None where k is, and only there")
    if wants_grad or any(x is not None and x.requires_grad for x in out):
        raise ValueError("out: not differentiable, expected tensors that need no gradient (or torch.no_grad())")
    for name, source, target in (("out[0]", q, q_out), ("out[1]", k, k_out)):
        if source is None:
            continue
        if not isinstance(target, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(target).__name__}")
        if (target.shape, target.dtype, target.device) != (source.shape, source.dtype, source.device):
            raise ValueError(
                f"{name}: expected {list(source.shape)} {source.dtype} on {source.device}, "
                f"got {list(target.shape)} {target.dtype} on {target.device}"
            )
        if target.shape[3] > 1 and target.stride(3) != 1:
            raise ValueError(f"{name}: expected unit stride in D, got strides {list(target.stride())}")
        _check_writable(name, target)
    _check_distinct("out", q_out, k_out)
    return q_out, k_out
