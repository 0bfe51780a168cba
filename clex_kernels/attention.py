"""Attention over raw q and k: rotary inside, with gradients for q, k, v and the table's freq.

    q', k' = rotary(q), rotary(k)     logits = rule(q' k'^T)     lse = ln sum exp(logits)     out = exp(logits - lse) v

Backward, with P = exp(logits - lse) recomputed tile by tile from what the forward pass saved (q', k', v, out, lse):

    delta = sum(dout out) - dlse            dlogits = P (dout v^T - delta)        dv = P^T dout
    dq' = dlogits k' scale                  dk' = dlogits^T q' scale              (1 - tanh^2 on top with a softcap)

and from dq', dk' the rotary's own backward (rotary.py) gives dq, dk and dfreq. Logits depend on differences of
positions only, so where both q and k are rotated here the sum of dangle over all tokens of a sequence vanishes, and
positions may be counted from anywhere: they are counted from the first valid key, which keeps dfreq exact far from 0.

Shapes: q [B, L, H, D], k and v [B, S, G, D], lse [B, H, L]; packed sequences are one row, q [1, N, H, D].
attention_terms.py has the rest of an operator's arguments, rotary.py those of the table.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clex_kernels import attention_cpu
from clex_kernels.attention_checks import (
    ROTATED,
    Operands,
    check_choices,
    check_operands,
    check_rule,
    check_table,
    check_tokens,
    check_unsupported,
)
from clex_kernels.attention_engines import choose_engine, sdpa, sdpa_refusal
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.autocast import autocast
from clex_kernels.config import check_flag
from clex_kernels.extension import library
from clex_kernels.rotary import sum_per_table
from clex_kernels.rotary_checks import check_no_tangent
from clex_kernels.sharded_calls import sharded_attention
from clex_kernels.sharding import is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack

_TABLES = "Tensor coarse, Tensor fine, Tensor? positions, Tensor? index, "
_TERMS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_start, Tensor? kv_end, Tensor? lengths, "
    "Tensor? q_offsets, Tensor? k_offsets, SymInt? q_offset, SymInt k_offset, "
    "float scale, bool is_causal, SymInt? window, float? softcap, float? log_base, bool log_clamped, "
    "bool rotate_q, bool rotate_k, "
)

library.define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor freq, {_TABLES}{_TERMS}bool save) "
    "-> (Tensor out, Tensor lse, Tensor q_rotated, Tensor k_rotated)"
)
library.define(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TABLES}{_TERMS}bool wants_dfreq) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dfreq)"
)


class _Terms(NamedTuple):
    """The end of an operator's arguments, put in order."""

    tables: Tables
    tokens: Tokens
    rule: Rule
    rotate_q: bool
    rotate_k: bool
    flag: bool

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> "_Terms":
        rest = list(arguments)
        groups = []
        for group in (Tables, Tokens, Rule):
            groups.append(group(*rest[: len(group._fields)]))
            del rest[: len(group._fields)]
        return cls(*groups, *rest)


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    terms = _Terms.of(arguments)
    q_rotated, k_rotated = (
        _dense_like(x) if terms.flag and is_rotated else x.new_empty(0)
        for x, is_rotated in ((q, terms.rotate_q), (k, terms.rotate_k))
    )
    return _dense_like(q), _lse_like(q), q_rotated, k_rotated


def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    terms = _Terms.of(arguments)
    coarse = terms.tables.coarse
    size = (coarse.shape[0], coarse.shape[3]) if terms.flag else (0,)
    return *(_dense_like(x) for x in (q, k, v)), q.new_empty(size, dtype=torch.float64)


torch.library.register_fake("clex::attention", _attention_fake, lib=library)
torch.library.register_fake("clex::attention_bwd", _attention_bwd_fake, lib=library)


def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return attention_cpu.attention(q, k, v, *_Terms.of(arguments))


def _attention_bwd_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    return attention_cpu.attention_bwd(*arguments[:7], *_Terms.of(arguments[7:]))


def _is_empty(q: Tensor, k: Tensor, tokens: Tokens) -> bool:
    """Whether there is no query, no key or no sequence."""
    has_sequence = tokens.cu_seqlens_q is None or tokens.cu_seqlens_q.shape[0] > 1
    return q.numel() == 0 or k.numel() == 0 or not has_sequence


