"""What rotary adds to a kernel: its main loop, its whole call and its modelled time, over the same without rotary."""

from dataclasses import dataclass

from benchmarks.compiled.cases import CASES
from benchmarks.compiled.counts import Counts
from benchmarks.compiled.document import Static
from benchmarks.compiled.hardware import HARDWARE
from benchmarks.compiled.model import model
from benchmarks.compiled.peers import PEERS
from benchmarks.compiled.work import COLUMNS, GROUP, LENGTH
from benchmarks.measure import Goal

KEY_HEADS = 8
PREFILL, WHOLE, PROJECTION = (
    "attention_fwd-bfloat16-D128-R64",
    "attention_fwd-bfloat16-D128-R64-full",
    "qkv_rotary-bfloat16-D128-R64-rows8192",
)
CALL_GOAL = 1.03


@dataclass(frozen=True)
class Overhead:
    """A kernel with rotary and without it on one target: instructions of a trip, and modelled clocks of one."""

    name: str
    target: str
    instructions: tuple[int, int]
    clocks: tuple[float, float]
    bound: str

    @property
    def extra(self) -> int:
        return self.instructions[0] - self.instructions[1]

    @property
    def work(self) -> float:
        return self.instructions[0] / self.instructions[1]

    @property
    def time(self) -> float:
        return self.clocks[0] / self.clocks[1]


def overhead_of(static: Static, target: str, name: str) -> Overhead | None:
    """Of a configuration or peer that has a case without rotary beside it."""
    case = PEERS[name].case if name in PEERS else CASES[name]
    if case.plain is None:
        return None
    fused, without = static.of(target, name), static.of(target, case.plain)
    models = [model(counts, case.work(counts.constants), case.itemsize, target) for counts in (fused, without)]
    loops = fused.main_loop.instructions, without.main_loop.instructions
    return Overhead(name, target, loops, (models[0].trip_clocks, models[1].trip_clocks), models[0].bound)


def overheads(static: Static, names: list[str]) -> list[Overhead]:
    """Of those of the names that have one, on every target with SASS."""
    found = (overhead_of(static, target, name) for name in names for target in HARDWARE)
    return [overhead for overhead in found if overhead]


def pass_instructions(keys: Counts, length: int) -> float:
    """Instructions of the warps that rotate all key heads of `length` slots."""
    trips = -(-KEY_HEADS // keys.constants["BLOCK_H"])
    each = keys.instructions + (trips - 1) * keys.main_loop.instructions
    return each * keys.warps * length / keys.constants["BLOCK_L"]


def attention_instructions(counts: Counts, length: int) -> int:
    """Instructions of the warps of one head, without causality: all that stands outside the loops once a block."""
    rows, columns = counts.constants["BLOCK_L"], counts.constants["BLOCK_S"]
    outside, loop = counts.outside_instructions, counts.main_loop.instructions
    return -(-length // rows) * (outside + length // columns * loop) * counts.warps


def prefill_call(static: Static, target: str, length: int = LENGTH) -> float:
    """Instructions of attention over all keys, with the pass over k, over those without rotary."""
    fused, plain = static.of(target, WHOLE), static.of(target, CASES[WHOLE].plain)
    heads = GROUP * KEY_HEADS
    with_rotary, without = (heads * attention_instructions(counts, length) for counts in (fused, plain))
    return (with_rotary + pass_instructions(static.of(target, "attention_fwd_keys"), length)) / without


def projection_call(static: Static, target: str) -> float:
    """Instructions of a block's loop over C and its epilogue, over those without rotary."""
    fused, plain = static.of(target, PROJECTION), static.of(target, CASES[PROJECTION].plain)
    return projection_instructions(fused) / projection_instructions(plain)


def projection_instructions(counts: Counts) -> int:
    return counts.outside_instructions + COLUMNS // counts.constants["BLOCK_C"] * counts.main_loop.instructions


def loop_goals(static: Static) -> list[Goal]:
    """Instructions that rotary adds to the loops of attention's forward pass and of the projections."""
    names = [name for name in CASES if name.startswith(("attention_fwd-", "qkv_rotary-"))]
    found = [
        Goal(f"{o.name} on {o.target}: instructions added to the loop", o.extra, "at most", 0, "", "counted")
        for o in overheads(static, names)
    ]
    for target in HARDWARE:
        what = f"attention over {LENGTH} keys with the pass over k on {target}: instructions over those without rotary"
        found.append(Goal(what, prefill_call(static, target), "at most", CALL_GOAL, label="counted"))
    return found
