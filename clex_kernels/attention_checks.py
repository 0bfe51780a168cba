"""Checks of what attention is given, and its terms put together; values are looked at on the host, or under `debug`."""

import math
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.config import check_flag, one_of
from clex_kernels.rotary_checks import check_kind, check_operand, check_strided, stacked
from clex_kernels.tables import MAX_LENGTH, RotaryTable, RotaryTableStack, on_host

# bounds of a sequence travel as 32-bit numbers inside kernels, with room for sums.
MAX_TOKENS = 2**29
MAX_HEAD_DIM = 256
# of scale and softcap: their quotient times a product of q and k still fits fp32.
LARGEST_SCALE = 2.0**30
ROTATED = {"none": (True, True), "q": (False, True), "k": (True, False), "qk": (False, False)}


class Operands(NamedTuple):
    """q [B, L, H, D], k and v [B, S, G, D], how many sequences they hold, and whether these are packed in one row."""

    q: Tensor
    k: Tensor
    v: Tensor
    sequences: int
    is_packed: bool


def check_unsupported(attn_mask: object, dropout_p: float, interleaved: bool) -> None:
    """What other attention calls take and this one does not."""
    if attn_mask is not None:
        raise ValueError(
            "attn_mask: not supported, expected None; is_causal, window, kv_start and kv_end mask by index"
        )
    if not isinstance(dropout_p, Real) or dropout_p != 0:
        raise ValueError(f"dropout_p: not supported, expected 0, got {dropout_p}")
    if interleaved is not False:
        raise ValueError("interleaved: not supported, expected pairs (x[i], x[R + i]), so interleaved=False")


