"""Reads SASS as nvdisasm prints it: innermost loops, and accesses to global memory."""

import re
from collections import Counter


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


def accesses(instructions: list[str], opcode: str) -> Counter[str]:
    """Accesses to global memory by width in bits."""
    operations = [text.split()[0] for text in instructions if re.match(rf"{opcode}\b", text)]
    widths = (re.findall(r"\.[US]?(8|16|64|128|256)\b", operation) for operation in operations)
    return Counter(width[-1] if width else "32" for width in widths)


def byte_count(widths: Counter[str], threads: int) -> int:
    return sum(int(bits) // 8 * n for bits, n in widths.items()) * threads
