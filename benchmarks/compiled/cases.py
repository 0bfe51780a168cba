"""Every configuration that the package ships, as launches to compile: the launch tables' entries, and others like them.

A case is a configuration, the same kernel without rotary (`plain`) that one is compared with, or a variant: a feature
whose code differs, which is compiled and checked, but not in the report.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.compiled.launches import (
    AttentionLaunch,
    launch_append,
    launch_decode,
    launch_qkv_rotary,
    launch_rotary,
)
from benchmarks.compiled.work import (
    Constants,
    Work,
    attention_work,
    decode_work,
    projection_work,
    streaming_work,
    sum_work,
)
from clex_kernels.attention_terms import Rule


@dataclass(frozen=True)
class Case:
    """One launch of `kernel`, among others perhaps. A trip through a loop handles `elements` elements and does `work`.

    `is_streaming`: its loops move each element once, in accesses of 128 bits or more, reading `reads` elements for each
    one they write. `is_product`: its loops multiply on tensor cores. `plain` names the case without rotary.
    """

    name: str
    kernel: str
    launch: Callable[[], Any]
    elements: Callable[[Constants], int]
    itemsize: int
    reads: int = 1
    is_streaming: bool = False
    is_product: bool = False
    has_loop: bool = True
    work: Callable[[Constants], Work] | None = None
    plain: str | None = None
    role: Literal["configuration", "plain", "variant"] = "configuration"


HALF, SINGLE = torch.bfloat16, torch.float32
Settings = dict[str, dict[str, Any]]
CAPPED = Rule(0.1, window=512, softcap=30.0, log_base=8.0)


def as_variants(cases: list[Case]) -> list[Case]:
    return [replace(case, role="variant") for case in cases]


def head_elements(constants: Constants) -> int:
    return constants["BLOCK_L"] * constants["BLOCK_H"] * (2 * constants["BLOCK_R"] + constants["TAIL"])


def rotary_cases() -> list[Case]:
    """Both kernels for short and long sequences, the head shapes whose code differs, both kinds of table."""

    def case(stem: str, size: str, dtype: torch.dtype, dims: int, pairs: int, variant: str = "") -> Case:
        name = "-".join(filter(None, (stem, size, str(dtype)[6:], f"D{dims}-R{pairs}", variant)))
        launch = partial(launch_rotary, stem, size, dims, pairs, dtype, variant)
        reads, itemsize = 1 if stem == "rotary" else 2, dtype.itemsize

        def work(constants: Constants) -> Work:
            # three operations a number, and as many for dangle.
            return streaming_work(head_elements(constants), itemsize, reads, 3.0 * reads)

        streams = dims == 2 * pairs
        return Case(name, f"{stem}_kernel", launch, head_elements, itemsize, reads, streams, work=work)

    return [
        *(case(stem, size, HALF, 128, 64) for stem in ("rotary", "rotary_bwd") for size in ("short", "long")),
        case("rotary", "long", SINGLE, 128, 64),
        case("rotary", "long", HALF, 80, 16),
        case("rotary_bwd", "long", SINGLE, 128, 64),
        case("rotary_bwd", "long", HALF, 80, 16),
        *as_variants(
            [
                *(case("rotary", "long", HALF, 128, 64, name) for name in ("inplace", "conjugate", "stack-positions")),
                case("rotary", "long", HALF, 96, 12),
                case("rotary_bwd", "long", HALF, 128, 64, "stack-positions"),
            ]
        ),
    ]


def attention_case(passed: str, name: str, plain: str | None = None, saves: bool = False, **settings: Any) -> Case:
    """A pass over attention: fwd, which `saves` for the backward pass or not, bwd_dq or bwd_dkv."""
    call = AttentionLaunch(**settings)
    launch = partial(call.forward, saves) if passed == "fwd" else call.backward
    itemsize, kernel = call.q.element_size(), f"attention_{passed}_kernel"
    return Case(
        *(f"attention_{passed}-{name}", kernel, launch, lambda c: c["BLOCK_L"] * c["BLOCK_S"], itemsize),
        is_product=itemsize == 2,
        work=partial(attention_work, kernel, itemsize=itemsize),
        plain=plain and f"attention_{passed}-{plain}",
    )


HEADS: Settings = {
    "bfloat16-D64-R32": {"dims": 64, "pairs": 32},
    "bfloat16-D80-R16": {"dims": 80, "pairs": 16},
    "bfloat16-D128-R64": {},
    "bfloat16-D256-R128": {"dims": 256, "pairs": 128},
    "float32-D64-R32": {"dims": 64, "pairs": 32, "dtype": SINGLE},
    "float32-D128-R64": {"dtype": SINGLE},
    "float32-D256-R128": {"dims": 256, "pairs": 128, "dtype": SINGLE},
}
# partly rotated heads, whose parts take more columns, and so other tiles than without rotary.
PARTIAL: Settings = {
    "bfloat16-D128-R16": {"pairs": 16},
    "bfloat16-D256-R32": {"dims": 256, "pairs": 32},
}


def plain_of(name: str) -> str:
    """The name of the case without rotary: dtype and D of a configuration's name."""
    return "-".join((*name.split("-")[:2], "plain"))