def check_operands(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any) -> Operands:
    """Types, dtypes and shapes of q, k and v; packed ones may come as [N, H, D]."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}; q, k and v must not mix dtypes")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q, cu_seqlens_k: expected both or neither")
    is_packed = cu_seqlens_q is not None
    if is_packed:
        for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            _check_cu_seqlens(name, bounds, q.device)
        q, k, v = (x[None] if x.dim() == 3 else x for x in (q, k, v))
    check_operand("q", q, q)
    batch, _, heads, dims = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != batch or x.shape[3] != dims or (name == "v" and x.shape != k.shape):
            # in compiled code a size that enters a text is a constant: only here.
            expected = f"[B={batch}, S, G, D={dims}]" if name == "k" else f"k's {list(k.shape)}"
            raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected on q's device {q.device}, got {x.device}")
        check_strided(name, x)
        if x.stride(3) != 1 and dims > 1 and x.numel() > 0:
            raise ValueError(f"{name}: expected unit stride in D, got strides {list(x.stride())}")
    groups = k.shape[2]
    if groups == 0 or heads % groups:
        raise ValueError(f"q: expected H to be a multiple of G={groups}, got H={heads}")
    if dims == 0:
        raise ValueError("q: expected D of at least 1, got 0")
    if q.device.type != "cpu" and dims > MAX_HEAD_DIM:
        raise ValueError(f"q: expected D of at most {MAX_HEAD_DIM}, got {dims}")
    if max(q.shape[1], k.shape[1]) > MAX_TOKENS:
        raise ValueError(f"q, k: expected at most {MAX_TOKENS} tokens, got L={q.shape[1]}, S={k.shape[1]}")
    if is_packed and batch != 1:
        raise ValueError(f"q: expected [N, H, D] or [1, N, H, D] with cu_seqlens_q, got {list(q.shape)}")
    return Operands(q, k, v, len(cu_seqlens_q) - 1 if is_packed else batch, is_packed)


def check_choices(table: Any, rotated: str, backend: str, q: Tensor) -> None:
    """The kind of table, the two choices by name, and that the backend exists where q is."""
    check_kind(table)
    one_of("rotated", rotated, tuple(ROTATED))
    one_of("backend", backend, ("auto", "triton", "sdpa"))
    if backend == "triton" and q.device.type == "cpu":
        raise ValueError("backend: expected 'auto' or 'sdpa' on the CPU, got 'triton', whose kernels need a GPU")


def check_rule(
    q: Tensor, scale: float | None, is_causal: bool, window: int | None, softcap: float | None, table: Any
) -> Rule:
    """The numbers of the call, and the log-n scale that the table asks for."""
    check_flag("is_causal", is_causal)
    if scale is None:
        scale = q.shape[3] ** -0.5
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 1 / LARGEST_SCALE <= value <= LARGEST_SCALE:
            raise ValueError(f"{name}: expected a finite number > 0, got {value} (2^-30 to 2^30 are taken)")
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (Integral, torch.SymInt)):
            raise TypeError(f"window: expected an int, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"window: expected at least 1 token, the query itself, got {window}")
        window = min(window if isinstance(window, torch.SymInt) else int(window), MAX_TOKENS)
    log_base = math.log(table.train_length) if table.log_scale else None
    softcap = None if softcap is None else float(softcap)
    return Rule(float(scale), is_causal, window, softcap, log_base, table.log_scale == "clamped")


def check_tokens(
    operands: Operands,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_start: Tensor | None,
    kv_end: Tensor | None,
    q_offset: int | Tensor | None,
    k_offset: int | Tensor,
    lengths: Tensor | None,
    debug: bool,
) -> Tokens:
    """Bounds, offsets and lengths: their types and shapes, and values where those can be seen."""
    q, k, _, count, is_packed = operands
    if is_packed:
        if kv_start is not None or kv_end is not None:
            raise ValueError("kv_start, kv_end: expected None with cu_seqlens_k, which bounds the keys")
        for name, bounds, x in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)):
            if can_look(bounds, debug):
                _check_bounds(name, bounds.tolist(), x.shape[1])
        if len(cu_seqlens_k) != count + 1:
            raise ValueError(f"cu_seqlens_k: expected shape [{count + 1}] as cu_seqlens_q's, got [{len(cu_seqlens_k)}]")
    for name, value, limit in (
        ("kv_start", kv_start, k.shape[1]),
        ("kv_end", kv_end, k.shape[1]),
        ("lengths", lengths, None),
        ("q_offset", q_offset, MAX_LENGTH),
        ("k_offset", k_offset, MAX_LENGTH),
    ):
        is_number = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
        if name.endswith("offset") and is_number:
            if not 0 <= value <= MAX_LENGTH:
                raise ValueError(f"{name}: expected a position from 0 to {MAX_LENGTH}, got {value}")
        elif value is not None or name == "k_offset":
            check_per_sequence(name, value, count, limit, q.device, debug)
    both = kv_start is not None and kv_end is not None and can_look(kv_start, debug) and can_look(kv_end, debug)
    if both and (kv_start > kv_end).any():
        raise ValueError(f"kv_start: expected at most kv_end = {kv_end.tolist()}, got {kv_start.tolist()}")
    q_offsets, q_offset = (q_offset, None) if isinstance(q_offset, Tensor) else (None, q_offset)
    k_offsets, k_offset = (k_offset, 0) if isinstance(k_offset, Tensor) else (None, k_offset)
    tensors = (cu_seqlens_q, cu_seqlens_k, kv_start, kv_end, lengths, q_offsets, k_offsets)
    return Tokens(*(x if x is None else x.contiguous() for x in tensors), q_offset, k_offset)


def check_table(
    operands: Operands, table: RotaryTable | RotaryTableStack, tokens: Tokens, rule: Rule, rotated: str, debug: bool
) -> tuple[Tensor, Tables]:
    """freq [T, R] and the tables, once every token that is rotated here is found to have a row."""
    q, k = operands.q, operands.k
    freq, coarse, fine, positions, index = stacked(q, q.shape[3], table, operands.sequences, debug)
    rotate_q, rotate_k = ROTATED[rotated]
    length = coarse.shape[1] * fine.shape[1]
    bounds = (tokens.cu_seqlens_q, tokens.cu_seqlens_k, tokens.kv_end, tokens.q_offsets, tokens.k_offsets)
    if not all(x is None or can_look(x, debug) for x in bounds) or 0 in (operands.sequences, q.shape[1], k.shape[1]):
        return freq, Tables(coarse, fine, positions, index)
    queries, ends = q.shape[1], k.shape[1]
    if operands.is_packed:
        queries, ends = tokens.cu_seqlens_q.long().diff(), tokens.cu_seqlens_k.long().diff()
    elif tokens.kv_end is not None:
        ends = tokens.kv_end.long()
    # sums of 32-bit numbers would come round.
    k_first = tokens.k_offset if tokens.k_offsets is None else tokens.k_offsets.long()
    q_first = tokens.q_offset if tokens.q_offsets is None else tokens.q_offsets.long()
    last_key = _extreme(max, k_first + ends)
    if rotate_k and last_key > length:
        raise ValueError(
            f"table: expected positions for all keys, k_offset + S = {last_key}, got one of {length} positions"
        )
    if not rotate_q:
        return freq, Tables(coarse, fine, positions, index)
    if q_first is None:
        lowest, highest = _extreme(min, k_first + ends - queries), last_key
        if lowest < 0 and not rule.is_causal and rule.window is None:
            raise ValueError(
                f"q_offset: expected where the first query stands, since L exceeds S and its default is {lowest}"
            )
    else:
        highest = _extreme(max, q_first + queries)
    if highest > length:
        raise ValueError(
            f"table: expected positions for all queries, q_offset + L = {highest}, got one of {length} positions"
        )
    return freq, Tables(coarse, fine, positions, index)


def _extreme(choose: Any, value: int | Tensor) -> int:
    return choose(value.tolist()) if isinstance(value, Tensor) else value


def can_look(x: Tensor, debug: bool) -> bool:
    """Whether values may be looked at: on the host, or anywhere under `debug`."""
    return on_host(x) or debug


def _check_cu_seqlens(name: str, bounds: Tensor, device: torch.device) -> None:
    if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int32, torch.int64):
        got = bounds.dtype if isinstance(bounds, Tensor) else type(bounds).__name__
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {got}")
    if bounds.dim() != 1 or len(bounds) < 1 or bounds.device != device:
        raise ValueError(f"{name}: expected shape [B + 1] on {device}, got {list(bounds.shape)} on {bounds.device}")


def _check_bounds(name: str, bounds: list[int], tokens: int) -> None:
    if bounds[0] != 0 or sorted(bounds) != bounds:
        raise ValueError(f"{name}: expected bounds that start at 0 and do not decrease, got {bounds}")
    if bounds[-1] > tokens:
        raise ValueError(f"{name}: expected bounds up to N = {tokens} tokens, got {bounds[-1]} (past the end)")


def check_per_sequence(name: str, value: Any, count: int, limit: int | None, device: torch.device, debug: bool) -> None:
    """A number for each of `count` sequences, from 0 to `limit`; offsets may also be one int, checked elsewhere."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        kind = "an int or a " if name.endswith("offset") else "a "
        raise TypeError(f"{name}: expected {kind}torch.int32 or torch.int64 tensor, got {got}")
    if value.shape != (count,) or value.device != device:
        expected = f"shape [B={count}] on {device}"
        raise ValueError(f"{name}: expected {expected}, got {list(value.shape)} on {value.device}")
    if can_look(value, debug) and count:
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or (limit is not None and high > limit):
            within = ">= 0" if limit is None else f"within {'[0, S] = ' * (limit < MAX_LENGTH)}[0, {limit}]"
            raise ValueError(f"{name}: expected numbers {within}, got {low} to {high}")
