"""Fused rotary kernels for language models whose rotary frequencies change with length."""

from importlib.metadata import PackageNotFoundError, version

from clex_kernels.config import ClexConfig
from clex_kernels.frequencies import solve_frequencies
from clex_kernels.modules import ClexRotaryEmbedding
from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable, RotaryTableStack

try:
    __version__ = version("clex-kernels")
except PackageNotFoundError:  # run from a source tree that was built in place but not installed
    __version__ = "0+source"

__all__ = [
    "ClexConfig",
    "ClexRotaryEmbedding",
    "RotaryTable",
    "RotaryTableStack",
    "apply_rotary",
    "solve_frequencies",
]
