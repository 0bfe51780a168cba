"""Rotary embedding of q and k by a RotaryTable, with gradients for q, k and freq.

For the pairs (x0, x1) = (x[..., i], x[..., R + i]), i < R, of a token at position p, with angle = p * freq[i]:

    y0 = x0 cos(angle) - x1 sin(angle)        y1 = x1 cos(angle) + x0 sin(angle)

Dimensions past 2R pass through. With x the gradient of y, the transposed map is the same rotation by -angle, and

    dangle = dy1 * y0 - dy0 * y1              dfreq[i] = sum of p * dangle over tokens and heads

so the rotated tensors are all that the backward pass needs; they are saved only if freq wants a gradient. freq enters
the operators for that alone: the angles come from the factored tables, row p being the complex product
coarse[p // F] * fine[p % F], and no gradient flows to those.

Shapes: q [B, L, H, D], k [B, L, G, D], freq [T, R], coarse [T, C, 2, R], fine [T, F, 2, R], positions [T or 1, C F],
index [B], position_ids [B or 1, L].
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from clex_kernels.config import check_flag
from clex_kernels.extension import library
from clex_kernels.rotary_checks import (
    check_in_place,
    check_no_tangent,
    check_operand,
    check_out,
    check_positions,
    stacked,
)
from clex_kernels.sharded_calls import sharded_rotary
from clex_kernels.sharding import is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack

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
library.define(
    "rotary_bwd_(Tensor(a!) dq, Tensor(b!)? dk, Tensor? q_out, Tensor? k_out, Tensor coarse, Tensor fine, "
    "Tensor? positions, Tensor? index, Tensor? position_ids, SymInt offset) -> Tensor"
)
library.define(
    "rotary_bwd_out(Tensor dq_out, Tensor? dk_out, Tensor(a!) dq, Tensor(b!)? dk, Tensor? q_out, Tensor? k_out, "
    "Tensor coarse, Tensor fine, Tensor? positions, Tensor? index, Tensor? position_ids, SymInt offset) -> Tensor"
)


def _fresh_like(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    # of strides that overlap it may make ones without unit stride in D.
    return y if y.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_outputs(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fresh_like(q), q.new_empty(0) if k is None else _fresh_like(k)


def _rotary_fake(q: Tensor, k: Tensor | None, *tables: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, k)


def _rotary_bwd_fake(
    dq_out: Tensor, dk_out: Tensor | None, q_out: Tensor | None, k_out: Tensor | None, coarse: Tensor, *tables: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dfreq = _rotary_bwd_in_place_fake(dq_out, dk_out, q_out, k_out, coarse, *tables)
    return *_empty_outputs(dq_out, dk_out), dfreq


def _rotary_bwd_in_place_fake(
    dq: Tensor, dk: Tensor | None, q_out: Tensor | None, k_out: Tensor | None, coarse: Tensor, *tables: Any
) -> Tensor:
    size = (0,) if q_out is None else (coarse.shape[0], coarse.shape[3])
    return dq.new_empty(size, dtype=torch.float64)


def _rotary_bwd_out_fake(
    dq_out: Tensor, dk_out: Tensor | None, dq: Tensor, dk: Tensor | None, *saved_and_tables: Any
) -> Tensor:
    return _rotary_bwd_in_place_fake(dq, dk, *saved_and_tables)


def _writing_fake(*arguments: Any) -> None:
    return None


torch.library.register_fake("clex::rotary", _rotary_fake, lib=library)
torch.library.register_fake("clex::rotary_", _writing_fake, lib=library)
torch.library.register_fake("clex::rotary_out", _writing_fake, lib=library)
torch.library.register_fake("clex::rotary_bwd", _rotary_bwd_fake, lib=library)
torch.library.register_fake("clex::rotary_bwd_", _rotary_bwd_in_place_fake, lib=library)
torch.library.register_fake("clex::rotary_bwd_out", _rotary_bwd_out_fake, lib=library)


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


def _rotary_in_place_cuda(q: Tensor, k: Tensor | None, *tables: Any) -> None:
    _rotary_out_cuda(q, k, *tables, q, k)


def _rotary_cuda(
    q: Tensor, k: Tensor | None, freq: Tensor, coarse: Tensor, fine: Tensor, positions: Tensor | None, *where: Any
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _empty_outputs(q, k)
    _rotary_out_cuda(q, k, coarse, fine, *where, False, q_out, None if k is None else k_out)
    return q_out, k_out


def sum_per_table(per_sequence: Tensor, index: Tensor | None, tables: int) -> Tensor:
    """[T, R] from [B, R]: the sum over the sequences that use a table, always in the same order."""
    numbers = torch.arange(tables, device=per_sequence.device)
    if index is None:
        index = numbers.expand(per_sequence.shape[0])
    # a masked sum, since index_add_ on CUDA adds in no fixed order and a product with a mask would spread NaN.
    chosen = (index == numbers[:, None])[:, :, None]
    return torch.where(chosen, per_sequence, 0.0).sum(dim=1)


def _rotary_bwd_out_cuda(
    dq_out: Tensor,
    dk_out: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
    q_out: Tensor | None,
    k_out: Tensor | None,
    coarse: Tensor,
    fine: Tensor,
    positions: Tensor | None,
    index: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> Tensor:
    from clex_kernels.kernels.rotary import launch_rotary_bwd

    if q_out is None:
        _rotary_out_cuda(dq_out, dk_out, coarse, fine, index, position_ids, offset, True, dq, dk)
        return dq_out.new_empty(0, dtype=torch.float64)
    if positions is not None:
        positions = positions.contiguous()
    per_sequence = launch_rotary_bwd(
        dq_out, dk_out, q_out, k_out, dq, dk, coarse, fine, positions, index, position_ids, offset
    )
    return sum_per_table(per_sequence, index, coarse.shape[0])


def _rotary_bwd_cuda(dq_out: Tensor, dk_out: Tensor | None, *saved: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = _empty_outputs(dq_out, dk_out)
    return dq, dk, _rotary_bwd_out_cuda(dq_out, dk_out, dq, None if dk_out is None else dk, *saved)


def _rotary_bwd_in_place_cuda(dq: Tensor, dk: Tensor | None, *saved: Any) -> Tensor:
    return _rotary_bwd_out_cuda(dq, dk, dq, dk, *saved)


library.impl("rotary", _rotary_cuda, "CUDA")
library.impl("rotary_", _rotary_in_place_cuda, "CUDA")
library.impl("rotary_out", _rotary_out_cuda, "CUDA")
library.impl("rotary_bwd", _rotary_bwd_cuda, "CUDA")
library.impl("rotary_bwd_", _rotary_bwd_in_place_cuda, "CUDA")
library.impl("rotary_bwd_out", _rotary_bwd_out_cuda, "CUDA")


def _gradients(
    ctx: Any, gradients: tuple[Tensor | None, ...], rotated: tuple[Tensor | None, ...], *tables: Any
) -> tuple[list[Tensor | None], Tensor | None]:
    """The gradients of the rotated tensors' sources, None where none came, and dfreq."""
    present = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
    sources: list[Tensor | None] = [None] * len(gradients)
    if not present:
        return sources, None
    # the gradient of a sum is an expanded scalar, and the kernels need unit stride in D.
    dense = [gradient if gradient.stride(-1) == 1 else gradient.contiguous() for _, gradient in present]
    saved = [rotated[i] for i, _ in present]
    pad = [None] * (2 - len(present))
    *outputs, dfreq = torch.ops.clex.rotary_bwd(*dense, *pad, *saved, *pad, *tables, ctx.offset)
    for (i, _), gradient in zip(present, outputs, strict=False):
        sources[i] = gradient
    return sources, None if saved[0] is None else dfreq