def _attention_cuda(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    # imported at the first call: Triton does not exist on every platform.
    from clex_kernels.kernels.attention_fwd import launch_attention_fwd, launch_attention_fwd_keys

    tables, tokens, rule, rotate_q, rotate_k, save = _Terms.of(arguments)
    out, lse = _dense_like(q), _lse_like(q)
    is_empty = _is_empty(q, k, tokens)
    if tokens.cu_seqlens_q is not None or is_empty:
        # tokens of no sequence are nobody's to write.
        out.zero_()
        lse.fill_(-torch.inf)
    q_rotated = _dense_like(q) if save and rotate_q else None
    k_rotated = _dense_like(k) if rotate_k else k
    if not is_empty:
        if rotate_k:
            launch_attention_fwd_keys(k, k_rotated, tables, tokens, q.shape[1])
        launch_attention_fwd(q, k_rotated, v, tables, tokens, rule, rotate_q, out, lse, q_rotated)
    nothing = q.new_empty(0)
    return out, lse, nothing if q_rotated is None else q_rotated, k_rotated if save and rotate_k else q.new_empty(0)


def _attention_bwd_cuda(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    from clex_kernels.kernels.attention_bwd import launch_attention_bwd

    tables, tokens, rule, rotate_q, rotate_k, wants_dfreq = _Terms.of(arguments)
    is_partial = any(x is not None for x in (tokens.cu_seqlens_q, tokens.kv_start, tokens.kv_end))
    is_empty = _is_empty(q, k, tokens)
    dq, dk, dv = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) if is_partial or is_empty else _dense_like(x)
        for x in (q, k, v)
    )
    dfreq = q.new_zeros((tables.coarse.shape[0], tables.coarse.shape[3]) if wants_dfreq else 0, dtype=torch.float64)
    if is_empty:
        return dq, dk, dv, dfreq
    per_sequence = launch_attention_bwd(
        *(dout, dlse, q, k, v, out, lse, tables, tokens, rule, (rotate_q, rotate_k), wants_dfreq, dq, dk, dv)
    )
    if wants_dfreq:
        dfreq = sum_per_table(per_sequence, tables.index, tables.coarse.shape[0])
    return dq, dk, dv, dfreq


library.impl("attention", _attention_cpu, "CPU")
library.impl("attention_bwd", _attention_bwd_cpu, "CPU")
library.impl("attention", _attention_cuda, "CUDA")
library.impl("attention_bwd", _attention_bwd_cuda, "CUDA")


