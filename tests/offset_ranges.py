"""Ranges of the integers in a Triton kernel's IR, to find offsets that 32 bits may not hold.

`address_problems` reads TTIR, in which all functions are inlined, and walks it once with an interval for every integer:
constants, tl.arange, sizes and program ids come with bounds, a loop's variable has those of its range, what a loop
carries is widened to its whole type unless it settles, and a loaded number may be anything. An operation in 32 bits
whose exact result may lie outside marks its result, and everything computed from it; an address with a marked offset
is a problem, and so is any operation that this reader does not know.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

NAME = r"%[\w$.-]+(?:#\d+)?"
# rounds after which what a loop carries counts as unsettled.
ROUNDS = 5


class Range(NamedTuple):
    """Integers low .. high of so many bits; `marks` are the operations before that may have overflowed."""

    low: int
    high: int
    bits: int
    marks: frozenset[str] = frozenset()

    def hull(self, other: "Range") -> "Range":
        return Range(min(self.low, other.low), max(self.high, other.high), self.bits, self.marks | other.marks)

    def settles_in(self, other: "Range") -> bool:
        return other.low <= self.low and self.high <= other.high and self.marks <= other.marks


def anything(bits: int, marks: frozenset[str] = frozenset()) -> Range:
    return Range(0, 1, bits, marks) if bits == 1 else Range(-(1 << bits - 1), (1 << bits - 1) - 1, bits, marks)


@dataclass
class Operation:
    """One line of IR, with its regions; `text` is all of it but the results."""

    results: list[str]
    name: str
    text: str
    regions: list[list["Operation"]] = field(default_factory=list)

    @property
    def operands(self) -> list[str]:
        return re.findall(NAME, self.text)


def stem_of(name: str) -> str:
    """The name in the kernel's source that a value has; empty where it has none."""
    return re.sub(r"_\d+$", "", name[1:].partition("#")[0]).lstrip("0123456789")


def strip_locations(line: str) -> str:
    return re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()


def parse_line(line: str) -> Operation:
    results, _, text = line.partition(" = ") if re.match(rf"{NAME}(:\d+)?(, {NAME})* = ", line) else ("", "", line)
    names = []
    for name, count in re.findall(r"(%[\w$.-]+)(?::(\d+))?", results):
        names += [f"{name}#{i}" for i in range(int(count))] if count else [name]
    return Operation(names, re.match(r'"?([\w.^]+)', text)[1], text)


def parse(ttir: str) -> tuple[Operation, list[Operation]]:
    """The function's head and body."""
    lines = (strip_locations(line) for line in ttir.splitlines())
    lines = iter([line for line in lines if line and not line.startswith(("#", "module", "//", "{-#"))])
    head = next(lines)
    assert head.startswith("tt.func")
    body, stack = [], []
    block = body
    for line in lines:
        if line.startswith("}"):
            if not stack:
                break
            operation, block = stack.pop()
            if line.endswith("{"):
                operation.regions.append([])
                stack.append((operation, block))
                block = operation.regions[-1]
            continue
        operation = parse_line(line)
        block.append(operation)
        if line.endswith("{"):
            operation.regions.append([])
            stack.append((operation, block))
            block = operation.regions[-1]
    return Operation([], "tt.func", head), body


def bits_of(kind: str) -> int | None:
    """Bits of an integer type or of a tensor's integer elements; None for anything else."""
    found = re.fullmatch(r"(?:tensor<(?:\d+x)*)?i(\d+)>?", kind.strip())
    return int(found[1]) if found else None


def result_bits(operation: Operation) -> int | None:
    """Of the first result: the last type named, which follows `->` or `to` where they differ."""
    kind = re.split(r"\s(?:->|to)\s", operation.text)[-1] if re.search(r"\s(->|to)\s", operation.text) else None
    return bits_of((kind or operation.text.rpartition(" : ")[2]).strip())