class _Rotary(torch.autograd.Function):
    """Autograd of clex::rotary, also registered for the operator itself, whose own way in is slower."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.clex.rotary(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, k, freq, *tables, offset = inputs
        ctx.has_k, ctx.offset = k is not None, offset
        ctx.set_materialize_grads(False)
        q_out, k_out = output if freq.requires_grad else (None, None)
        ctx.save_for_backward(q_out, k_out if ctx.has_k else None, *tables)

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None) -> tuple[Tensor | None, ...]:
        q_out, k_out, *tables = ctx.saved_tensors
        (dq, dk), dfreq = _gradients(ctx, (dq_out, dk_out if ctx.has_k else None), (q_out, k_out), *tables)
        return dq, dk, dfreq, None, None, None, None, None, None


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("apply_rotary: its gradient can't be differentiated again (no second derivatives)")


torch.library.register_autograd("clex::rotary", _Rotary.backward, setup_context=_Rotary.setup_context, lib=library)
torch.library.register_autograd("clex::rotary_bwd", _no_second_derivative, setup_context=_no_context, lib=library)


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


def _rotate_in_place(q: Tensor, k: Tensor | None, *tables: Any) -> tuple[Tensor, Tensor | None]:
    unwritten = _Unwritten()
    q = _RotaryInPlace.apply(q, *tables, unwritten)
    if k is not None:
        k = _RotaryInPlace.apply(k, *tables, unwritten)
    unwritten.seal(q, k)
    return q, k


def _mark_written(*tensors: Tensor | None) -> None:
    """Lets autograd notice if a backward pass needs what was there; the operators do not tell it."""
    if not torch.compiler.is_compiling():
        increment_version([x for x in tensors if x is not None])


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
    """Rotates q and k; differentiable in q, k and the table's freq. DTensors: see sharding.py.

    Reentrant checkpointing sends gradients only to tensors it is given, and runs the graph behind others once per
    layer: where the table's freq is computed, as by `sample`, pass it by itself and use dataclasses.replace(table,
    freq=freq) inside, or take use_reentrant=False, which needs nothing.

    Args:
        q: [B, L, H, D], any strides with unit stride in D; fp32, fp16, bf16, or fp64 on the CPU (with an fp64 table).
        k: [B, L, G, D] of q's dtype and device, or None.
        table: angles of the positions 0..length-1, for all sequences, or a stack that holds one table per sequence.
        position_ids: int64 [B or 1, L], each token's row of the table; default 0..L-1.
        offset: added to every position (tokens).
        inplace: overwrite q and k, which may be slices of one buffer but must not share elements. Where gradients are
            wanted, autograd refuses views by split, chunk or unbind, and by then their values are rotated.
        out: tensors to write to, like q and k; they may be q and k themselves but not overlap them otherwise. Not
            differentiable.
        debug: also check values that live on a device (synchronises); otherwise a bad position there, or anywhere in
            compiled code, gives NaN rows.

    Returns:
        The rotated q and k: new tensors, or q and k (inplace), or out.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or strides don't fit, or a position lies outside the table.
        RuntimeError: a leaf that requires grad is rotated in place, or a forward-mode derivative is asked for.
    """
    check_flag("inplace", inplace)
    if is_dtensor(q):
        return sharded_rotary(apply_rotary, q, k, table, position_ids, inplace, out, debug, offset)
    check_operand("q", q, q)
    if k is not None:
        check_operand("k", k, q)
    freq, coarse, fine, positions, index = stacked(q, q.shape[3], table, q.shape[0], debug)
    check_positions(q, coarse.shape[1] * fine.shape[1], position_ids, offset, debug)
    check_no_tangent("apply_rotary", q, k, freq)
    wants_grad = torch.is_grad_enabled() and (
        q.requires_grad or freq.requires_grad or (k is not None and k.requires_grad)
    )
    if out is not None:
        q_out, k_out = check_out(q, k, out, inplace, wants_grad)
        torch.ops.clex.rotary_out(q, k, coarse, fine, index, position_ids, offset, False, q_out, k_out)
        _mark_written(q_out, k_out)
        return q_out, k_out
    if inplace:
        check_in_place(q, k, wants_grad)
        if not wants_grad:
            torch.ops.clex.rotary_(q, k, coarse, fine, index, position_ids, offset, False)
            _mark_written(q, k)
            return q, k
    tables = (freq, coarse, fine, positions, index, position_ids, offset)
    if inplace and not torch.compiler.is_compiling():
        return _rotate_in_place(q, k, *tables)
    # under the compiler the operator has less to trace.
    rotate = _Rotary.apply if wants_grad and not torch.compiler.is_compiling() else torch.ops.clex.rotary
    q_out, k_out = rotate(q, k, *tables)
    if inplace:
        # the compiler turns code in place into functions anyway.
        q_out, k_out = q.copy_(q_out), k if k is None else k.copy_(k_out)
    return q_out, None if k is None else k_out
