"""Checks of the attention and decode kernels, called as users call them, against the reference called the same way."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention_calls import Call, expected, make, make_table, options_of, outputs_and_gradients
from torch import Tensor

from benchmarks.on_gpu.checks import DTYPES, Check, Head, everywhere, follow_rule, label, move, spread_over
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import Sizes
from clex_kernels import attention, decode_attention

# causal attention comes with every head and dtype; these are what changes the code besides.
ATTENTION = {
    "full": {"h": 5, "g": 1},
    "keys before the queries": {"queries": 33, "keys": 150, "options": {"is_causal": True}},
    "window": {"queries": 200, "keys": 200, "options": {"window": 50}},
    "softcap, lse": {"queries": 97, "keys": 97, "options": {"is_causal": True, "softcap": 3.0, "return_lse": True}},
    "packed": {
        "queries": 140,
        "keys": 140,
        "options": {"is_causal": True, "cu_seqlens_q": [0, 37, 38, 140], "cu_seqlens_k": [0, 37, 38, 140]},
    },
    "padded": {"queries": 70, "keys": 90, "options": {"is_causal": True, "kv_start": [5, 0], "kv_end": [90, 81]}},
    "a stack by length, log-n": {
        "queries": 130,
        "keys": 130,
        "tables": 16,
        "settings": {"log_scale": True},
        "options": {"is_causal": True, "kv_start": [60, 0]},
    },
    "sampled positions of each sequence": {
        "queries": 129,
        "keys": 129,
        "tables": 2,
        "settings": {"positions": 2},
        "options": {"is_causal": True},
    },
}
CAUSAL = {"queries": 129, "keys": 129, "h": 6, "g": 2, "options": {"is_causal": True}}

LONG = {"settings": {"length": 4160}}
# slots of a page, beside a Call; kv_end by sequence is in its options.
DECODE: dict[str, tuple[int | None, dict[str, Any]]] = {
    "mixed lengths, lse": (None, {"b": 3, "keys": 200, "options": {"kv_end": [37, 64, 200], "return_lse": True}}),
    "thousands of keys": (None, {"keys": 4150, "b": 1, "options": {"kv_end": [4150]}, **LONG}),
    "five tokens, window": (None, {"queries": 5, "keys": 200, "options": {"kv_end": [150, 200], "window": 66}}),
    "sixteen tokens, softcap": (None, {"queries": 16, "keys": 90, "options": {"kv_end": [90, 65], "softcap": 1.5}}),
    "left padding, a stack by length": (
        None,
        {"keys": 200, "tables": 16, "options": {"kv_end": [200, 70], "kv_start": [9, 50]}},
    ),
    "pages of 16": (16, {"keys": 160, "options": {"kv_end": [160, 33]}}),
    "pages of 64, two tokens": (64, {"queries": 2, "keys": 192, "options": {"kv_end": [65, 192]}}),
    "pages of 256, window": (256, {"keys": 512, "options": {"kv_end": [257, 512], "window": 300}, **LONG}),
}
ONE_TOKEN = {"keys": 150, "options": {"kv_end": [37, 150]}}


def given_call(settings: dict[str, Any], head: Head) -> Call:
    return Call(**{"queries": 65, "keys": 65, **settings, "d": head[0], "r": head[1]})


def attend_on(gpu: Gpu, backend: str) -> Callable[..., Any]:
    def run(*operands: Any, **options: Any) -> Any:
        outputs = attention(*move(gpu, operands), **move(gpu, options), backend=backend)
        return tuple(x.cpu() for x in outputs) if isinstance(outputs, tuple) else outputs.cpu()

    return run


def check_attention(call: Call, dtype: str, backend: int, gpu: Gpu) -> None:
    """Forward and backward by the device's first backend, or the next."""
    kind, given = DTYPES[dtype], make(call)
    given = given._replace(**{name: getattr(given, name).to(kind) for name in ("q", "k", "v")})
    actual = outputs_and_gradients(attend_on(gpu, gpu.attention_backends[backend]), call, given, kind)
    near = outputs_and_gradients(expected, call, given, kind)
    exactly = given._replace(**{name: getattr(given, name).double() for name in ("q", "k", "v")})
    true = outputs_and_gradients(expected, call, exactly)
    for results in (actual, near):
        if "lse" in results:
            results["lse"] = results["lse"].float()
    follow_rule(kind, actual, near, true)


