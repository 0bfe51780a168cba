"""CLEX over more than one device, on torch.distributed."""

from clex_kernels.distributed.context import ring_attention, zigzag_positions, zigzag_shard, zigzag_unshard
from clex_kernels.distributed.data import StepGenerator, shard_rotary
from clex_kernels.distributed.split_decode import split_append_kv, split_decode_attention
from clex_kernels.distributed.tensor import (
    ClexParallel,
    ParallelAttention,
    name_projections,
    parallelize_attention,
    sum_gradients,
)
from clex_kernels.sharding import replicate_table

__all__ = [
    "ClexParallel",
    "ParallelAttention",
    "StepGenerator",
    "name_projections",
    "parallelize_attention",
    "replicate_table",
    "ring_attention",
    "shard_rotary",
    "split_append_kv",
    "split_decode_attention",
    "sum_gradients",
    "zigzag_positions",
    "zigzag_shard",
    "zigzag_unshard",
]
