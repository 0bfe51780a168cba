"""What a trip through a kernel's main loop has to do at least, and a whole call's arithmetic per byte, by tile.

Derived from the constants that a kernel was compiled with, in the letters of the README; bytes are those that have to
come from memory or go there, as far as nothing else of the call brings them to L2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Constants = Mapping[str, int]

# the calls that intensities are of: tokens of a sequence, keys of a decode step, columns of a model.
LENGTH, KEYS, COLUMNS = 4096, 32768, 4096
# query heads by key head.
GROUP = 4

PRODUCTS = {"attention_fwd_kernel": (2, 0), "attention_bwd_dq_kernel": (3, 2), "attention_bwd_dkv_kernel": (4, 2)}


@dataclass(frozen=True)
class Work:
    """Of one trip: multiply-adds that the result needs, those of the padded tiles, and bytes from and to memory.

    `intensity` is floating-point operations per byte of a whole call.
    """

    macs: int
    padded_macs: int
    memory_bytes: int
    intensity: float


def parts(constants: Constants) -> int:
    """Columns in which a product of heads runs: rotated halves and tail, each padded."""
    return 2 * constants["BLOCK_R"] * (constants["R"] > 0) + constants["BLOCK_T"] * (constants["TAIL"] > 0)


def attention_work(kernel: str, constants: Constants, itemsize: int) -> Work:
    tile, dims, block_d = constants["BLOCK_L"] * constants["BLOCK_S"], constants["D"], constants["BLOCK_D"]
    # all, and those over heads in parts; the forward pass has them in one.
    products, in_parts = PRODUCTS[kernel]
    padded = (products - in_parts) * block_d + (in_parts * parts(constants) if in_parts else 0)
    # operands of a head: q, out; q, dout, dq; or q, dout by head, and k, v, dk, dv; beside k and v by group.
    by_head, by_group = {2: (2, 2), 3: (3, 2), 4: (2, 4)}[products]
    operations = 2 * products * LENGTH * LENGTH * dims
    moved = (by_head + by_group / GROUP) * LENGTH * dims * itemsize
    return Work(products * tile * dims, tile * padded, 0, operations / moved)


def decode_work(constants: Constants, itemsize: int, slots: int) -> Work:
    rows, dims = constants["GROUP"], constants["D"]
    padded = constants["BLOCK_L"] * (parts(constants) + constants["BLOCK_D"])
    moved = slots * 2 * dims * itemsize
    return Work(slots * 2 * rows * dims, slots * padded, moved, 4 * rows * dims / (2 * dims * itemsize))


def projection_work(constants: Constants, itemsize: int, rows: int) -> Work:
    block_m, block_n, block_c = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C"))
    outputs = (constants["H"] + 2 * constants["G"]) * constants["D"]
    # where one block has all rows, every weight is read once; otherwise blocks share them in L2.
    moved = block_n * block_c * itemsize if rows <= block_m else 0
    operations = 2 * rows * outputs * COLUMNS
    intensity = operations / ((rows * (COLUMNS + outputs) + outputs * COLUMNS) * itemsize)
    macs = min(rows, block_m) * block_n * block_c
    return Work(macs, block_m * block_n * block_c, moved, intensity)


def streaming_work(elements: int, itemsize: int, reads: int, operations: float) -> Work:
    """Elements that are read `reads` times and written once, with few operations on each."""
    return Work(0, 0, elements * itemsize * (reads + 1), operations / (itemsize * (reads + 1)))


def sum_work(elements: int, itemsize: int, operations: float) -> Work:
    """Elements that are read once, with few operations on each, and leave one result for many."""
    return Work(0, 0, elements * itemsize, operations / itemsize)
