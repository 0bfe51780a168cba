"""What the launchers of attention's forward and backward kernels have in common, on the host."""

from typing import NamedTuple

import torch
import triton

from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels.common import strides
from clex_kernels.kernels.launch_tables import Table, Tile, constants_of, find_entry


class Operand(NamedTuple):
    """A tensor [B, L, H, D] as kernels take it, with its strides over B, L and H."""

    ptr: torch.Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: torch.Tensor | None) -> "Operand | None":
        """x and its strides; None stays None."""
        return None if x is None else cls(x, strides(x, 3))


class TableOperand(NamedTuple):
    """Factored tables as kernels take them: strides over T and C or F, over T and rows, over B."""

    coarse: torch.Tensor
    fine: torch.Tensor
    positions: torch.Tensor | None
    index: torch.Tensor | None
    strides: tuple[int, ...]
    positions_strides: tuple[int, ...]
    index_strides: tuple[int, ...]

    @classmethod
    def of(cls, tables: Tables) -> "TableOperand":
        """The tables and their strides."""
        coarse, fine, positions, index = tables
        rows = strides(coarse, 2) + strides(fine, 2)
        return cls(*tables, rows, strides(positions, 2), strides(index, 1))


def head_constants(dims: int, pairs: int) -> dict[str, int]:
    """Sizes of a head of D = dims with `pairs` rotated pairs and of the tiles that hold it, 16 at least for tl.dot."""
    tail = dims - 2 * pairs
    block_r, block_t, block_d = (max(16, triton.next_power_of_2(size)) for size in (pairs, tail, dims))
    return {"D": dims, "R": pairs, "TAIL": tail, "BLOCK_D": block_d, "BLOCK_R": block_r, "BLOCK_T": block_t}


def launch_config(table: Table[Tile], q: torch.Tensor, pairs: int) -> dict[str, int]:
    """Constexprs, warps and stages for q [B, L, H, D] of which `pairs` are rotated, from the table."""
    head = head_constants(q.shape[3], pairs)
    # parts are padded one by one: NeoX-20B's D = 96 with 12 pairs is 16 + 16 + 128 columns.
    in_parts = head["BLOCK_T"] * (head["TAIL"] > 0) + 2 * head["BLOCK_R"] * (pairs > 0)
    columns = max(head["BLOCK_D"], in_parts)
    return {**head, **constants_of(find_entry(table, q, columns))}


def rule_constants(rule: Rule) -> dict[str, float | bool | None]:
    """The rule but for its window: settings of a model, so that they may choose among compiled kernels."""
    return {
        "IS_CAUSAL": rule.is_causal or rule.window is not None,
        "SCALE": float(rule.scale),
        "SOFTCAP": rule.softcap,
        "LOG_BASE": rule.log_base,
        "LOG_CLAMPED": rule.log_clamped,
    }


def precision(x: torch.Tensor) -> str:
    """How tl.dot multiplies fp32: as exactly as torch's own products do at this moment."""
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# values that change from call to call must not choose among compiled kernels.
NOT_SPECIALIZED = ["q_offset", "k_offset", "L", "S", "batch", "window", "T", "num_rows"]


def token_arguments(tokens: Tokens) -> tuple[Tokens, int | None, int]:
    """The tensors of tokens, and its numbers by themselves, since Triton specializes what stands in a tuple."""
    return tokens._replace(q_offset=None, k_offset=None), tokens.q_offset, tokens.k_offset


def sequence_count(batch: int, tokens: Tokens) -> int:
    """B."""
    return batch if tokens.cu_seqlens_q is None else tokens.cu_seqlens_q.shape[0] - 1


def tile_count(cu_seqlens: torch.Tensor | None, batch: int, length: int, block: int) -> int:
    """Tiles of all sequences as sequences.find_tile counts them; never more than are needed by one a sequence."""
    if cu_seqlens is None:
        return batch * triton.cdiv(length, block)
    return length // block + cu_seqlens.shape[0] - 1
