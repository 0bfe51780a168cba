"""Launch configurations of every kernel: plain tables by architecture, kind of dtype and size.

    table[architecture][kind][most] is for sizes up to `most`

A size is, for attention and decoding, the columns of a head as its parts are padded; for the projections the rows M;
for kernels that stream, the tokens L of a sequence; ANY, where one entry serves all. Entries may be exchanged, which is
how others are tried. What is a rule and no choice, such as fewer rows where a call has fewer, stays with its kernel.
"""

from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
import triton


class Tile(NamedTuple):
    """Attention: queries and keys of a step of the loop; for decoding block_l is the most rows."""

    block_l: int
    block_s: int
    num_warps: int
    num_stages: int


class ProjectionTile(NamedTuple):
    """Projections: rows of x, columns of the results and the stretch of C of a step; blocks of rows that share L2."""

    block_m: int
    block_n: int
    block_c: int
    group_m: int
    num_warps: int
    num_stages: int


class StreamTile(NamedTuple):
    """Kernels that stream: the most tokens of a program, bytes of a tile, and warps for so many bytes."""

    tokens: int
    tile_bytes: int
    num_warps: int


class KeysTile(NamedTuple):
    """Attention's pass over k: slots by heads of a step of a program."""

    block_l: int
    block_h: int
    num_warps: int


class RowsTile(NamedTuple):
    """Rows of a program."""

    block_l: int
    num_warps: int


class SumTile(NamedTuple):
    """Terms of a step of a sum."""

    block_n: int
    num_warps: int


Entry = TypeVar("Entry", bound=tuple)
Table: TypeAlias = dict[str, dict[str, dict[int, Entry]]]
# more than any size.
ANY = 1 << 31

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# architectures whose tensor cores read tiles from shared memory; others read registers.
READS_SHARED = ("sm_90", "sm_100")
# any other NVIDIA GPU takes sm_120's, which ask the least: sm_86 and sm_89 have its 99 KB of shared memory, sm_121 is
# its sibling, and of older ones and those to come nothing is known.
RESEMBLED = {80: "sm_80", 87: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}


def architecture_of(x: torch.Tensor) -> str:
    """The architecture whose tables serve x: sm_80's the interpreter's CPU tensors, and meta tensors with no GPU."""
    if x.device.type == "cpu":
        return "sm_80"
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        if x.device.type != "meta":
            raise
        return "sm_80"
    return "gfx942" if target.backend == "hip" else RESEMBLED.get(target.arch, "sm_120")


def dtype_kind(x: torch.Tensor) -> Literal["half", "float32"]:
    """Whether x is of 16 bits, or wider: fp32, and the interpreter's fp64."""
    return "float32" if x.element_size() > 2 else "half"


def find_entry(table: Table[Entry], x: torch.Tensor, size: int) -> Entry:
    """The table's entry for x and this size."""
    architecture, kind = architecture_of(x), dtype_kind(x)
    rows = table[architecture][kind]
    for most, entry in rows.items():
        if size <= most:
            return entry
    name = type(entry).__name__
    raise ValueError(f"launch tables: expected a size of at most {most} ({name}, {architecture}, {kind}), got {size}")


def constants_of(entry: tuple[int, ...]) -> dict[str, int]:
    """The entry as a launch takes it: its blocks by the names of constexprs."""
    return {name if name.startswith("num_") else name.upper(): value for name, value in entry._asdict().items()}


