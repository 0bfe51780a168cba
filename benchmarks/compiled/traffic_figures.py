"""Bytes that every kind of kernel moves per element or key, counted, beside the least that must move.

Small calls are counted and scaled to a real one: bytes are the sum of what a call, a token, and in decoding a range of
keys takes, and as many small calls as there are terms give each. Only page numbers do not grow evenly: 4 bytes a page
at most are left out.

Judged is what memory delivers. A program per few tokens requests 1,024 bytes of factored tables a token, 5 % of q and k
at 32 and 8 heads of 128 dims in bf16, but all programs share the same 32 KB and one row for 64 tokens: L2 holds these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.compiled.traffic import Bytes, Traffic, count_traffic
from benchmarks.measure import Goal
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels import append, attention_fwd, decode, qkv_rotary, rotary
from clex_kernels.kernels.decode_combine import most_ranges, most_splits

TOKENS = 4096
CONTEXT = 32768
HEADS, KEY_HEADS = 32, 8
TABLE_SHARE = 0.03
DECODE_BYTES = 1.02
TABLE = ("coarse_ptr", "fine_ptr", "table.coarse", "table.fine")


@dataclass(frozen=True)
class Figure:
    """Bytes for each `unit` of a call: the least that must move, and what is moved, by part."""

    name: str
    unit: str
    floor: float
    parts: dict[str, Bytes]

    @property
    def total(self) -> Bytes:
        requested, memory = zip(*self.parts.values(), strict=True)
        return Bytes(sum(requested), sum(memory))


def split(launches: Sequence[Traffic], parts: dict[str, Sequence[str]]) -> list[Bytes]:
    """Bytes of the tensors of each part, and of those in none."""
    moved = [Bytes(0, 0)] * (len(parts) + 1)
    for launch in launches:
        for name in launch.reads.keys() | launch.writes.keys():
            part = next((i for i, names in enumerate(parts.values()) if name in names), len(parts))
            moved[part] = moved[part].plus(launch.total(name))
    return moved


def scale(
    count: Callable[[int], list[Traffic]],
    parts: dict[str, Sequence[str]],
    terms: Callable[[int], tuple[int, ...]],
    sizes: Sequence[int],
    size: int,
) -> dict[str, Bytes]:
    """Bytes by part, and "other", of a call of `size` tokens or keys, from small calls of `sizes`."""
    moved = np.array([split(count(n), parts) for n in sizes], float)
    each = np.linalg.solve(np.array([terms(n) for n in sizes], float), moved.reshape(len(sizes), -1))
    scaled = (np.array(terms(size), float) @ each).reshape(moved.shape[1:])
    return {name: Bytes(*row) for name, row in zip((*parts, "other"), scaled.tolist(), strict=True)}


def per_unit(name: str, unit: str, floor: float, parts: dict[str, Bytes], units: int) -> Figure:
    # scaling is exact but for fp64's last digits.
    return Figure(
        name, unit, floor, {key: Bytes(*(round(n / units, 9) for n in moved)) for key, moved in parts.items()}
    )


def call_and_tokens(tokens: int) -> tuple[int, ...]:
    return 1, tokens


def make_tables(tokens: int, pairs: int, tile: int) -> Tables:
    """Factored tables, or with tile 1 those of sampled positions."""
    coarse, fine = (torch.zeros(1, rows, 2, pairs) for rows in (-(-tokens // tile), tile))
    return Tables(coarse, fine, torch.zeros(1, tokens, dtype=torch.float64) if tile == 1 else None)


def count_rotary(stem: str, dims: int, pairs: int, dtype: torch.dtype, tile: int, tokens: int) -> list[Traffic]:
    tables = make_tables(tokens, pairs, tile)
    q, k, q_out, k_out, dq, dk = (
        torch.zeros(1, tokens, heads, dims, dtype=dtype) for _ in range(3) for heads in (HEADS, KEY_HEADS)
    )
    if stem == "rotary":
        return count_traffic(
            lambda: rotary.launch_rotary(q, k, q_out, k_out, tables.coarse, tables.fine, None, None, 0, False)
        )
    return count_traffic(lambda: rotary.launch_rotary_bwd(q, k, q_out, k_out, dq, dk, *tables[:3], None, None, 0))


def rotary_figure(stem: str, dims: int, pairs: int, dtype: torch.dtype, tile: int = 64) -> Figure:
    """q and k read once and written once; backward reads what dfreq needs of the rotated q and k, their pairs, too."""
    elements = [f"{x}{side}_ptr" for x in ("q", "k", "dq", "dk") for side in ("", "_out")]
    count = partial(count_rotary, stem, dims, pairs, dtype, tile)
    moved = scale(count, {"elements": elements, "table": TABLE}, call_and_tokens, (128, 192), TOKENS)
    name = f"{stem}-{str(dtype)[6:]}-D{dims}-R{pairs}" + ("-positions" if tile == 1 else "")
    floor = dtype.itemsize * (2 if stem == "rotary" else 2 + 2 * pairs / dims)
    return per_unit(name, "element of q and k", floor, moved, TOKENS * (HEADS + KEY_HEADS) * dims)


def rotary_figures() -> list[Figure]:
    """Factored tables and those of sampled positions, which have a row for each token."""
    half, single = torch.bfloat16, torch.float32
    shapes = ((128, 64, half), (128, 64, half, 1), (128, 64, single), (80, 16, half))
    return [rotary_figure(stem, *shape) for stem in ("rotary", "rotary_bwd") for shape in shapes]


def count_keys(tokens: int) -> list[Traffic]:
    k = torch.zeros(1, tokens, KEY_HEADS, 128, dtype=torch.bfloat16)
    tables = make_tables(tokens, 64, 64)
    launch = partial(attention_fwd.launch_attention_fwd_keys, k, torch.zeros_like(k), tables, Tokens(), tokens)
    return count_traffic(launch)


def count_append(tokens: int) -> list[Traffic]:
    k, v, k_cache, v_cache = (torch.zeros(1, tokens, KEY_HEADS, 128, dtype=torch.bfloat16) for _ in range(4))
    return count_traffic(partial(append.launch_append, k, v, k_cache, v_cache, torch.tensor([tokens]), None))


def count_projections(tokens: int) -> list[Traffic]:
    """With 4 and 1 heads and few columns of x: each head's results and angles are the same, the rest is left out."""
    x = torch.zeros(1, tokens, 64, dtype=torch.bfloat16)
    weights = tuple(torch.zeros(heads * 128, 64, dtype=torch.bfloat16) for heads in (4, 1, 1))
    outs = tuple(torch.zeros(1, tokens, heads, 128, dtype=torch.bfloat16) for heads in (4, 1, 1))
    tables = make_tables(tokens, 64, 64)
    return count_traffic(partial(qkv_rotary.launch_qkv_rotary, x, weights, None, outs, None, tables, None, 0))


