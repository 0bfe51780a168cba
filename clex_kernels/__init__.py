"""Fused rotary kernels for language models whose rotary frequencies change with length."""

from importlib.metadata import PackageNotFoundError, version

from clex_kernels.append import append_kv
from clex_kernels.attention import attention
from clex_kernels.config import ClexConfig
from clex_kernels.decode import decode_attention
from clex_kernels.frequencies import solve_frequencies
from clex_kernels.merging import merge_attention
from clex_kernels.modules import ClexAttention, ClexRotaryEmbedding
from clex_kernels.packing import pack_qkv, unpack_qkv
from clex_kernels.qkv_rotary import qkv_rotary
from clex_kernels.rotary import apply_rotary
from clex_kernels.sharding_rules import register_rules
from clex_kernels.tables import RotaryTable, RotaryTableStack
from clex_kernels.training import clip_gradients, param_groups

register_rules()

try:
    __version__ = version("clex-kernels")
except PackageNotFoundError:  # run from a source tree that was built in place but not installed
    __version__ = "0+source"

__all__ = [
    "ClexAttention",
    "ClexConfig",
    "ClexRotaryEmbedding",
    "RotaryTable",
    "RotaryTableStack",
    "append_kv",
    "apply_rotary",
    "attention",
    "clip_gradients",
    "decode_attention",
    "merge_attention",
    "pack_qkv",
    "param_groups",
    "qkv_rotary",
    "solve_frequencies",
    "unpack_qkv",
]
