"""Attention backward: dq, dk, dv and dfreq from the saved q', k', v, out and lse; nothing of size L x S is kept.

    P = exp(logits - lse)      delta = sum(dout out) - dlse      dlogits = P (dout v^T - delta)

delta comes first, from a kernel of its own; then dq (attention_bwd_dq.py), and dk and dv (attention_bwd_dkv.py). Both
undo the rotation at their end and store their tile's share of dfreq; a last kernel adds the shares of a head of a
sequence, and the launcher the heads, in a fixed order: there are no atomics, and equal inputs give equal bits.

Loops have heads in halves or, where that costs less (IS_JOINED), in one part: the gradient of q' or k' then comes apart
into its halves after the loop.
"""

import torch
import triton
import triton.language as tl

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels.attention_bwd_dkv import attention_bwd_dkv_kernel
from clex_kernels.kernels.attention_bwd_dq import attention_bwd_dq_kernel
from clex_kernels.kernels.attention_launch import (
    Operand,
    TableOperand,
    head_constants,
    launch_config,
    precision,
    rule_constants,
    sequence_count,
    tile_count,
    token_arguments,
)
from clex_kernels.kernels.common import strides
from clex_kernels.kernels.launch_tables import (
    ATTENTION_BWD_DELTA,
    ATTENTION_BWD_DFREQ,
    ATTENTION_BWD_DKV,
    ATTENTION_BWD_DQ,
    READS_SHARED,
    Table,
    Tile,
    architecture_of,
    constants_of,
    dtype_kind,
    find_entry,
)
from clex_kernels.kernels.parts import load_columns
from clex_kernels.kernels.sequences import first_tile_of, load_bounds, row_pointers


