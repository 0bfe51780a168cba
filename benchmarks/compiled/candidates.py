"""Entries of the launch tables that are worth trying, and how one is tried and a table written down again."""

import contextlib
import math
from collections.abc import Iterator

from clex_kernels.kernels import launch_tables
from clex_kernels.kernels.launch_tables import (
    ANY,
    Entry,
    KeysTile,
    ProjectionTile,
    RowsTile,
    StreamTile,
    SumTile,
    Table,
    Tile,
)

TABLES: dict[str, Table] = {
    "attention_fwd": launch_tables.ATTENTION_FWD,
    "attention_bwd_dq": launch_tables.ATTENTION_BWD_DQ,
    "attention_bwd_dkv": launch_tables.ATTENTION_BWD_DKV,
    "decode": launch_tables.DECODE,
    "qkv_rotary": launch_tables.QKV_ROTARY,
    "rotary": launch_tables.ROTARY,
    "rotary_bwd": launch_tables.ROTARY_BWD,
    "append": launch_tables.APPEND,
    "attention_fwd_keys": launch_tables.ATTENTION_FWD_KEYS,
    "attention_bwd_delta": launch_tables.ATTENTION_BWD_DELTA,
    "attention_bwd_dfreq": launch_tables.ATTENTION_BWD_DFREQ,
    "decode_combine": launch_tables.DECODE_COMBINE,
}
SUMS = [SumTile(16, 4), SumTile(8, 4), SumTile(32, 4), SumTile(16, 2), SumTile(32, 8)]
TOKENS = [StreamTile(tokens, 4096, 4) for tokens in (1, 2, 4, 8, 16)]
STREAMS = [*TOKENS, StreamTile(4, 2048, 2), StreamTile(4, 8192, 8), StreamTile(4, 8192, 4)]
APPENDED = [StreamTile(1, 4096, 4), *(StreamTile(ANY, *rest) for rest in ((4096, 4), (2048, 2), (8192, 8), (8192, 4)))]
KEYS = [KeysTile(16, 8, 4), KeysTile(8, 8, 4), KeysTile(16, 4, 4), KeysTile(16, 8, 8), KeysTile(32, 4, 4)]
ROWS = [RowsTile(64, 4), RowsTile(32, 4), RowsTile(16, 4), RowsTile(64, 8), RowsTile(128, 8)]
# by table and kind of dtype, for all sizes; the compiler says which of them fit a size and an architecture.
CANDIDATES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "attention_fwd": {
        "half": [
            Tile(128, 64, 4, 2),
            Tile(128, 64, 8, 2),
            Tile(128, 128, 8, 2),
            Tile(128, 32, 4, 2),
            Tile(128, 32, 8, 2),
            Tile(64, 128, 4, 2),
            Tile(64, 64, 4, 2),
            Tile(64, 32, 4, 2),
            Tile(64, 32, 8, 2),
            Tile(32, 32, 4, 2),
        ],
        "float32": [
            Tile(64, 32, 8, 1),
            Tile(64, 16, 8, 1),
            Tile(64, 32, 4, 1),
            Tile(32, 32, 8, 1),
            Tile(32, 16, 4, 1),
            Tile(32, 16, 8, 1),
            Tile(16, 16, 8, 1),
        ],
    },
    "attention_bwd_dq": {
        "half": [
            Tile(128, 64, 8, 2),
            Tile(128, 32, 8, 2),
            Tile(64, 64, 4, 2),
            Tile(64, 64, 8, 2),
            Tile(64, 32, 4, 2),
            Tile(64, 32, 8, 2),
            Tile(64, 16, 8, 2),
            Tile(32, 64, 4, 2),
            Tile(32, 32, 4, 2),
            Tile(32, 16, 4, 2),
        ],
        "float32": [
            Tile(32, 32, 8, 1),
            Tile(32, 16, 8, 1),
            Tile(32, 32, 4, 1),
            Tile(32, 16, 4, 1),
            Tile(16, 32, 8, 1),
            Tile(16, 16, 8, 1),
            Tile(16, 16, 4, 1),
        ],
    },
    "attention_bwd_dkv": {
        "half": [
            Tile(64, 128, 8, 2),
            Tile(32, 128, 8, 2),
            Tile(16, 128, 8, 2),
            Tile(64, 64, 8, 2),
            Tile(32, 64, 4, 2),
            Tile(32, 64, 8, 2),
            Tile(16, 64, 4, 2),
            Tile(32, 32, 4, 2),
            Tile(16, 32, 4, 2),
            Tile(16, 16, 4, 2),
        ],
        "float32": [
            Tile(32, 32, 8, 1),
            Tile(16, 32, 8, 1),
            Tile(32, 16, 8, 1),
            Tile(32, 32, 4, 1),
            Tile(16, 16, 8, 1),
            Tile(16, 16, 4, 1),
        ],
    },
    "decode": {
        "half": [
            Tile(32, 64, 4, 3),
            Tile(32, 64, 8, 3),
            Tile(32, 32, 4, 3),
            Tile(32, 32, 8, 3),
            Tile(32, 16, 4, 3),
            Tile(32, 16, 8, 3),
            Tile(32, 64, 4, 4),
            Tile(32, 32, 4, 4),
            Tile(32, 64, 4, 2),
        ],
        "float32": [
            Tile(16, 64, 8, 3),
            Tile(16, 32, 4, 3),
            Tile(16, 32, 8, 3),
            Tile(16, 16, 4, 3),
            Tile(16, 16, 8, 3),
            Tile(16, 16, 8, 2),
            Tile(16, 16, 4, 2),
            Tile(16, 32, 4, 2),
        ],
    },
    "qkv_rotary": {
        "half": [
            ProjectionTile(16, 32, 256, 1, 4, 4),
            ProjectionTile(16, 32, 128, 1, 4, 4),
            ProjectionTile(16, 64, 128, 1, 4, 4),
            ProjectionTile(64, 32, 128, 1, 4, 4),
            ProjectionTile(64, 64, 64, 1, 4, 4),
            ProjectionTile(64, 64, 128, 1, 4, 3),
            ProjectionTile(64, 128, 64, 8, 4, 4),
            ProjectionTile(128, 128, 32, 8, 4, 4),
            ProjectionTile(128, 128, 64, 8, 8, 3),
            ProjectionTile(128, 256, 64, 8, 8, 3),
        ],
        "float32": [
            ProjectionTile(16, 32, 64, 1, 4, 3),
            ProjectionTile(16, 64, 32, 1, 4, 3),
            ProjectionTile(64, 32, 32, 1, 4, 3),
            ProjectionTile(64, 64, 16, 8, 4, 4),
            ProjectionTile(128, 64, 16, 8, 8, 4),
            ProjectionTile(128, 128, 16, 8, 8, 3),
        ],
    },
    "rotary": {"half": STREAMS, "float32": STREAMS},
    "rotary_bwd": {"half": STREAMS, "float32": STREAMS},
    "append": {"half": APPENDED, "float32": APPENDED},
    "attention_fwd_keys": {"half": KEYS, "float32": KEYS},
    "attention_bwd_delta": {"half": ROWS, "float32": ROWS},
    "attention_bwd_dfreq": {"float32": SUMS},
    "decode_combine": {"float32": SUMS},
}


