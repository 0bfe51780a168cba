"""Which engine serves a call of attention, and the one that is not this package's: rotary, then torch's attention."""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from clex_kernels.attention_checks import ROTATED, Operands
from clex_kernels.attention_terms import Rule, Tokens
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack


def sdpa_refusal(operands: Operands, tokens: Tokens, rule: Rule, return_lse: bool) -> str | None:
    """Why torch's scaled_dot_product_attention can't serve a call, in words; None if it can."""
    q, k = operands.q, operands.k
    is_causal = rule.is_causal or rule.window is not None
    refusals = {
        "cu_seqlens": operands.is_packed,
        "kv_start or kv_end": tokens.kv_start is not None or tokens.kv_end is not None,
        "offsets that differ between sequences": tokens.q_offsets is not None or tokens.k_offsets is not None,
        "window": rule.window is not None,
        "softcap": rule.softcap is not None,
        "the table's log_scale": rule.log_base is not None,
        "return_lse": return_lse,
        "no queries or no keys": q.numel() == 0 or k.numel() == 0,
        "queries that see no key": is_causal and q.shape[1] > k.shape[1],
        "queries that do not end with the keys": (
            is_causal and tokens.q_offset not in (None, tokens.k_offset + k.shape[1] - q.shape[1])
        ),
        # the compiler can't trace causal_lower_right, and a mask [L, S] in memory is what it is there to avoid.
        "causal queries after other keys in compiled code": (
            is_causal and 1 < q.shape[1] < k.shape[1] and torch.compiler.is_compiling()
        ),
    }
    return next((reason for reason, applies in refusals.items() if applies), None)


def choose_engine(operands: Operands, rule: Rule, refusal: str | None) -> Literal["triton", "sdpa"]:
    """What backend="auto" takes on a GPU, where `refusal` is sdpa_refusal's answer.

    sdpa for half precision from Hopper on, where cuDNN and FlashAttention use what Triton's compiler does not reach,
    for heads they serve (D up to 128); and for fp32, whose products this package's kernels leave to the plain cores,
    where torch has a kernel that keeps no [L, S] matrix: equal numbers of heads, and no causal queries after other
    keys. Otherwise Triton: it rotates keys once and queries on the way, and their gradients back in its epilogues,
    where sdpa needs passes of their own over q, k, dq and dk. A rule from reading, not from timing: nobody has measured
    it on a GPU yet; benchmarks/bench_attention.py does.
    """
    q, k = operands.q, operands.k
    if refusal is not None or torch.version.hip is not None:
        return "triton"
    if q.dtype == torch.float32:
        has_kernel = q.shape[2] == k.shape[2] and not (rule.is_causal and q.shape[1] != k.shape[1])
    else:
        has_kernel = torch.cuda.get_device_capability(q.device) >= (9, 0) and q.shape[3] <= 128
    return "sdpa" if has_kernel else "triton"


def sdpa(operands: Operands, table: RotaryTable | RotaryTableStack, tokens: Tokens, rule: Rule, rotated: str) -> Tensor:
    """apply_rotary, then torch's best attention; for calls that `sdpa_refusal` does not refuse."""
    q, k, v = operands[:3]
    rotate_q, rotate_k = ROTATED[rotated]
    q_offset = tokens.k_offset + k.shape[1] - q.shape[1] if tokens.q_offset is None else tokens.q_offset
    k_offset = tokens.k_offset
    if rotate_q and rotate_k and table.positions is None:
        # only differences count, and near 0 dfreq keeps its digits.
        first = min(q_offset, k_offset)
        q_offset, k_offset = q_offset - first, k_offset - first
    elif rotate_q and rotate_k:
        table = replace(table, positions=table.positions - table.positions[..., k_offset : k_offset + 1])
    if rotate_q and rotate_k and q.shape[1] == k.shape[1] and q_offset == k_offset:
        q, k = apply_rotary(q, k, table, offset=q_offset)
    else:
        q = apply_rotary(q, None, table, offset=q_offset)[0] if rotate_q else q
        k = apply_rotary(k, None, table, offset=k_offset)[0] if rotate_k else k
    L, S = q.shape[1], k.shape[1]
    options: dict[str, Any] = {"scale": rule.scale, "enable_gqa": q.shape[2] != k.shape[2]}
    if rule.is_causal and L == S:
        options["is_causal"] = True
    elif rule.is_causal and L > 1:
        options["attn_mask"] = causal_lower_right(L, S)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)