def divide(x: int, y: int) -> int:
    """Towards zero, as the hardware does."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def corners(apply: Callable[[int, int], int]) -> Callable[[Range, Range], tuple[int, int]]:
    def at_corners(x: Range, y: Range) -> tuple[int, int]:
        values = [apply(a, b) for a in (x.low, x.high) for b in (y.low, y.high)]
        return min(values), max(values)

    return at_corners


def quotient(x: Range, y: Range) -> tuple[int, int]:
    # a divisor is a count: from 1 on where it is not known to be more.
    return corners(divide)(x, y._replace(low=max(y.low, 1), high=max(y.high, 1)))


def remainder(x: Range, y: Range) -> tuple[int, int]:
    most = max(abs(y.low), abs(y.high), 1) - 1
    return max(x.low, -most) if x.low < 0 else 0, min(x.high, most) if x.high >= 0 else 0


ARITHMETIC: dict[str, Callable[[Range, Range], tuple[int, int]]] = {
    "arith.addi": lambda x, y: (x.low + y.low, x.high + y.high),
    "arith.subi": lambda x, y: (x.low - y.high, x.high - y.low),
    "arith.muli": corners(lambda a, b: a * b),
    "arith.divsi": quotient,
    "arith.remsi": remainder,
    "arith.minsi": lambda x, y: (min(x.low, y.low), min(x.high, y.high)),
    "arith.maxsi": lambda x, y: (max(x.low, y.low), max(x.high, y.high)),
}
# these keep their operand's numbers.
SHAPES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.unsplat"}
SHAPES |= {"arith.extsi", "arith.trunci", "arith.index_cast"}
# numbers that are not followed: any that the type holds, with their operands' marks.
MIXED = {"arith.divui", "arith.remui", "arith.extui", "arith.andi", "arith.ori", "arith.xori", "arith.fptosi"}
# these compute no part of an address but by what they load or compare.
OPAQUE = {"tt.load", "tt.store", "tt.dot", "tt.reduce", "tt.join", "tt.split", "tt.return", "tt.fp_to_fp"}
OPAQUE |= {
    "arith.cmpi",
    "arith.cmpf",
    "arith.sitofp",
    "arith.uitofp",
    "scf.yield",
    "scf.condition",
    "^bb0",
    "ub.poison",
}


class Reader:
    """Walks a function's body; `sizes` bound its arguments by name, `grid` the program ids by axis."""

    def __init__(self, head: Operation, sizes: dict[str, int], grid: dict[str, int], known: dict[str, tuple[int, int]]):
        self.grid, self.known, self.used = grid, known, set[str]()
        self.problems: dict[str, None] = {}
        self.ranges: dict[str, Range] = {}
        for name, kind in re.findall(rf"({NAME}): (i\d+)", head.text):
            # everything else is a stride: any number that a tensor may have.
            most = sizes.get(stem_of(name), (1 << int(kind[1:]) - 1) - 1)
            self.ranges[name] = Range(0, most, int(kind[1:]))

    def of(self, name: str, bits: int) -> Range:
        return self.ranges.get(name) or anything(bits)

    def fit(self, operation: Operation, low: int, high: int, bits: int, marks: frozenset[str]) -> Range:
        whole = anything(bits)
        if bits == 32 and (low < whole.low or high > whole.high):
            stem = stem_of(operation.results[0])
            if stem in self.known:
                self.used.add(stem)
                return Range(*self.known[stem], bits, marks)
            if not marks:
                return whole._replace(marks=frozenset([f"{operation.results[0]} = {operation.text}"]))
        return Range(max(low, whole.low), min(high, whole.high), bits, marks)

    def walk(self, block: list[Operation]) -> None:
        for operation in block:
            self.visit(operation)

    def visit(self, operation: Operation) -> None:
        name, bits = operation.name, result_bits(operation)
        if operation.regions:
            return self.visit_regions(operation)
        if name == "tt.addptr":
            return self.check(operation)
        if name in OPAQUE or (name.startswith(("math.", "arith.")) and bits is None) or not operation.results:
            if name.startswith("tt.atomic"):
                self.problems[f"atomic: {operation.text}"] = None
            return None
        if bits is None and name not in SHAPES | {"arith.select"}:
            self.problems[f"unknown: {operation.text}"] = None
            return None
        if bits is not None:
            self.ranges[operation.results[0]] = self.evaluate(operation, bits)
        return None

    def evaluate(self, operation: Operation, bits: int) -> Range:
        name, text = operation.name, operation.text
        if name == "arith.constant":
            value = re.search(r"(?:dense<)?(-?\d+|true|false)>? :", text)[1]
            number = {"true": 1, "false": 0}.get(value)
            return Range(*[int(value) if number is None else number] * 2, bits)
        if name == "tt.make_range":
            end, start = (int(re.search(rf"{key} = (\d+)", text)[1]) for key in ("end", "start"))
            return Range(start, end - 1, bits)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            most = self.grid[re.search(r"\b([xyz])\b", text)[1]]
            return Range(0, most - 1, bits) if name == "tt.get_program_id" else Range(1, most, bits)
        operands = [self.of(operand, bits) for operand in operation.operands]
        if name in MIXED:
            return anything(bits, frozenset().union(*(x.marks for x in operands)))
        if name in SHAPES:
            (x,) = operands
            return self.fit(operation, x.low, x.high, bits, x.marks)
        if name == "arith.select":
            _, x, y = operands
            return x.hull(y)
        if name in ARITHMETIC:
            x, y = operands
            return self.fit(operation, *ARITHMETIC[name](x, y), bits, x.marks | y.marks)
        self.problems[f"unknown: {text}"] = None
        return anything(bits)

    def check(self, operation: Operation) -> None:
        _, offset = operation.operands
        for mark in sorted(self.of(offset, 32).marks):
            self.problems[f"{mark}  ->  {operation.text}"] = None

    def visit_regions(self, operation: Operation) -> None:
        text = operation.text
        if operation.name == "tt.reduce":
            # no address is made in one.
            return
        if operation.name == "scf.if":
            for region in operation.regions:
                self.walk(region)
            branches = [[self.ranges.get(name) for name in region[-1].operands] for region in operation.regions]
            for result, *values in zip(operation.results, *branches, strict=False):
                if values[0] is not None:
                    self.ranges[result] = values[0].hull(values[-1])
            return
        if operation.name not in ("scf.for", "scf.while"):
            self.problems[f"unknown: {text}"] = None
            return
        is_for = operation.name == "scf.for"
        carried = re.findall(rf"({NAME}) = ({NAME})", text.partition("iter_args")[2] if is_for else text)
        if is_for:
            variable, first, last = re.match(rf"scf\.for ({NAME}) = ({NAME}) to ({NAME})", text).groups()
            low, high = self.of(first, 32), self.of(last, 32)
            self.ranges[variable] = Range(low.low, max(low.low, high.high - 1), low.bits, low.marks | high.marks)
        kept = {name: self.ranges[start] for name, start in carried if start in self.ranges}
        for left in reversed(range(ROUNDS)):
            self.ranges.update(kept)
            final = self.walk_loop(operation)
            step = {name: self.ranges[new] for (name, _), new in zip(carried, final, strict=True) if name in kept}
            if all(after.settles_in(kept[name]) for name, after in step.items()):
                break
            kept = {name: kept[name].hull(after) for name, after in step.items()}
            if left == 2:
                # a search between two bounds stays between them.
                kept = {name: reduce(Range.hull, kept.values()) for name in kept}
            if left == 1:
                kept = {name: anything(wide.bits, wide.marks) for name, wide in kept.items()}
        for result, (name, _) in zip(operation.results, carried, strict=True):
            if name in kept:
                self.ranges[result] = kept[name]

    def walk_loop(self, loop: Operation) -> list[str]:
        """One trip; the names of what it yields."""
        if loop.name == "scf.while":
            before, after = loop.regions
            self.walk(before)
            passed = before[-1].operands[1:]
            for name, value in zip(after[0].operands, passed, strict=True):
                if value in self.ranges:
                    self.ranges[name] = self.ranges[value]
        self.walk(loop.regions[-1])
        last = loop.regions[-1][-1]
        return last.operands if last.name == "scf.yield" else []


def address_problems(
    ttir: str, sizes: dict[str, int], grid: dict[str, int], known: dict[str, tuple[int, int]]
) -> tuple[list[str], set[str]]:
    """Addresses whose offset may not fit, atomic operations, and lines that this reader does not know.

    `sizes` are the most that arguments can be, by name; `grid` the most programs by axis; `known` stand in for results
    that would seem to overflow, by the name of the value in the kernel's source. Also returns which of them did.
    """
    head, body = parse(ttir)
    reader = Reader(head, sizes, grid, known)
    reader.walk(body)
    return list(reader.problems), reader.used
