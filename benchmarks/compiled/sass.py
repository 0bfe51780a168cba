"""Reads SASS as nvdisasm prints it: innermost loops, classes of instructions, accesses to memory.

Classes are those of the pipe that an instruction keeps busy:

    tensor      products on tensor cores: HMMA, HGMMA, UTCHMMA and the like
    mufu        exponentials, logarithms, reciprocals, sines
    fp32        arithmetic, comparison and choice of floating-point numbers; packed ones count once
    fp64        the same in fp64
    conversion  between number formats
    shared      shared memory, shuffles among it, and tensor memory
    global      global memory, asynchronous copies to shared memory too
    spill       registers in local memory
    integer     integers, addresses, bits and predicates, moves, and the uniform registers' share of these
    other       branches, barriers, waits, special registers, constants
"""

import re
from collections import Counter
from collections.abc import Sequence

# the first pattern that an opcode starts with decides: some of the others only look like products or accesses.
PATTERNS = {
    "other": r"UTCATOMSWS|UTCBAR|LDGDEPBAR|LDC|LDCU|WARPGROUP",
    "tensor": r"[A-Z]*MMA\b",
    "mufu": r"MUFU",
    "conversion": r"U?(F2|I2F|I2I|FRND)",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)\b",
    "fp32": r"(F|H|FH)(ADD|MUL|FMA|SEL|SET|MNMX|CHK|SWZADD|MN)",
    "global": r"(LDG|STG|LDGSTS|LD|ST|ATOM|ATOMG|RED|UTMA\w+|UBLKCP)\b",
    "shared": r"(LDS|STS|LDSM|STSM|ATOMS|SHFL|LDTM|STTM|UTCCP)\b",
    "spill": r"(LDL|STL)\b",
    "integer": r"U?(V?I(ADD|MAD|MUL|SETP|MNMX|ABS|DP)|VIADDMNMX|P?LOP|LEA|SHF|SHL|SHR|SEL|SGXT|MOV|PRMT|FLO|POPC|BREV)"
    r"|C?REDUX|R2UR|UR2R|CS2R|P2R|R2P|UP2UR",
}
CLASSES = ("tensor", "mufu", "fp32", "fp64", "conversion", "shared", "global", "spill", "integer", "other")


def classify(instruction: str) -> str:
    """The class of an instruction, which comes without its predicate."""
    return next((name for name, pattern in PATTERNS.items() if re.match(pattern, instruction)), "other")


def count_classes(instructions: Sequence[str]) -> dict[str, int]:
    """Instructions by class, those that are there."""
    found = Counter(map(classify, instructions))
    return {name: found[name] for name in CLASSES if found[name]}


def innermost_loops(sass: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of the kernel, and those of each innermost loop."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line):
            instructions.append(found[1])
            jump = re.match(r"BRA.*\((\.L\w+)\)", found[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
    # a jump to itself pads the end of a kernel.
    loops = [(start, end) for start, end in loops if end - start > 1]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return instructions, [instructions[start:end] for start, end in inner]


def accesses(instructions: Sequence[str], opcode: str) -> Counter[str]:
    """Accesses by width in bits per thread."""
    operations = [text.split()[0] for text in instructions if re.match(rf"{opcode}\b", text)]
    widths = (re.findall(r"\.[US]?(8|16|64|128|256)\b", operation) for operation in operations)
    return Counter(width[-1] if width else "32" for width in widths)


def byte_count(widths: Counter[str], threads: int) -> int:
    return sum(int(bits) // 8 * n for bits, n in widths.items()) * threads


def shared_bytes(instructions: Sequence[str]) -> int:
    """Bytes that one warp moves to and from shared memory, if no banks collide; a shuffle moves 4 a thread.

    What tensor cores fetch from there themselves is not seen.
    """
    moved = 0
    for text in instructions:
        opcode = text.split()[0]
        if matrices := re.match(r"(?:LDSM|STSM)\.16\.MT?88(?:\.(\d))?", opcode):
            # 8 x 8 halves each.
            moved += 128 * int(matrices[1] or 1)
        elif re.match(r"(LDS|STS|SHFL|ATOMS|LDGSTS)\b", opcode):
            moved += byte_count(accesses([text], r"\w+"), 32)
    return moved