def attention_cases() -> list[Case]:
    """Each pass for every tile, with rotary and without, and the features that change the code."""
    full: Settings = {"bfloat16-D128-R64-full": {"rule": Rule(0.1)}}
    features: Settings = {
        "bfloat16-D128-R64-packed": {"variant": "packed"},
        "bfloat16-D128-R64-padded-window-softcap-log": {"variant": "padded", "rule": CAPPED},
        "bfloat16-D128-R64-stack-positions-full": {"variant": "stack-positions", "rule": Rule(0.1)},
    }
    call, cases = AttentionLaunch(), []
    for passed, shapes, compared in (
        ("fwd", HEADS, ("bfloat16-D64", "bfloat16-D80", "bfloat16-D128", "bfloat16-D256")),
        ("bwd_dq", HEADS | PARTIAL, ("bfloat16-D128",)),
        ("bwd_dkv", HEADS | PARTIAL, ("bfloat16-D128",)),
    ):
        for name, settings in shapes.items():
            plain = plain_of(name) if name in HEADS and name.rpartition("-")[0] in compared else None
            cases.append(attention_case(passed, name, plain, **settings))
        for stem in compared:
            settings = {"dims": int(stem.partition("-D")[2]), "variant": "rotated"}
            cases.append(replace(attention_case(passed, f"{stem}-plain", **settings), role="plain"))
        cases += as_variants([attention_case(passed, name, saves=True, **given) for name, given in features.items()])
    (whole,) = (attention_case("fwd", name, f"{name}-plain", **settings) for name, settings in full.items())
    without = attention_case("fwd", "bfloat16-D128-R64-full-plain", variant="rotated", **full["bfloat16-D128-R64-full"])
    keys = Case(
        *("attention_fwd_keys", "attention_fwd_keys_kernel", call.keys, head_elements, 2),
        is_streaming=True,
        work=lambda c: streaming_work(head_elements(c), 2, 1, 3.0),
    )
    return [
        *(*cases, whole, replace(without, role="plain"), keys),
        *as_variants([attention_case("fwd", name, saves=True, **settings) for name, settings in PARTIAL.items()]),
        Case("attention_bwd_delta", "attention_bwd_delta_kernel", call.backward, lambda _: 1, 2, has_loop=False),
        Case(
            *("attention_bwd_dfreq", "attention_bwd_dfreq_kernel", call.backward, partial_sums, 8),
            work=lambda c: sum_work(partial_sums(c), 8, 1.0),
        ),
    ]


def partial_sums(constants: Constants) -> int:
    return constants["BLOCK_N"] * constants["BLOCK_R"]