class _Attention(torch.autograd.Function):
    """Autograd of clex::attention, also registered for the operator itself, whose own way in is slower."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.clex.attention(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, freq, *rest = inputs
        out, lse, q_rotated, k_rotated = output
        tables, tokens, rule, *rotate, save = _Terms.of(rest)
        if not save:
            raise RuntimeError("clex::attention: expected save=True where gradients are wanted, got False")
        ctx.mark_non_differentiable(q_rotated, k_rotated)
        ctx.set_materialize_grads(False)
        ctx.rest, ctx.wants_dfreq = (
            (tokens.q_offset, tokens.k_offset, *rule, *rotate),
            freq.requires_grad and any(rotate),
        )
        kept = (q_rotated if rotate[0] else q, k_rotated if rotate[1] else k)
        ctx.save_for_backward(*kept, v, out, lse, *tables, *tokens[:-2])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(Tables._fields) + len(Tokens._fields) + len(Rule._fields) + 3)
        if dout is None and dlse is None:
            return None, None, None, None, *nothing
        # once: a checkpoint computes them anew at every look.
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[3])
        # the gradient of a sum is an expanded scalar, and the kernels need unit stride in D.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dq, dk, dv, dfreq = torch.ops.clex.attention_bwd(dout, dlse, *saved, *ctx.rest, ctx.wants_dfreq)
        return dq, dk, dv, dfreq if ctx.wants_dfreq else None, *nothing


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    return None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("attention: its gradient can't be differentiated again (no second derivatives)")


torch.library.register_autograd(
    "clex::attention", _Attention.backward, setup_context=_Attention.setup_context, lib=library
)
torch.library.register_autograd("clex::attention_bwd", _no_second_derivative, setup_context=_no_context, lib=library)


def _select(
    table: RotaryTable | RotaryTableStack, operands: Operands, tokens: Tokens
) -> RotaryTable | RotaryTableStack:
    """A stack with its choice made by the sequences' lengths, unless it has been made."""
    if not isinstance(table, RotaryTableStack) or table.index is not None or table.train_length is None:
        return table
    lengths = tokens.lengths
    if lengths is None and operands.is_packed:
        lengths = tokens.cu_seqlens_k.diff()
    elif lengths is None:
        lengths = operands.k.shape[1] if tokens.kv_end is None else tokens.kv_end
        lengths = lengths if tokens.kv_start is None else lengths - tokens.kv_start
    if not isinstance(lengths, Tensor):
        lengths = torch.full((operands.sequences,), lengths, dtype=torch.int64, device=operands.q.device)
    return table.select(lengths)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: RotaryTable | RotaryTableStack,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_end: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    k_offset: int | Tensor = 0,
    lengths: Tensor | None = None,
    rotated: Literal["none", "q", "k", "qk"] = "none",
    backend: Literal["auto", "triton", "sdpa"] = "auto",
    return_lse: bool = False,
    *,
    debug: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    interleaved: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of raw q and k, rotated inside; differentiable in q, k, v and the table's freq.

    Names and layout are flash_attn_func's: tokens before heads, and causal from the bottom right, so that the last
    query meets the last key. A query that sees no key gives 0. Reentrant checkpointing: see apply_rotary. DTensors: see
    sharding.py.

    Args:
        q: [B, L, H, D] with unit stride in D; fp32, fp16, bf16, or fp64 on the CPU (with an fp64 table). D up to 256 on
            a GPU.
        k: [B, S, G, D] of q's dtype; query head h reads key head h // (H / G).
        v: like k.
        table: angles of all sequences, or a stack with one table per sequence, by its index or else by `lengths`.
        is_causal: a query sees keys up to its own position only.
        scale: of the logits, 2^-30 to 2^30; None: D^(-1/2).
        window: tokens a query sees, itself included, query - window < key <= query; implies is_causal.
        softcap: c in c tanh(logits / c), 2^-30 to 2^30.
        cu_seqlens_q: [B + 1] int32 or int64, bounds of packed sequences; q is [N, H, D] or [1, N, H, D]. Tokens past
            the last bound give 0.
        cu_seqlens_k: the same of k and v.
        kv_start: [B] int32 or int64, first valid slot of k and v; what other slots hold has no effect.
        kv_end: [B], end of the valid slots; None: S.
        q_offset: position of query 0, in tokens, int or [B]; None: k_offset + kv_end - L.
        k_offset: position of slot 0, int or [B].
        lengths: [B] token counts, which select the stack's tables (t) and the log-n factor; None: kv_end - kv_start.
        rotated: which of q and k are rotated already, by the same table.
        backend: on a GPU, "triton" (this package's kernels), "sdpa" (apply_rotary, then torch's attention), or "auto"
            (`choose_engine`). On the CPU "auto" is C++ rotary with torch's attention, block-wise where that lacks
            something.
        return_lse: also return ln sum exp(logits), differentiable too.
        debug: also check values that live on a device (synchronises); otherwise bounds there are cut to the tensors,
            and positions outside the table give NaN.
        attn_mask: None; others are rejected, as are dropout_p other than 0 and interleaved pairs.
        dropout_p: 0.
        interleaved: False.

    Returns:
        out like q, and with return_lse also lse [B, H, L] ([H, N] for [N, H, D]), fp32, -inf where no key is seen.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: shapes, dtypes, devices or values don't fit, a position lies outside the table, or the backend can't
            serve the call.
        RuntimeError: a forward-mode or a second derivative is asked for.
    """
    check_unsupported(attn_mask, dropout_p, interleaved)
    check_flag("return_lse", return_lse)
    check_flag("debug", debug)
    if is_dtensor(q):
        terms = {"is_causal": is_causal, "scale": scale, "window": window, "softcap": softcap, "rotated": rotated}
        terms |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "kv_start": kv_start, "kv_end": kv_end}
        terms |= {"q_offset": q_offset, "k_offset": k_offset, "lengths": lengths, "backend": backend}
        return sharded_attention(attention, q, k, v, table, return_lse, debug, **terms)
    is_flat = isinstance(q, Tensor) and q.dim() == 3
    operands = check_operands(*autocast(q, k, v), cu_seqlens_q, cu_seqlens_k)
    tokens = check_tokens(operands, cu_seqlens_q, cu_seqlens_k, kv_start, kv_end, q_offset, k_offset, lengths, debug)
    check_choices(table, rotated, backend, operands.q)
    table = _select(table, operands, tokens)
    rule = check_rule(operands.q, scale, is_causal, window, softcap, table)
    freq, tables = check_table(operands, table, tokens, rule, rotated, debug)
    check_no_tangent("attention", *operands[:3], freq)
    refusal = sdpa_refusal(operands, tokens, rule, return_lse)
    if backend == "sdpa" and refusal is not None:
        raise ValueError(f'backend: expected "auto" or "triton", since "sdpa" can\'t serve {refusal}')
    if backend == "auto" and operands.q.is_cuda:
        backend = choose_engine(operands, rule, refusal)
    if backend == "sdpa":
        out = sdpa(operands, table, tokens, rule, rotated)
        return out[0] if is_flat else out
    q, k, v = operands[:3]
    rotate_q, rotate_k = ROTATED[rotated]
    if not (rotate_q or rotate_k):
        freq = freq.detach()
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, freq))
    attend = _Attention.apply if wants_grad and not torch.compiler.is_compiling() else torch.ops.clex.attention
    out, lse, *_ = attend(q, k, v, freq, *tables, *tokens, *rule, rotate_q, rotate_k, wants_grad)
    if is_flat:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out
