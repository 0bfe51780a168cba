"""The launches that the compile gate compiles: every shipped tile, and the variants whose code differs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels import append, attention_bwd, attention_fwd, decode, qkv_rotary, rotary


@dataclass(frozen=True)
class Case:
    """One launch of `kernel`, among others perhaps. A trip through a loop handles `elements` elements.

    `is_streaming`: its loops move each element once, in accesses of 128 bits or more, reading `reads` elements for each
    one they write. `is_product`: its loops multiply on tensor cores.
    """

    name: str
    kernel: str
    launch: Callable[[], Any]
    elements: Callable[[dict[str, int]], int]
    itemsize: int
    reads: int = 1
    is_streaming: bool = False
    is_product: bool = False
    has_loop: bool = True


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rotary_cases() -> list[Case]:
    """Both kernels for short and long sequences, the head shapes whose code differs, both kinds of table."""

    def elements(constants: dict[str, int]) -> int:
        return constants["BLOCK_L"] * constants["BLOCK_H"] * (2 * constants["BLOCK_R"] + constants["TAIL"])

    def case(stem: str, size: str, dtype: torch.dtype, dims: int, pairs: int, variant: str = "") -> Case:
        length, tile, tables = (1 if size == "short" else 4096), *((1, 16) if variant == "stack-positions" else (64, 1))
        q, k = meta(2, length, 32, dims, dtype=dtype), meta(2, length, 8, dims, dtype=dtype)
        coarse, fine = (meta(tables, n, 2, pairs, dtype=torch.float32) for n in (4096 // tile, tile))
        positions = meta(tables, 4096, dtype=torch.float64) if tile == 1 else None
        index = meta(2, dtype=torch.int64) if tables > 1 else None
        ids = meta(2, length, dtype=torch.int64) if size == "short" else None
        q_out, k_out = (q, k) if variant == "inplace" else (torch.empty_like(q), torch.empty_like(k))

        def launch() -> None:
            if stem == "rotary":
                rotary.launch_rotary(q, k, q_out, k_out, coarse, fine, index, ids, 0, variant == "conjugate")
            else:
                dq, dk = torch.empty_like(q), torch.empty_like(k)
                rotary.launch_rotary_bwd(q, k, q_out, k_out, dq, dk, coarse, fine, positions, index, ids, 0)

        name = "-".join(filter(None, (stem, size, str(dtype)[6:], f"D{dims}-R{pairs}", variant)))
        kernel, reads = f"{stem}_kernel", 1 if stem == "rotary" else 2
        return Case(name, kernel, launch, elements, dtype.itemsize, reads, dims == 2 * pairs)

    half, single = torch.bfloat16, torch.float32
    table = [(stem, size) for stem, tokens in rotary.TOKENS.items() for size in tokens._fields]
    return [
        *(case(stem, size, half, 128, 64) for stem, size in table),
        *(case("rotary", "long", half, 128, 64, variant) for variant in ("inplace", "conjugate", "stack-positions")),
        case("rotary", "long", single, 128, 64),
        case("rotary", "long", half, 80, 16),
        case("rotary", "long", half, 96, 12),
        case("rotary_bwd", "long", half, 128, 64, "stack-positions"),
        case("rotary_bwd", "long", single, 80, 16),
    ]


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


def attention_cases() -> list[Case]:
    """Both passes for every tile, with rotary and without, and for each feature that changes the code."""

    def slots_and_heads(constants: dict[str, int]) -> int:
        return constants["BLOCK_L"] * constants["BLOCK_H"] * (2 * constants["BLOCK_R"] + constants["TAIL"])

    def tile(constants: dict[str, int]) -> int:
        return constants["BLOCK_L"] * constants["BLOCK_S"]

    def case(passed: str, name: str, **settings: Any) -> Case:
        call = AttentionLaunch(**settings)
        launch = call.forward if passed == "fwd" else call.backward
        is_half = call.q.element_size() == 2
        full = f"attention_{passed}-{name}"
        return Case(full, f"attention_{passed}_kernel", launch, tile, call.q.element_size(), is_product=is_half)

    def inference(is_causal: bool, variant: str) -> Case:
        launch = partial(AttentionLaunch(rule=Rule(0.1, is_causal), variant=variant).forward, saves=False)
        name = "-".join(("attention_fwd-inference", "causal" if is_causal else "full", *filter(None, [variant])))
        return Case(name, "attention_fwd_kernel", launch, tile, 2, is_product=True)

    shapes: dict[str, dict[str, Any]] = {
        "bfloat16-D64-R32": {"dims": 64, "pairs": 32},
        "bfloat16-D80-R16": {"dims": 80, "pairs": 16},
        "bfloat16-D128-R64": {},
        "bfloat16-D128-R16": {"pairs": 16},
        "bfloat16-D256-R128": {"dims": 256, "pairs": 128},
        "bfloat16-D256-R32": {"dims": 256, "pairs": 32},
        "float32-D64-R32": {"dims": 64, "pairs": 32, "dtype": torch.float32},
        "float32-D128-R64": {"dtype": torch.float32},
        "float32-D256-R128": {"dims": 256, "pairs": 128, "dtype": torch.float32},
    }
    capped = Rule(0.1, window=512, softcap=30.0, log_base=8.0)
    features: dict[str, dict[str, Any]] = {
        "bfloat16-D128-R64-packed": {"variant": "packed"},
        "bfloat16-D128-R64-padded-window-softcap-log": {"variant": "padded", "rule": capped},
        "bfloat16-D128-R64-stack-positions-full": {"variant": "stack-positions", "rule": Rule(0.1)},
    }
    call = AttentionLaunch()
    return [
        Case("attention_fwd_keys", "attention_fwd_keys_kernel", call.keys, slots_and_heads, 2, is_streaming=True),
        Case("attention_bwd_delta", "attention_bwd_delta_kernel", call.backward, lambda _: 1, 2, has_loop=False),
        Case("attention_bwd_dfreq", "attention_bwd_dfreq_kernel", call.backward, lambda _: 1, 8),
        *(case(passed, name, **settings) for passed in PASSES for name, settings in (shapes | features).items()),
        *(case(passed, "bfloat16-D128-rotated", variant="rotated") for passed in PASSES[1:]),
        *(inference(is_causal, variant) for is_causal in (True, False) for variant in ("", "rotated")),
    ]


def append_cases() -> list[Case]:
    """A prefill into a contiguous cache, and one token into pages."""

    def elements(constants: dict[str, int]) -> int:
        return 2 * constants["BLOCK_L"] * constants["BLOCK_G"] * constants["BLOCK_D"]

    def case(name: str, length: int, cache: tuple[int, int], block_table: torch.Tensor | None) -> Case:
        k, v = (meta(2, length, 8, 128, dtype=torch.bfloat16) for _ in range(2))
        k_cache, v_cache = (meta(*cache, 8, 128, dtype=torch.bfloat16) for _ in range(2))
        launch = partial(append.launch_append, k, v, k_cache, v_cache, meta(2, dtype=torch.int64), block_table)
        return Case(f"append-bfloat16-D128-{name}", "append_kernel", launch, elements, 2, is_streaming=True)

    return [
        case("long", 4096, (2, 8192), None),
        case("paged", 1, (512, 256), meta(2, 32, dtype=torch.int32)),
    ]


PASSES = ("fwd", "bwd_dq", "bwd_dkv")


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


def decode_cases() -> list[Case]:
    """Every tile, and each feature that changes the code; an element is a key of one key head, or a number merged."""

    def case(name: str, **settings: Any) -> Case:
        itemsize = settings.get("dtype", torch.bfloat16).itemsize
        launch = partial(launch_decode, **settings)
        return Case(
            f"decode-{name}", "decode_kernel", launch, lambda c: c["BLOCK_S"], itemsize, is_product=itemsize == 2
        )

    capped = Rule(0.1, window=512, softcap=30.0, log_base=8.0)
    cases: dict[str, dict[str, Any]] = {
        "bfloat16-D64-R32": {"dims": 64, "pairs": 32},
        "bfloat16-D80-R16": {"dims": 80, "pairs": 16},
        "bfloat16-D128-R64": {},
        "bfloat16-D128-R16": {"pairs": 16},
        "bfloat16-D256-R128": {"dims": 256, "pairs": 128},
        "bfloat16-D256-R32": {"dims": 256, "pairs": 32},
        "float32-D64-R32": {"dims": 64, "pairs": 32, "dtype": torch.float32},
        "float32-D128-R64": {"dtype": torch.float32},
        "float32-D256-R128": {"dims": 256, "pairs": 128, "dtype": torch.float32},
        "bfloat16-D128-R64-rows32": {"groups": 1},
        "bfloat16-D128-R64-page16": {"page": 16},
        "bfloat16-D128-R64-page16-rows32": {"page": 16, "length": 16},
        "bfloat16-D128-R64-page256": {"page": 256},
        "bfloat16-D256-R128-page16": {"dims": 256, "pairs": 128, "page": 16},
        "bfloat16-D128-R64-window-softcap-log-stack": {"rule": capped, "variant": "stack"},
        "bfloat16-D128-rotated": {"rotates": (False, False)},
    }
    merge = Case("decode_combine", "decode_combine_kernel", launch_decode, lambda c: c["BLOCK_N"] * c["D"], 4)
    return [merge, *(case(name, **settings) for name, settings in cases.items())]


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


def qkv_rotary_cases() -> list[Case]:
    """Every tile, the widest without rotation too, and all at once that a call may ask for."""

    def case(name: str, **settings: Any) -> Case:
        itemsize = settings.get("dtype", torch.bfloat16).itemsize
        launch = partial(launch_qkv_rotary, **settings)
        return Case(
            *(f"qkv_rotary-{name}", "qkv_rotary_kernel", launch, lambda c: c["BLOCK_M"] * c["BLOCK_N"], itemsize),
            is_product=itemsize == 2,
        )

    cases: dict[str, dict[str, Any]] = {
        **{f"bfloat16-D128-R64-rows{rows}": {"rows": rows} for rows in (16, 64, 512, 8192)},
        "bfloat16-D128-R64-rows8192-plain": {"rotates": (False, False)},
        "bfloat16-D80-R16-rows8192-all": {"dims": 80, "pairs": 16, "variant": "all"},
        **{f"float32-D128-R64-rows{rows}": {"rows": rows, "dtype": torch.float32} for rows in (16, 64, 8192)},
    }
    return [case(name, **settings) for name, settings in cases.items()]


CASES = {
    case.name: case
    for case in [*rotary_cases(), *attention_cases(), *append_cases(), *decode_cases(), *qkv_rotary_cases()]
}