ATTENTION_FWD: Table[Tile] = {
    "sm_80": {
        "half": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(32, 32, 4, 2)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "sm_100": {
        "half": {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "sm_120": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "float32": {64: Tile(64, 32, 8, 1), 128: Tile(64, 16, 8, 1), 256: Tile(32, 16, 8, 1)},
    },
}

ATTENTION_BWD_DQ: Table[Tile] = {
    "sm_80": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2), 512: Tile(32, 32, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2), 512: Tile(64, 16, 8, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_100": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(64, 32, 8, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_120": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 2), 512: Tile(32, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 2), 512: Tile(32, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
}

ATTENTION_BWD_DKV: Table[Tile] = {
    "sm_80": {
        "half": {64: Tile(32, 128, 8, 2), 128: Tile(16, 128, 8, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_90": {
        "half": {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_100": {
        "half": {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "sm_120": {
        "half": {64: Tile(32, 128, 8, 2), 128: Tile(16, 128, 8, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
    "gfx942": {
        "half": {64: Tile(32, 128, 8, 2), 128: Tile(16, 128, 8, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 16, 4, 2)},
        "float32": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)},
    },
}

# fewer stages than three would leave nothing loading during a step, but on AMD, whose loop loads to registers and whose
# warps are twice as wide.
DECODE: Table[Tile] = {
    "sm_80": {
        "half": {128: Tile(32, 64, 4, 3), 192: Tile(32, 64, 4, 3), 256: Tile(16, 64, 8, 3), 512: Tile(16, 32, 8, 3)},
        "float32": {64: Tile(16, 32, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 16, 8, 2), 512: Tile(16, 16, 8, 2)},
    },
    "sm_90": {
        "half": {128: Tile(32, 64, 4, 3), 192: Tile(32, 64, 4, 3), 256: Tile(16, 32, 8, 3), 512: Tile(16, 32, 8, 3)},
        "float32": {64: Tile(16, 32, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 16, 8, 2), 512: Tile(16, 16, 8, 2)},
    },
    "sm_100": {
        "half": {128: Tile(32, 64, 4, 3), 192: Tile(32, 64, 4, 3), 256: Tile(16, 32, 8, 3), 512: Tile(16, 32, 8, 3)},
        "float32": {64: Tile(16, 32, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 16, 8, 2), 512: Tile(16, 16, 8, 2)},
    },
    "sm_120": {
        "half": {128: Tile(32, 64, 4, 3), 192: Tile(32, 64, 4, 3), 256: Tile(16, 32, 8, 3), 512: Tile(16, 32, 8, 3)},
        "float32": {64: Tile(16, 32, 4, 3), 128: Tile(16, 32, 4, 3), 256: Tile(16, 16, 8, 2), 512: Tile(16, 16, 8, 2)},
    },
    "gfx942": {
        "half": {128: Tile(32, 64, 4, 2), 192: Tile(32, 64, 4, 2), 256: Tile(16, 32, 4, 2), 512: Tile(16, 32, 4, 2)},
        "float32": {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2), 512: Tile(16, 16, 4, 2)},
    },
}

# few rows take narrow tiles, such that 6144 columns make work for 132 multiprocessors, and long stretches of C, such
# that much of W is on its way. Many rows from registers: two programs share a multiprocessor, one's epilogue beside the
# other's loop. AMD's loop loads to registers.
QKV_ROTARY: Table[ProjectionTile] = {
    "sm_80": {
        "half": {
            16: ProjectionTile(16, 32, 256, 1, 4, 4),
            64: ProjectionTile(64, 32, 128, 1, 4, 4),
            512: ProjectionTile(64, 128, 64, 8, 4, 3),
            ANY: ProjectionTile(128, 128, 32, 8, 4, 4),
        },
        "float32": {
            16: ProjectionTile(16, 32, 64, 1, 4, 3),
            64: ProjectionTile(64, 32, 32, 1, 4, 3),
            ANY: ProjectionTile(128, 64, 16, 8, 8, 4),
        },
    },
    "sm_90": {
        "half": {
            16: ProjectionTile(16, 32, 256, 1, 4, 4),
            64: ProjectionTile(64, 32, 128, 1, 4, 4),
            512: ProjectionTile(64, 128, 64, 8, 4, 4),
            ANY: ProjectionTile(128, 256, 64, 8, 8, 3),
        },
        "float32": {
            16: ProjectionTile(16, 32, 64, 1, 4, 3),
            64: ProjectionTile(64, 32, 32, 1, 4, 3),
            ANY: ProjectionTile(128, 64, 16, 8, 8, 4),
        },
    },
    "sm_100": {
        "half": {
            16: ProjectionTile(16, 32, 256, 1, 4, 4),
            64: ProjectionTile(64, 32, 128, 1, 4, 4),
            512: ProjectionTile(64, 128, 64, 8, 4, 4),
            ANY: ProjectionTile(128, 256, 64, 8, 8, 3),
        },
        "float32": {
            16: ProjectionTile(16, 32, 64, 1, 4, 3),
            64: ProjectionTile(64, 32, 32, 1, 4, 3),
            ANY: ProjectionTile(128, 64, 16, 8, 8, 4),
        },
    },
    "sm_120": {
        "half": {
            16: ProjectionTile(16, 32, 256, 1, 4, 4),
            64: ProjectionTile(64, 32, 128, 1, 4, 4),
            512: ProjectionTile(64, 64, 64, 8, 4, 4),
            ANY: ProjectionTile(128, 128, 32, 8, 4, 4),
        },
        "float32": {
            16: ProjectionTile(16, 32, 64, 1, 4, 3),
            64: ProjectionTile(64, 32, 32, 1, 4, 3),
            ANY: ProjectionTile(128, 64, 16, 8, 8, 4),
        },
    },
    "gfx942": {
        "half": {
            16: ProjectionTile(16, 32, 256, 1, 4, 2),
            64: ProjectionTile(64, 32, 128, 1, 4, 2),
            512: ProjectionTile(64, 128, 64, 8, 4, 2),
            ANY: ProjectionTile(128, 128, 32, 8, 4, 2),
        },
        "float32": {
            16: ProjectionTile(16, 32, 64, 1, 4, 2),
            64: ProjectionTile(64, 32, 32, 1, 4, 2),
            ANY: ProjectionTile(128, 64, 16, 8, 8, 2),
        },
    },
}

# one token a program of sequences of up to 64, which would leave a GPU idle. A tile, of one half of the pairs, is two
# 16-byte accesses a thread.
ROTARY: Table[StreamTile] = {
    "sm_80": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
    },
    "sm_90": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
    },
    "sm_100": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
    },
    "sm_120": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
    },
    "gfx942": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(4, 4096, 4)},
    },
}

ROTARY_BWD: Table[StreamTile] = {
    "sm_80": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
    },
    "sm_90": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
    },
    "sm_100": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
    },
    "sm_120": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
    },
    "gfx942": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(16, 4096, 4)},
    },
}