def near(entry: tuple[int, ...], today: tuple[int, ...]) -> bool:
    """Whether the entry could take today's place: a tile of a quarter to four times its area, no more rows of x."""
    if isinstance(entry, ProjectionTile):
        return entry.block_m == today.block_m or (entry.block_m >= 64 and today.block_m == 128)
    if isinstance(entry, StreamTile) and today.tokens == 1:
        # for short sequences, of which programs of more tokens would be too few.
        return entry.tokens <= 2
    areas = [math.prod(n for at, n in x._asdict().items() if at.startswith("block")) for x in (entry, today)]
    return 0.25 <= areas[0] / areas[1] <= 4


def candidates(name: str, architecture: str, kind: str, size: int) -> list[tuple[int, ...]]:
    """Today's entry of the table `name`, then the others worth trying in its place."""
    today = TABLES[name][architecture][kind][size]
    others = [entry for entry in CANDIDATES[name][kind] if near(entry, today)]
    if name == "decode":
        # block_l is but the most rows: a step of one token has fewer.
        others = [entry._replace(block_l=today.block_l) for entry in others]
    if name == "qkv_rotary":
        # that blocks of many rows share weights in L2 is no matter of the tile.
        others = [entry._replace(group_m=today.group_m) for entry in others]
    if architecture == "gfx942" and hasattr(today, "num_stages"):
        # its loops load to registers, which have no room for more.
        others = [entry._replace(num_stages=min(2, entry.num_stages)) for entry in others]
    return list(dict.fromkeys([today, *others]))


@contextlib.contextmanager
def exchanged(table: Table[Entry], architecture: str, kind: str, size: int, entry: Entry) -> Iterator[None]:
    """Launches take this entry of the table."""
    rows = table[architecture][kind]
    before = rows[size]
    rows[size] = entry
    try:
        yield
    finally:
        rows[size] = before


def render_table(name: str, table: Table) -> str:
    """The table as launch_tables.py writes it."""
    entry = next(entry for kinds in table.values() for rows in kinds.values() for entry in rows.values())
    return render(table, f"{name.upper()}: Table[{type(entry).__name__}] = ", 0)


def render(node: dict | tuple[int, ...], prefix: str, depth: int) -> str:
    """prefix and node: on a line if it has room, else an item a line."""
    start = " " * 4 * depth + prefix
    line = start + literal(node)
    # 120 columns, and a comma.
    if isinstance(node, tuple) or (depth > 0 and len(line) < 120):
        return line
    items = "".join(f"{render(value, f'{literal(key)}: ', depth + 1)},\n" for key, value in node.items())
    return f"{start}{{\n{items}{' ' * 4 * depth}}}"


def literal(node: dict | tuple[int, ...] | str | int) -> str:
    """The node in one line of Python."""
    if isinstance(node, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(value)}" for key, value in node.items()) + "}"
    if isinstance(node, tuple):
        return f"{type(node).__name__}({', '.join(map(literal, node))})"
    return f'"{node}"' if isinstance(node, str) else "ANY" if node == ANY else str(node)
