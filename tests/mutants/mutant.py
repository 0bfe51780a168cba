"""One broken thing, and the test files that could notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; `tests` are files of tests/ that should notice `new` in its place.

    With an `isa` the code runs on processors that have this instruction set alone.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    isa: str | None = None


ROTARY = ("test_rotary.py",)
ROTARY_KERNEL = ("test_rotary_kernel.py",)
DECODE = ("test_decode.py",)
DECODE_KERNEL = ("test_decode_kernel.py",)
QKV = ("test_qkv_rotary_cpu.py",)
QKV_GRADIENTS = ("test_qkv_rotary.py",)
QKV_KERNEL = ("test_qkv_rotary_kernel.py",)
ATTENTION = ("test_attention_cpu.py",)
ATTENTION_KERNEL = ("test_attention_kernel.py",)
ENGINES = ("test_attention_engines.py",)
TABLES = ("test_tables.py",)
STACKS = ("test_rotary_table.py",)
CACHE = ("test_table_cache.py",)
MODULES = ("test_modules.py",)
SAMPLING = ("test_sampling.py",)
FREQUENCIES = ("test_frequencies.py",)
APPEND = ("test_append.py",)
REFERENCE = ("test_reference.py",)