# as many tokens as fit the bytes, of k or v, once a sequence is long.
APPEND: Table[StreamTile] = {
    "sm_80": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
    },
    "sm_90": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
    },
    "sm_100": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
    },
    "sm_120": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
    },
    "gfx942": {
        "half": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
        "float32": {64: StreamTile(1, 4096, 4), ANY: StreamTile(ANY, 4096, 4)},
    },
}

ATTENTION_FWD_KEYS: Table[KeysTile] = {
    "sm_80": {"half": {ANY: KeysTile(16, 8, 4)}, "float32": {ANY: KeysTile(16, 8, 4)}},
    "sm_90": {"half": {ANY: KeysTile(16, 8, 4)}, "float32": {ANY: KeysTile(16, 8, 4)}},
    "sm_100": {"half": {ANY: KeysTile(16, 8, 4)}, "float32": {ANY: KeysTile(16, 8, 4)}},
    "sm_120": {"half": {ANY: KeysTile(16, 8, 4)}, "float32": {ANY: KeysTile(16, 8, 4)}},
    "gfx942": {"half": {ANY: KeysTile(16, 8, 4)}, "float32": {ANY: KeysTile(16, 8, 4)}},
}

ATTENTION_BWD_DELTA: Table[RowsTile] = {
    "sm_80": {"half": {ANY: RowsTile(64, 4)}, "float32": {ANY: RowsTile(64, 4)}},
    "sm_90": {"half": {ANY: RowsTile(64, 4)}, "float32": {ANY: RowsTile(64, 4)}},
    "sm_100": {"half": {ANY: RowsTile(64, 4)}, "float32": {ANY: RowsTile(64, 4)}},
    "sm_120": {"half": {ANY: RowsTile(64, 4)}, "float32": {ANY: RowsTile(64, 4)}},
    "gfx942": {"half": {ANY: RowsTile(64, 4)}, "float32": {ANY: RowsTile(64, 4)}},
}

# the sums of shares are of fp32 numbers whatever the dtype.
ATTENTION_BWD_DFREQ: Table[SumTile] = {
    "sm_80": {"float32": {ANY: SumTile(16, 4)}},
    "sm_90": {"float32": {ANY: SumTile(16, 4)}},
    "sm_100": {"float32": {ANY: SumTile(16, 4)}},
    "sm_120": {"float32": {ANY: SumTile(16, 4)}},
    "gfx942": {"float32": {ANY: SumTile(16, 4)}},
}

DECODE_COMBINE: Table[SumTile] = {
    "sm_80": {"float32": {ANY: SumTile(16, 4)}},
    "sm_90": {"float32": {ANY: SumTile(16, 4)}},
    "sm_100": {"float32": {ANY: SumTile(16, 4)}},
    "sm_120": {"float32": {ANY: SumTile(16, 4)}},
    "gfx942": {"float32": {ANY: SumTile(16, 4)}},
}