def to_pages(page: int, kv_end: Tensor, *caches: Tensor) -> tuple[list[Tensor], Tensor]:
    """Caches [B, S, G, D] in shuffled pages of a pool that has one to spare, and the block table."""
    pages = caches[0].shape[1] // page
    order = torch.randperm(len(kv_end) * pages + 1, generator=torch.Generator().manual_seed(1))
    block_table = order[: len(kv_end) * pages].view(len(kv_end), pages)
    pools = []
    for x in caches:
        pool = x.new_full((len(order), page, *x.shape[2:]), float("nan"))
        pool[block_table.flatten()] = x.reshape(-1, page, *x.shape[2:])
        pools.append(pool)
    return pools, block_table


@torch.no_grad()
def check_decode(call: Call, page: int | None, dtype: str, gpu: Gpu) -> None:
    """Slots past kv_end hold NaN, as a cache's may."""
    kind, (q, k, v, freq) = DTYPES[dtype], make(call)
    q, k, v = (x.to(kind) for x in (q, k, v))
    options = options_of(call)
    with_lse = options.pop("return_lse", False)
    dead = (torch.arange(call.keys) >= options["kv_end"][:, None])[..., None, None]
    caches, paging = [x.masked_fill(dead, float("nan")) for x in (k, v)], {}
    if page is not None:
        caches, block_table = to_pages(page, options["kv_end"], *caches)
        paging = {"block_table": block_table}
    table = make_table(call, freq, kind)
    arguments = move(gpu, (q, *caches, table)), move(gpu, options | paging)
    out, lse = decode_attention(*arguments[0], **arguments[1], return_lse=True)
    results = [
        dict(zip(("out", "lse"), expected(*operands, table, is_causal=True, return_lse=True, **options), strict=True))
        for operands in ((q, k, v), (q.double(), k.double(), v.double()))
    ]
    results[0]["lse"] = results[0]["lse"].float()
    actual = {"out": out, "lse": lse} if with_lse else {"out": out}
    follow_rule(kind, actual, *results)


def attention_checks(sizes: Sizes) -> list[Check]:
    H, G, D = sizes.attention_heads
    length = min(sizes.prefill)
    # a whole reference of all heads would take longer than all other checks.
    large = Call(1, length, length, 2 * H // G, 2, D, D // 2, settings={"length": length}, options={"is_causal": True})

    def check(feature: str, head: Head, dtype: str, settings: dict[str, Any], backend: int = 0) -> Check:
        run = partial(check_attention, given_call(settings, head), dtype, backend)
        return Check("attention", label(feature, head, dtype), run)

    return [
        *(check(*variant, CAUSAL) for variant in everywhere("causal", sizes.heads)),
        Check("attention", f"{length} tokens, D {D}, bf16", partial(check_attention, large, "bf16", 0)),
        *(check(*variant, ATTENTION[variant[0]]) for variant in spread_over(list(ATTENTION), sizes.heads)),
        *(check(*variant, CAUSAL, -1) for variant in spread_over(["causal by torch's attention"], sizes.heads)),
    ]


def decode_checks(sizes: Sizes) -> list[Check]:
    shape = min(sizes.decode, key=lambda shape: shape.B * shape.S)
    large = Call(
        shape.B,
        1,
        shape.S,
        shape.H,
        shape.G,
        shape.D,
        shape.D // 2,
        settings={"length": shape.S},
        options={"kv_end": [shape.S] * shape.B},
    )

    def check(feature: str, head: Head, dtype: str, page: int | None, settings: dict[str, Any]) -> Check:
        call = Call(**{"queries": 1, **settings, "d": head[0], "r": head[1]})
        return Check("decode", label(feature, head, dtype), partial(check_decode, call, page, dtype))

    return [
        *(check(*variant, None, ONE_TOKEN) for variant in everywhere("one token", sizes.heads)),
        Check("decode", f"the benchmark's shape, {shape.name}", partial(check_decode, large, None, "bf16")),
        *(check(*variant, *DECODE[variant[0]]) for variant in spread_over(list(DECODE), sizes.heads)),
    ]