def pass_figures() -> list[Figure]:
    """The pass over k, appending, and what the projections' epilogue moves."""
    keys = scale(
        count_keys, {"elements": ("k.ptr", "k_rotated_ptr"), "table": TABLE}, call_and_tokens, (128, 192), TOKENS
    )
    copies = ("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr")
    appended = scale(count_append, {"elements": copies}, call_and_tokens, (128, 192), TOKENS)
    results = {"elements": [f"outs.{i}.ptr" for i in range(3)], "table": TABLE}
    projected = scale(count_projections, results, call_and_tokens, (640, 768), TOKENS)
    del projected["other"]
    return [
        per_unit("attention_fwd_keys", "element of k", 4, keys, TOKENS * KEY_HEADS * 128),
        per_unit("append-bfloat16-D128", "element of k and v", 4, appended, TOKENS * 2 * KEY_HEADS * 128),
        per_unit("qkv_rotary-bfloat16-D128-R64, epilogue", "element of q, k and v", 2, projected, TOKENS * 6 * 128),
    ]


def count_decode(
    keys: int,
    dims: int = 128,
    pairs: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    groups: int = KEY_HEADS,
    page: int | None = None,
    length: int = 1,
) -> list[Traffic]:
    """A step over `keys` keys of one sequence, the merging of its ranges included."""
    capacity = keys if page is None else -(-keys // page) * page
    shape = (1, capacity) if page is None else (capacity // page, page)
    q, out = (torch.zeros(1, length, HEADS, dims, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(*shape, groups, dims, dtype=dtype) for _ in range(2))
    block_table = None if page is None else torch.arange(capacity // page, dtype=torch.int32)[None]
    tokens, tables = Tokens(kv_end=torch.tensor([keys])), make_tables(capacity, pairs, 64)
    terms = (tables, tokens, block_table, None, Rule(0.1, is_causal=True), (True, True))
    return count_traffic(partial(decode.launch_decode, q, k, v, *terms, out, torch.zeros(1, HEADS, length)))


def decode_figure(name: str, context: int = CONTEXT, **settings: Any) -> Figure:
    """K and V read once, by a step with `settings` of `count_decode`."""
    parts = {"keys and values": ("k.ptr", "v.ptr"), "table": TABLE, "ranges": ("partials_ptr", "partial_lse_ptr")}
    groups, dims, length = settings.get("groups", KEY_HEADS), settings.get("dims", 128), settings.get("length", 1)
    splits = most_splits(groups, length * HEADS // groups)

    def terms(keys: int) -> tuple[int, ...]:
        return 1, keys, most_ranges(keys, length, None, splits)

    moved = scale(partial(count_decode, **settings), parts, terms, (64, 128, 256), context)
    floor = 2 * dims * settings.get("dtype", torch.bfloat16).itemsize
    return per_unit(f"decode-{name}", "key of one key head", floor, moved, context * groups)


def decode_figures() -> list[Figure]:
    """Every tile and kind of cache."""
    single: dict[str, Any] = {"dtype": torch.float32}
    shapes: dict[str, dict[str, Any]] = {
        "bfloat16-D64-R32": {"dims": 64, "pairs": 32},
        "bfloat16-D80-R16": {"dims": 80, "pairs": 16},
        "bfloat16-D128-R64": {},
        "bfloat16-D128-R16": {"pairs": 16},
        "bfloat16-D256-R128": {"dims": 256, "pairs": 128},
        "bfloat16-D256-R32": {"dims": 256, "pairs": 32},
        "float32-D64-R32": {"dims": 64, "pairs": 32, **single},
        "float32-D128-R64": single,
        "float32-D256-R128": {"dims": 256, "pairs": 128, **single},
        **{f"bfloat16-D128-R64-page{page}": {"page": page} for page in (16, 64, 256)},
        "bfloat16-D128-R64-rows32": {"groups": 1},
        "bfloat16-D128-R64-page16-rows32": {"page": 16, "length": 8},
    }
    return [decode_figure(name, **settings) for name, settings in shapes.items()]


def counted_figures() -> list[Figure]:
    """All of them."""
    return [*rotary_figures(), *pass_figures(), *decode_figures()]


def goals(figures: Sequence[Figure]) -> list[Goal]:
    """What rotary and decoding must reach, of bytes that memory delivers."""
    found = []
    for figure in figures:
        stem = figure.name.split("-")[0]
        if stem in ("rotary", "rotary_bwd"):
            elements, table = (figure.parts[part].memory / figure.floor for part in ("elements", "table"))
            what = f"{figure.name}: bytes of elements over reading and writing each once"
            found.append(Goal(what, elements, "at most", 1.0, label="counted"))
            what = f"{figure.name}: bytes of the table over those of the elements"
            found.append(Goal(what, 100 * table, "at most", 100 * TABLE_SHARE, unit="%", label="counted"))
        elif stem == "decode":
            what = f"{figure.name}: bytes per key at {CONTEXT} keys over its K and V"
            found.append(Goal(what, figure.total.memory / figure.floor, "at most", DECODE_BYTES, label="counted"))
    return found