@triton.jit(do_not_specialize=["L", "dlse_strides"])
def attention_bwd_delta_kernel(
    dout,
    out,
    dlse_ptr,
    delta_ptr,
    L,
    dlse_strides,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta [B, H, L] of BLOCK_L queries of one head."""
    tiles = tl.cdiv(L, BLOCK_L)
    b, h = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask = rows < L
    dtype: tl.constexpr = delta_ptr.dtype.element_ty
    dout_rows = load_columns(row_pointers(dout, b, rows, h), mask, D, BLOCK_D).to(dtype)
    delta = tl.sum(dout_rows * load_columns(row_pointers(out, b, rows, h), mask, D, BLOCK_D).to(dtype), axis=1)
    if dlse_ptr is not None:
        dlse_ptrs = dlse_ptr + b * dlse_strides[0] + h * dlse_strides[1] + rows * dlse_strides[2]
        delta -= tl.load(dlse_ptrs, mask=mask, other=0.0)
    tl.store(delta_ptr + (b * tl.num_programs(1) + h) * L + rows, delta, mask=mask)


@triton.jit(do_not_specialize=["length", "batch"])
def attention_bwd_dfreq_kernel(
    partials_ptr,
    sums_ptr,
    tokens,
    length,
    batch,
    IS_QUERY: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """sums [B, heads, R] of the tiles [tiles, heads, R] of one sequence and head."""
    b, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    cu_seqlens = tokens.cu_seqlens_q if IS_QUERY else tokens.cu_seqlens_k
    if cu_seqlens is None:
        first, rows = b * tl.cdiv(length, BLOCK), length
    else:
        _, rows = load_bounds(cu_seqlens, b, length)
        first = first_tile_of(cu_seqlens, b, length, BLOCK)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros([BLOCK_R], tl.float64)
    tiles = tl.cdiv(rows, BLOCK)
    for n in range(0, tiles, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        ptrs = partials_ptr + ((first + offs_n).to(tl.int64)[:, None] * heads + h) * R + offs_r
        total += tl.sum(tl.load(ptrs, mask=(offs_n < tiles)[:, None] & (offs_r < R), other=0.0), axis=0)
    offs_r = tl.arange(0, BLOCK_R)
    tl.store(sums_ptr + (b.to(tl.int64) * heads + h) * R + offs_r, total, mask=offs_r < R)


def launch_delta(dout: torch.Tensor, out: torch.Tensor, dlse: torch.Tensor | None, lse: torch.Tensor) -> torch.Tensor:
    """sum(dout out) - dlse, [B, H, L] like lse."""
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    B, L, H, D = dout.shape
    tile = find_entry(ATTENTION_BWD_DELTA, dout, D)
    attention_bwd_delta_kernel[B * triton.cdiv(L, tile.block_l), H](
        *(Operand.of(dout), Operand.of(out), dlse, delta, L, strides(dlse, 3)),
        D=D,
        BLOCK_D=head_constants(D, 0)["BLOCK_D"],
        **constants_of(tile),
    )
    return delta


def launch_dfreq(
    partials: torch.Tensor, tokens: Tokens, batch: int, length: int, is_query: bool, block: int
) -> torch.Tensor:
    """dfreq of every sequence, [B, R] fp64, from the shares [tiles, heads, R] of one of the two kernels."""
    _, heads, pairs = partials.shape
    count = sequence_count(batch, tokens)
    sums = torch.empty(count, heads, pairs, dtype=torch.float64, device=partials.device)
    attention_bwd_dfreq_kernel[count, heads](
        *(partials, sums, token_arguments(tokens)[0], length, count),
        IS_QUERY=is_query,
        R=pairs,
        BLOCK=block,
        BLOCK_R=triton.next_power_of_2(pairs),
        **constants_of(find_entry(ATTENTION_BWD_DFREQ, partials, pairs)),
    )
    return sums.sum(dim=1)


def backward_config(table: Table[Tile], q: torch.Tensor, pairs: int) -> dict[str, int]:
    """Constexprs, warps and stages for dq, or dk and dv; among them whether the loop has q', k' and their gradient in
    one part: from shared memory one product costs less than two.

    Counted instructions of the loop in halves and in one part, D 128: for dq 318 and 311 on sm_90, 438 and 336 on
    sm_100; for dk and dv 302 and 296, 465 and 392.
    """
    config = launch_config(table, q, pairs)
    reads_shared = architecture_of(q) in READS_SHARED and dtype_kind(q) == "half"
    return {**config, "IS_JOINED": reads_shared and config["TAIL"] == 0 and config["R"] == config["BLOCK_R"]}


def launch_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tables: Tables,
    tokens: Tokens,
    rule: Rule,
    rotate: tuple[bool, bool],
    wants_dfreq: bool,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> torch.Tensor | None:
    """Write dq [B, L, H, D], dk and dv [B, S, G, D]; returns dfreq of every sequence, [B, R] fp64, if wanted.

    q and k are the forward pass's q' and k'; `rotate` says which of them it rotated. Nothing is written for tokens of
    no sequence and for slots that are not valid. At least one token, key and head.
    """
    batch, L, H, _ = q.shape
    S, G = k.shape[1:3]
    T, C, _, R = tables.coarse.shape
    tile = tables.fine.shape[1]
    count = sequence_count(batch, tokens)
    dfreq = torch.zeros(count, R, dtype=torch.float64, device=q.device) if wants_dfreq else None
    with torch.cuda.device_of(q):
        lse = lse.contiguous()
        delta = launch_delta(dout, out, dlse, lse)
        inputs = (*map(Operand.of, (dout, q, k, v)), lse, delta, TableOperand.of(tables))

        def launch(kernel, table, is_query: bool, outputs: tuple[torch.Tensor, ...]) -> None:
            config = backward_config(table, q, R if any(rotate) else 0)
            block, heads, length, cu_seqlens, is_rotated = (
                (config["BLOCK_L"], H, L, tokens.cu_seqlens_q, rotate[0])
                if is_query
                else (config["BLOCK_S"], G, S, tokens.cu_seqlens_k, rotate[1])
            )
            count_tiles = tile_count(cu_seqlens, batch, length, block)
            partials = None
            if wants_dfreq and is_rotated:
                partials = torch.empty(count_tiles, heads, R, dtype=torch.float64, device=q.device)
            kernel[count_tiles, heads](
                *(*inputs, *map(Operand.of, outputs), partials, *token_arguments(tokens), L, S),
                *(count, H // G, rule.window, T, C * tile),
                ROTATE=is_rotated,
                IS_CENTRED=all(rotate),
                PRECISION=precision(q),
                TILE=tile,
                **rule_constants(rule),
                **config,
            )
            if partials is not None:
                dfreq.add_(launch_dfreq(partials, tokens, batch, length, is_query, block))

        launch(attention_bwd_dq_kernel, ATTENTION_BWD_DQ, True, (dq,))
        launch(attention_bwd_dkv_kernel, ATTENTION_BWD_DKV, False, (dk, dv))
    return dfreq