def append_cases() -> list[Case]:
    """A prefill into a contiguous cache, and one token into pages."""

    def elements(constants: Constants) -> int:
        return 2 * constants["BLOCK_L"] * constants["BLOCK_G"] * constants["BLOCK_D"]

    def case(name: str, length: int, pages: tuple[int, int] | None) -> Case:
        launch = partial(launch_append, length, pages)
        return Case(
            *(f"append-bfloat16-D128-{name}", "append_kernel", launch, elements, 2),
            is_streaming=True,
            work=lambda c: streaming_work(elements(c), 2, 1, 0.0),
        )

    return [case("long", 4096, None), case("paged", 1, (512, 256))]


def decode_cases() -> list[Case]:
    """Every tile, and each feature that changes the code; an element is a key of one key head, or a number merged."""

    def case(name: str, plain: str | None = None, **settings: Any) -> Case:
        itemsize = settings.get("dtype", HALF).itemsize
        return Case(
            *(f"decode-{name}", "decode_kernel", partial(launch_decode, **settings), trip_slots, itemsize),
            is_product=itemsize == 2,
            work=lambda c: decode_work(c, itemsize, trip_slots(c)),
            plain=plain and f"decode-{plain}",
        )

    def trip_slots(constants: Constants) -> int:
        return constants["BLOCK_S"]

    compared = ("bfloat16-D64", "bfloat16-D128", "bfloat16-D256")
    others: Settings = {
        "bfloat16-D128-R64-rows32": {"groups": 1},
        "bfloat16-D128-R64-page16": {"page": 16},
        "bfloat16-D128-R64-page256": {"page": 256},
    }
    variants: Settings = {
        "bfloat16-D128-R64-page16-rows32": {"page": 16, "length": 16},
        "bfloat16-D256-R128-page16": {"dims": 256, "pairs": 128, "page": 16},
        "bfloat16-D128-R64-window-softcap-log-stack": {"rule": CAPPED, "variant": "stack"},
    }
    plain = [case(f"{stem}-plain", dims=int(stem.partition("-D")[2]), rotates=(False, False)) for stem in compared]
    return [
        *(
            case(name, plain_of(name) if name in HEADS and name.rpartition("-")[0] in compared else None, **settings)
            for name, settings in (HEADS | PARTIAL | others).items()
        ),
        *(replace(without, role="plain") for without in plain),
        Case(
            *("decode_combine", "decode_combine_kernel", launch_decode, lambda c: c["BLOCK_N"] * c["D"], 4),
            # scaled by the weight of its range, and added.
            work=lambda c: sum_work(c["BLOCK_N"] * c["D"], 4, 2.0),
        ),
        *as_variants([case(name, **settings) for name, settings in variants.items()]),
    ]


def qkv_rotary_cases() -> list[Case]:
    """Every tile, the widest without rotation too, and all at once that a call may ask for."""

    def case(name: str, rows: int, plain: str | None = None, **settings: Any) -> Case:
        itemsize = settings.get("dtype", HALF).itemsize
        launch = partial(launch_qkv_rotary, rows, **settings)
        return Case(
            *(f"qkv_rotary-{name}", "qkv_rotary_kernel", launch, lambda c: c["BLOCK_M"] * c["BLOCK_N"], itemsize),
            is_product=itemsize == 2,
            work=lambda c: projection_work(c, itemsize, rows),
            plain=plain and f"qkv_rotary-{plain}",
        )

    def plain(rows: int) -> str | None:
        return f"bfloat16-D128-rows{rows}-plain" if rows in compared else None

    compared = (16, 8192)
    everything = case("bfloat16-D80-R16-rows8192-all", 8192, dims=80, pairs=16, variant="all")
    return [
        *(case(f"bfloat16-D128-R64-rows{rows}", rows, plain(rows)) for rows in (16, 64, 512, 8192)),
        *(case(f"float32-D128-R64-rows{rows}", rows, dtype=SINGLE) for rows in (16, 64, 8192)),
        *(replace(case(plain(rows), rows, rotates=(False, False)), role="plain") for rows in compared),
        *as_variants([everything]),
    ]


CASES = {
    case.name: case
    for case in [*rotary_cases(), *attention_cases(), *append_cases(), *decode_cases(), *qkv_rotary_cases()]
}
