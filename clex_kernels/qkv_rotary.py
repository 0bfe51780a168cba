"""Rotary embedding inside the projection to q, k and v: from hidden states to rotated q and k, and v, in one call.

    [q, k, v] = x W^T + bias        q, k = rotary(q, k), as in rotary.py

Two ways lead there. The Triton kernel (kernels/qkv_rotary.py), and for few tokens on the CPU the C++ one
(csrc/qkv_rotary.cpp), rotate in the epilogue of the product, before q and k are written for the first time. The other
way takes torch's product, then rotates q and k where they lie, in the packed result: v is not touched again.
`choose_backend` says which is taken on a GPU.

Backward, with dq, dk and dv as they come:

    dqkv = [rotary^-1(dq), rotary^-1(dk), dv]       dx = dqkv W       dW = dqkv^T x       dbias = sum of dqkv

The gradients have to be brought into one tensor for these products: that pass rotates them back and sums dfreq, from
the rotated q and k, which are saved only if freq wants a gradient.

Shapes: x [B, L, C], weight [(H + 2G) D, C], or [H D, C], [G D, C], [G D, C]; bias without C; qkv [B, L, H + 2G, D],
q [B, L, H, D], k and v [B, L, G, D]; tables as in rotary.py. The operators take three weights as q's, k's and v's, one
as the first alone; biases alike.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clex_kernels.attention_terms import Tables
from clex_kernels.autocast import autocast
from clex_kernels.deterministic import fixed_products
from clex_kernels.extension import library
from clex_kernels.qkv_rotary_checks import KEYS, OneOrThree, Weights, check_choices, check_projection
from clex_kernels.rotary_checks import check_no_tangent, check_positions, stacked
from clex_kernels.sharded_calls import sharded_projection
from clex_kernels.sharding import is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack

# tokens up to which a GPU waits for the weights, whatever multiplies them.
FEW_TOKENS = 64

_WEIGHTS = len(Weights._fields)

library.define(
    "qkv_rotary(Tensor x, Tensor weight, Tensor? k_weight, Tensor? v_weight, Tensor? bias, Tensor? k_bias, "
    "Tensor? v_bias, Tensor freq, Tensor coarse, Tensor fine, Tensor? positions, Tensor? index, Tensor? position_ids, "
    "SymInt offset, SymInt num_heads, SymInt num_kv_heads, bool rotated_keys, bool raw_keys, "
    "bool fused) -> (Tensor qkv, Tensor k_rotated)"
)


def _heads_of(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of [B, L, H + 2G, D]."""
    return qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)


def _empty_outputs(x: Tensor, weights: Weights, num_heads: int, num_kv_heads: int, both: bool) -> tuple[Tensor, Tensor]:
    """qkv, and k_rotated where raw keys are wanted beside rotated ones."""
    dims = weights.weight.shape[0] // (num_heads + 2 * num_kv_heads if weights.is_packed else num_heads)
    qkv = x.new_empty((*x.shape[:2], num_heads + 2 * num_kv_heads, dims))
    return qkv, x.new_empty((*x.shape[:2], num_kv_heads, dims) if both else 0)


def _qkv_rotary_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, num_heads, num_kv_heads, rotated_keys, raw_keys, _ = arguments
    return _empty_outputs(x, Weights(*arguments[:_WEIGHTS]), num_heads, num_kv_heads, rotated_keys and raw_keys)


torch.library.register_fake("clex::qkv_rotary", _qkv_rotary_fake, lib=library)


