"""Launches of every kernel of the package over tensors without memory, of the sizes of Llama-3-8B."""

import torch

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels import append, attention_bwd, attention_fwd, decode, qkv_rotary, rotary


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_rotary(
    stem: str,
    size: str,
    dims: int = 128,
    pairs: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    variant: str = "",
) -> None:
    """Rotary, or with `stem` rotary_bwd its backward, of short or long sequences over tensors without memory."""
    length, tile, tables = (1 if size == "short" else 4096), *((1, 16) if variant == "stack-positions" else (64, 1))
    q, k = meta(2, length, 32, dims, dtype=dtype), meta(2, length, 8, dims, dtype=dtype)
    coarse, fine = (meta(tables, n, 2, pairs, dtype=torch.float32) for n in (4096 // tile, tile))
    positions = meta(tables, 4096, dtype=torch.float64) if tile == 1 else None
    index = meta(2, dtype=torch.int64) if tables > 1 else None
    ids = meta(2, length, dtype=torch.int64) if size == "short" else None
    q_out, k_out = (q, k) if variant == "inplace" else (torch.empty_like(q), torch.empty_like(k))
    if stem == "rotary":
        rotary.launch_rotary(q, k, q_out, k_out, coarse, fine, index, ids, 0, variant == "conjugate")
    else:
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        rotary.launch_rotary_bwd(q, k, q_out, k_out, dq, dk, coarse, fine, positions, index, ids, 0)


CAUSAL = Rule(0.1, is_causal=True)


class AttentionLaunch:
    """Launches of attention's kernels for one call, over tensors without memory."""

    def __init__(
        self,
        dims: int = 128,
        pairs: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        rule: Rule = CAUSAL,
        variant: str = "",
    ):
        shape = (1, 4096) if variant == "packed" else (2, 4096)
        self.q, self.k, self.v = (meta(*shape, heads, dims, dtype=dtype) for heads in (32, 8, 8))
        self.lse = meta(shape[0], 32, 4096, dtype=torch.float32)
        tables, tile = (16, 1) if variant == "stack-positions" else (1, 64)
        coarse, fine = (meta(tables, n, 2, pairs, dtype=torch.float32) for n in (4096 // tile, tile))
        positions = meta(tables, 4096, dtype=torch.float64) if tile == 1 else None
        self.tables = Tables(coarse, fine, positions, meta(2, dtype=torch.int64) if tables > 1 else None)
        bounds = meta(6, dtype=torch.int32)
        self.tokens = Tokens()
        if variant == "packed":
            self.tokens = Tokens(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        if variant == "padded":
            slots = meta(2, dtype=torch.int64)
            self.tokens = Tokens(kv_start=slots, kv_end=slots, lengths=slots)
        self.rule = rule
        self.rotates = variant != "rotated"

    def keys(self) -> None:
        attention_fwd.launch_attention_fwd_keys(self.k, torch.empty_like(self.k), self.tables, self.tokens, 4096)

    def forward(self, saves: bool = True) -> None:
        q_rotated = torch.empty_like(self.q) if saves and self.rotates else None
        terms = (self.tables, self.tokens, self.rule, self.rotates)
        attention_fwd.launch_attention_fwd(
            self.q, self.k, self.v, *terms, torch.empty_like(self.q), self.lse, q_rotated
        )

    def backward(self) -> None:
        dq, dk, dv = map(torch.empty_like, (self.q, self.k, self.v))
        terms = (self.tables, self.tokens, self.rule, (self.rotates, self.rotates), self.rotates)
        saved = (self.q, None, self.q, self.k, self.v, self.q, self.lse)
        attention_bwd.launch_attention_bwd(*saved, *terms, dq, dk, dv)


def launch_append(length: int, pages: tuple[int, int] | None) -> None:
    """Keys and values of new tokens over tensors without memory, into caches or `pages` and tokens of a page."""
    k, v = (meta(2, length, 8, 128, dtype=torch.bfloat16) for _ in range(2))
    cache = (2, 8192) if pages is None else pages
    k_cache, v_cache = (meta(*cache, 8, 128, dtype=torch.bfloat16) for _ in range(2))
    block_table = None if pages is None else meta(2, 32, dtype=torch.int32)
    append.launch_append(k, v, k_cache, v_cache, meta(2, dtype=torch.int64), block_table)


def launch_decode(
    dims: int = 128,
    pairs: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 1,
    groups: int = 8,
    page: int | None = None,
    rule: Rule = CAUSAL,
    rotates: tuple[bool, bool] = (True, True),
    capacity: int = 32768,
    variant: str = "",
) -> None:
    """A step of decoding with 32 query heads over tensors without memory."""
    q = meta(2, length, 32, dims, dtype=dtype)
    shape = (2, capacity) if page is None else (2 * capacity // page, page)
    k, v = (meta(*shape, groups, dims, dtype=dtype) for _ in range(2))
    block_table = None if page is None else meta(2, capacity // page, dtype=torch.int32)
    tables = 16 if variant == "stack" else 1
    coarse, fine = (meta(tables, n, 2, pairs, dtype=torch.float32) for n in (capacity // 64, 64))
    slots = meta(2, dtype=torch.int64)
    tokens = Tokens(kv_end=slots)
    if variant == "stack":
        tokens = Tokens(kv_start=slots, kv_end=slots, lengths=slots)
    decode.launch_decode(
        *(q, k, v, Tables(coarse, fine), tokens, block_table, 4096 if tables > 1 else None, rule, rotates),
        *(torch.empty_like(q), meta(2, 32, length, dtype=torch.float32)),
    )


def launch_qkv_rotary(
    rows: int = 8192,
    dims: int = 128,
    pairs: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    rotates: tuple[bool, bool] = (True, True),
    offset: int = 0,
    sequences: int = 2,
    variant: str = "",
) -> None:
    """Projections of a model of 4096 columns with 32 query heads over tensors without memory; `rows` in all."""
    x = meta(sequences, rows // sequences, 4096, dtype=dtype)
    weights = tuple(meta(heads * dims, 4096, dtype=dtype) for heads in (32, 8, 8))
    outs = tuple(meta(*x.shape[:2], heads, dims, dtype=dtype) for heads in (32, 8, 8))
    tables = 16 if variant == "all" else 1
    coarse, fine = (meta(tables, n, 2, pairs, dtype=torch.float32) for n in (rows // 64 + 1, 64))
    biases, k_rotated, index, position_ids = None, None, None, None
    if variant == "all":
        biases = tuple(meta(heads * dims, dtype=dtype) for heads in (32, 8, 8))
        k_rotated, index = torch.empty_like(outs[1]), meta(sequences, dtype=torch.int64)
        position_ids = meta(*x.shape[:2], dtype=torch.int64)
    qkv_rotary.launch_qkv_rotary(
        *(x, weights, biases, outs, k_rotated, Tables(coarse, fine, index=index), position_ids, offset, rotates)
    )
