"""The terms of an attention call, as the checks, the operators, the kernels and the CPU path hand them on.

Queries of sequence b are rows 0 .. L-1, its keys are slots 0 .. S-1 of a cache, of which [kv_start, kv_end) are valid.
Key slot j stands at position k_offset + j and query l at q_offset + l, by default such that the last query meets the
last valid key: q_offset = k_offset + kv_end - L.

    a query sees a key    if kv_start <= slot < kv_end,
                          causal:  key position <= query position,
                          window:  query position - window < key position, and causal.
"""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """Which tokens make up a sequence and where they stand; every tensor int32 or int64.

    cu_seqlens_q and cu_seqlens_k [B + 1]: bounds of packed sequences, whose q is [1, N, H, D]. kv_start, kv_end [B]:
    see above; None: 0 and S. lengths [B]: token counts for the log-n scale; None: kv_end - kv_start. q_offsets and
    k_offsets [B] stand for q_offset and k_offset where sequences differ.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    kv_start: Tensor | None = None
    kv_end: Tensor | None = None
    lengths: Tensor | None = None
    q_offsets: Tensor | None = None
    k_offsets: Tensor | None = None
    q_offset: int | None = None
    k_offset: int = 0


class Rule(NamedTuple):
    """How logits are formed and which count.

    logits = scale * factor * q k, then softcap * tanh(logits / softcap); factor = ln(length) / log_base of the
    sequence, at least 1 if log_clamped, or 1 without a log_base. window implies is_causal.
    """

    scale: float
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    log_base: float | None = None
    log_clamped: bool = False


class Tables(NamedTuple):
    """The factored tables as rotary.py's operators take them, without freq."""

    coarse: Tensor
    fine: Tensor
    positions: Tensor | None = None
    index: Tensor | None = None