def _multiply(x: Tensor, weights: Weights, num_heads: int, num_kv_heads: int) -> Tensor:
    """x W^T + bias as qkv, where three weights write to their parts of it."""
    rows, heads = x.reshape(-1, x.shape[2]), num_heads + 2 * num_kv_heads
    if weights.is_packed:
        product = F.linear(rows, weights.weight, weights.bias)
    else:
        product = x.new_empty((len(rows), heads * weights.weight.shape[0] // num_heads))
        parts = product.split([weight.shape[0] for weight in weights[:3]], dim=1)
        for weight, bias, part in zip(weights[:3], weights[3:], parts, strict=True):
            if bias is None:
                torch.mm(rows, weight.t(), out=part)
            else:
                torch.addmm(bias, rows, weight.t(), out=part)
    return product.view(*x.shape[:2], heads, product.shape[1] // heads)


def _multiply_and_rotate(
    x: Tensor, weights: Weights, where: tuple[Any, ...], num_heads: int, num_kv_heads: int, keys: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The product, then q rotated in place, and k there, or where raw ones are kept beside them; `keys` as in KEYS."""
    qkv = _multiply(x, weights, num_heads, num_kv_heads)
    q, k, _ = _heads_of(qkv, num_heads, num_kv_heads)
    torch.ops.clex.rotary_(q, k if keys == KEYS["rotated"] else None, *where, False)
    if keys != KEYS["both"]:
        return qkv, qkv.new_empty(0)
    k_rotated = torch.empty_like(k, memory_format=torch.contiguous_format)
    torch.ops.clex.rotary_out(k, None, *where, False, k_rotated, None)
    return qkv, k_rotated


def _qkv_rotary_cuda(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weights, (_, coarse, fine, positions, index, *rest) = Weights(*arguments[:_WEIGHTS]), arguments[_WEIGHTS:]
    position_ids, offset, num_heads, num_kv_heads, rotated_keys, raw_keys, fused = rest
    if not fused:
        where = (coarse, fine, index, position_ids, offset)
        return _multiply_and_rotate(x, weights, where, num_heads, num_kv_heads, (rotated_keys, raw_keys))
    # imported at the first call: Triton does not exist on every platform.
    from clex_kernels.kernels.qkv_rotary import launch_qkv_rotary

    # the kernel reads along C.
    x, *dense = (y if y is None or y.stride(-1) == 1 else y.contiguous() for y in (x, *weights))
    weights = Weights(*dense)
    both = rotated_keys and raw_keys
    qkv, k_rotated = _empty_outputs(x, weights, num_heads, num_kv_heads, both)
    outs, extra = _heads_of(qkv, num_heads, num_kv_heads), k_rotated if both else None
    tables = Tables(coarse, fine, positions, index)
    launch_qkv_rotary(
        *(x, *weights.split(num_heads, num_kv_heads), outs, extra),
        *(tables, position_ids, offset, (True, rotated_keys)),
    )
    return qkv, k_rotated


library.impl("qkv_rotary", _qkv_rotary_cuda, "CUDA")


def _run_below_autograd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator where nothing is to be recorded: its own way there is Python.

    That takes 0.1 ms where weights have just emptied the caches (one token of Llama-3-8B: 1.5 ms, 2 cores of Zen 4).
    """
    with fixed_products(), torch._C._AutoDispatchBelowAutograd():
        return torch.ops.clex.qkv_rotary.default(*arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], q: Tensor, k: Tensor) -> None:
    """Saves what gradients that are wanted need: x, weights, and for dfreq what of q and k is rotated."""
    x, weights = inputs[0], Weights(*inputs[1 : 1 + _WEIGHTS])
    *tables, ctx.offset, _, _, ctx.rotated_keys, _, _ = inputs[1 + _WEIGHTS + 1 :]
    needs_x, *needs_weights = ctx.needs_input_grad[:4]
    needs_freq = ctx.needs_input_grad[1 + _WEIGHTS]
    ctx.rows = [weight.shape[0] for weight in weights[:3] if weight is not None]
    ctx.save_for_backward(
        x if any(needs_weights) else None,
        *(weights[:3] if needs_x else (None, None, None)),
        q if needs_freq else None,
        k if needs_freq and ctx.rotated_keys else None,
        *tables,
    )


def _gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dk_raw: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of all inputs, from those of q, k and v as they came out, and of the raw k beside a rotated one."""
    x, *weights, q, k, coarse, fine, positions, index, position_ids = ctx.saved_tensors
    # one tensor for the products: what brings the gradients there rotates them back.
    dqkv = dq.new_empty((*dq.shape[:2], dq.shape[2] + 2 * dk.shape[2], dq.shape[3]))
    q_part, k_part, v_part = _heads_of(dqkv, dq.shape[2], dk.shape[2])
    v_part.copy_(dv)
    turned, into = [dq, dk], [q_part, k_part]
    if not ctx.rotated_keys:
        k_part.copy_(dk)
        turned[1] = into[1] = None
    # the gradient of a sum is an expanded scalar, and the kernels need unit stride in D.
    turned = [dy if dy is None or dy.stride(-1) == 1 else dy.contiguous() for dy in turned]
    tables = (coarse, fine, positions, index, position_ids)
    dfreq = torch.ops.clex.rotary_bwd_out(*turned, *into, q, k, *tables, ctx.offset)
    if dk_raw is not None:
        k_part.add_(dk_raw)
    return *_product_gradients(ctx, x, weights, dqkv), None if q is None else dfreq, *[None] * 11


@fixed_products()
def _product_gradients(ctx: Any, x: Tensor | None, weights: list[Tensor | None], dqkv: Tensor) -> list[Tensor | None]:
    """dx and the gradients of weights and biases, where they are needed."""
    needs_x, *needs = ctx.needs_input_grad[: 1 + _WEIGHTS]
    parts = dqkv.view(-1, dqkv.shape[2] * dqkv.shape[3]).split(ctx.rows, dim=1)
    rows = None if x is None else x.reshape(-1, x.shape[2])
    dx, dweights, dbiases = None, [None] * 3, [None] * 3
    for i, part in enumerate(parts):
        if needs_x:
            dx = torch.mm(part, weights[i]) if dx is None else torch.addmm(dx, part, weights[i])
        if needs[i]:
            dweights[i] = torch.mm(part.t(), rows)
        if needs[3 + i]:
            dbiases[i] = part.sum(0)
    return [None if dx is None else dx.view(*dqkv.shape[:2], dx.shape[1]), *dweights, *dbiases]


class _QkvRotary(torch.autograd.Function):
    """Autograd for eager code: q, k and v come out one by one, no views for autograd, and so do their gradients."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *_, num_heads, num_kv_heads, rotated_keys, raw_keys, _ = arguments
        qkv, k_rotated = _run_below_autograd(*arguments)
        parts = (part.data for part in _heads_of(qkv, num_heads, num_kv_heads))
        return _outputs(*parts, k_rotated, rotated_keys and raw_keys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, *output[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dk_raw: Tensor | None = None) -> tuple[Any, ...]:
        return _gradients(ctx, dq, dk, dv, dk_raw)


def _outputs(q: Tensor, k: Tensor, v: Tensor, k_rotated: Tensor, both: bool) -> tuple[Tensor, ...]:
    return (q, k_rotated, v, k) if both else (q, k, v)


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, k_rotated = output
    *_, ctx.num_heads, ctx.num_kv_heads, rotated_keys, raw_keys, _ = inputs
    ctx.both = rotated_keys and raw_keys
    _keep(ctx, inputs, *_outputs(*_heads_of(qkv, ctx.num_heads, ctx.num_kv_heads), k_rotated, ctx.both)[:2])


@once_differentiable
def _operator_backward(ctx: Any, dqkv: Tensor, dk_rotated: Tensor) -> tuple[Any, ...]:
    dq, dk, dv, *dk_raw = _outputs(*_heads_of(dqkv, ctx.num_heads, ctx.num_kv_heads), dk_rotated, ctx.both)
    return _gradients(ctx, dq, dk, dv, *dk_raw or [None])


torch.library.register_autograd("clex::qkv_rotary", _operator_backward, setup_context=_setup_operator, lib=library)


def choose_backend(x: Tensor) -> Literal["triton", "linear"]:
    """What backend="auto" takes for x [B, L, C].

    On a GPU, in half precision:

    - up to 64 tokens, "triton": reading the weights is all the time there is, whatever multiplies, so that a second
      launch and a second visit to q and k are what is left to save;
    - beyond them "triton" too where its products are made from registers (compute capability 8 and 12), in which its
      compiler comes within a few percent of cuBLAS: less than the pass over q and k takes, 4 (H + G) D bytes a token,
      7 to 10 percent of the product for Llama-3-8B on an A100 (modelled: bandwidth over tensor rate);
    - but "linear" where cuBLAS multiplies from shared and tensor memory (9, 10, 11), farther ahead of Triton than
      that pass is long, and on AMD.

    "linear" also in fp32, which this package's kernels leave to the plain cores. A rule from reading and counting:
    nobody has timed it on a GPU yet; benchmarks/bench_qkv_rotary.py does. On the CPU there is no choice, "linear" by
    name: up to 32 tokens C++ multiplies and rotates (half the time of torch's product alone for one token of
    Llama-3-8B), beyond them torch multiplies.
    """
    if x.device.type != "cuda" or x.dtype == torch.float32 or torch.version.hip is not None:
        return "linear"
    if x.shape[0] * x.shape[1] <= FEW_TOKENS:
        return "triton"
    return "triton" if torch.cuda.get_device_capability(x.device)[0] in (8, 12) else "linear"


def qkv_rotary(
    x: Tensor,
    weight: OneOrThree,
    table: RotaryTable | RotaryTableStack,
    num_heads: int,
    num_kv_heads: int,
    bias: OneOrThree | None = None,
    offset: int = 0,
    keys: Literal["rotated", "raw", "both"] = "rotated",
    *,
    position_ids: Tensor | None = None,
    backend: Literal["auto", "triton", "linear"] = "auto",
    debug: bool = False,
) -> tuple[Tensor, ...]:
    """Projects hidden states to q, k and v, with q, and k as `keys` says, rotated; differentiable in all of them.

    q, k and v share memory: each keeps all three alive, and in eager code may be written to in place. What follows
    tells `attention` what has been rotated: rotated="qk", or with raw keys rotated="q", as for decode_attention over
    raw cached keys.
    Reentrant checkpointing: see apply_rotary. DTensors: see sharding.py; heads are split by three weights with
    Shard(0), and where these outnumber G, k and v have a head for each rank, of which n / G are the same.

    Args:
        x: [B, L, C], fp32, fp16, bf16, or fp64 on the CPU (with an fp64 table). Under autocast x, weight and bias are
            cast to its dtype; outside they must agree.
        weight: [(H + 2G) D, C] as torch.nn.Linear has it, rows in the order q, k, v (`pack_qkv` makes such a one of a
            module's three); or a tuple of three, [H D, C], [G D, C] and [G D, C].
        table: angles of the positions 0..length-1, for all sequences, or a stack that holds one table per sequence.
        num_heads: H.
        num_kv_heads: G, which divides H.
        bias: [(H + 2G) D], or a tuple of three, as weight.
        offset: added to every position (tokens).
        keys: "rotated", "raw" for a cache of raw keys, or "both".
        position_ids: int64 [B or 1, L], each token's row of the table; default 0..L-1.
        backend: on a GPU, "triton" (one kernel), "linear" (torch's product, then rotary in place) or "auto"
            (`choose_backend`); on the CPU "linear" or "auto".
        debug: also check values that live on a device (synchronises); otherwise a bad position there, or anywhere in
            compiled code, gives NaN where q and k are rotated.

    Returns:
        (q [B, L, H, D], k [B, L, G, D], v [B, L, G, D]); with keys="both" (q, k, v, raw k).

    Raises:
        TypeError: an argument is of the wrong type, or x or the table of the wrong dtype.
        ValueError: shapes, dtypes or devices don't fit, or a position lies outside the table.
        RuntimeError: a forward-mode or a second derivative is asked for.
    """
    if is_dtensor(x):
        terms = {"offset": offset, "keys": keys, "backend": backend}
        heads = (num_heads, num_kv_heads)
        return sharded_projection(qkv_rotary, x, weight, table, *heads, bias, position_ids, debug, **terms)
    x, *cast = autocast(x, *Weights.of(weight, bias))
    weights = Weights(*cast)
    dims = check_projection(x, weights, table, num_heads, num_kv_heads)
    check_choices(x, keys, backend)
    freq, coarse, fine, positions, index = stacked(x, dims, table, x.shape[0], debug)
    check_positions(x, coarse.shape[1] * fine.shape[1], position_ids, offset, debug)
    check_no_tangent("qkv_rotary", x, *weights, freq)
    if backend == "auto":
        backend = choose_backend(x)
    tables = (freq, coarse, fine, positions, index, position_ids, offset)
    rotated_keys, raw_keys = KEYS[keys]
    arguments = (x, *weights, *tables, num_heads, num_kv_heads, rotated_keys, raw_keys, backend == "triton")
    wants_grad = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *weights, freq))
    if wants_grad and not torch.compiler.is_compiling():
        return _QkvRotary.apply(*arguments)
    run = torch.ops.clex.qkv_rotary if torch.compiler.is_compiling() else _run_below_autograd
    qkv, k_rotated = run(*arguments)
    return _outputs(*_heads_of(qkv, num_heads, num_kv_heads), k_rotated, rotated_keys and raw_keys)
