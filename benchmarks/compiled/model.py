"""A static model of a kernel on a GPU: how many blocks fit a multiprocessor, and which of its pipes is busy longest.

A trip through the main loop keeps each pipe busy for its instructions' clocks; the pipes work side by side, so a trip
takes as long as the busiest of them, and blocks that share a multiprocessor share its pipes. The floor is what the
result itself costs: its multiply-adds on tensor cores (fp32: on the fp32 pipe), or its bytes from memory.

Not modelled: latency and what hides it, barriers, bank conflicts, tensor memory, what tensor cores fetch from shared
memory by themselves, hits in L2, and the start and end of a kernel. So the model says what can't be faster, not how
fast it is; but not where integers are the busiest pipe, since some of them have pipes of their own.
"""

from dataclasses import dataclass

from benchmarks.compiled.counts import Counts
from benchmarks.compiled.hardware import HARDWARE, Hardware
from benchmarks.compiled.work import Work

# a warp's registers are given out in these units, and the hardware keeps some shared memory of each block for itself.
REGISTER_UNIT, RESERVED_SHARED = 256, 1024


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that a multiprocessor holds at once, and what allows no more."""

    blocks: int
    warps: int
    most_warps: int
    limit: str

    @property
    def share(self) -> float:
        return self.warps / self.most_warps


@dataclass(frozen=True)
class Model:
    """Clocks of a multiprocessor that one trip of one block keeps each pipe busy, and those of the floor."""

    clocks: dict[str, float]
    floor_clocks: float
    floor: str
    occupancy: Occupancy

    @property
    def bound(self) -> str:
        """The busiest pipe."""
        return max(self.clocks, key=self.clocks.__getitem__)

    @property
    def trip_clocks(self) -> float:
        return self.clocks[self.bound]

    @property
    def over_floor(self) -> float:
        return self.trip_clocks / self.floor_clocks


def occupancy(counts: Counts, gpu: Hardware) -> Occupancy:
    """What fits by the limits of warps, blocks, registers, shared memory and tensor memory."""
    registers_of_warp = -(-counts.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    # the register file is in four parts.
    warps_by_registers = gpu.registers // registers_of_warp // 4 * 4
    limits = {
        "warps": gpu.max_warps // counts.warps,
        "blocks": gpu.max_blocks,
        "registers": warps_by_registers // counts.warps,
        "shared memory": gpu.shared_bytes // (counts.shared_bytes + RESERVED_SHARED),
    }
    if counts.tensor_columns:
        limits["tensor memory"] = gpu.tensor_columns // counts.tensor_columns
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * counts.warps, gpu.max_warps, limit)


def model(counts: Counts, work: Work, itemsize: int, target: str) -> Model:
    """The model of a configuration on the target's product.

    Raises:
        ValueError: no loop was counted, as for targets without SASS.
    """
    loop, gpu = counts.main_loop, HARDWARE[target]
    if loop is None:
        raise ValueError(f"{counts.name} on {target}: expected a counted loop to model, got none")
    threads = 32 * counts.warps
    # packed arithmetic of two numbers is one instruction and two results.
    results = {name: n * threads for name, n in loop.classes.items()}
    clocks = {
        "issue": loop.instructions * counts.warps / gpu.instructions,
        "tensor": work.padded_macs / gpu.tensor_macs if loop.products else 0.0,
        "mufu": results.get("mufu", 0) / gpu.mufu,
        "fp32": (results.get("fp32", 0) + loop.packed * threads) / gpu.fp32,
        "fp64": results.get("fp64", 0) / gpu.fp64,
        "conversion": results.get("conversion", 0) / gpu.conversion,
        "integer": results.get("integer", 0) / gpu.integer,
        "shared": loop.shared_bytes * counts.warps / gpu.shared_bytes_per_clock,
        "L2": (loop.bytes_issued) / gpu.l2_bytes_per_clock,
        "memory": work.memory_bytes / gpu.memory_bytes_per_clock,
    }
    rate = gpu.tensor_macs if itemsize == 2 else gpu.fp32
    floors = {"tensor" if itemsize == 2 else "fp32": work.macs / rate, "memory": clocks["memory"]}
    floor = max(floors, key=floors.__getitem__)
    return Model(clocks, floors[floor], floor, occupancy(counts, gpu))
