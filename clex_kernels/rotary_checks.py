"""Checks of what apply_rotary is given: wrong arguments raise, naming what was expected and what came.

Values are looked at where that costs no synchronisation, that is on the host, or everywhere under `debug`.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clex_kernels.config import check_flag
from clex_kernels.tables import RotaryTable, RotaryTableStack, check_index, check_log_scale, on_host

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_operand(name: str, x: Tensor, q: Tensor) -> None:
    """q or k itself: type, dtype, device, shape and strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x is not q and (x.dtype != q.dtype or x.device != q.device):
        error = TypeError if x.dtype != q.dtype else ValueError
        raise error(f"{name}: expected q's {q.dtype} on {q.device}, got {x.dtype} on {x.device}")
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and x.device.type == "cuda"):
        raise TypeError(f"{name}: expected float32, float16, bfloat16, or float64 on the CPU, got {x.dtype}")
    check_strided(name, x)
    heads = "H" if name == "q" else "G"
    if x.dim() != 4:
        raise ValueError(f"{name}: expected shape [B, L, {heads}, D], got {list(x.shape)}")
    if x is not q and (x.shape[0], x.shape[1], x.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        b, length, _, d = q.shape
        raise ValueError(f"{name}: expected shape [B={b}, L={length}, G, D={d}] as q's, got {list(x.shape)}")
    if x.shape[3] > 1 and x.stride(3) != 1 and x.numel() > 0:
        raise ValueError(f"{name}: expected unit stride in D, got strides {list(x.stride())}")


def check_strided(name: str, x: Tensor) -> None:
    """That x is dense: neither sparse nor nested."""
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")


def check_no_tangent(function: str, *tensors: Tensor | None) -> None:
    """That no forward-mode derivative is asked for, which would come out as zero."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"{function}: has no forward-mode derivatives, got an input with a tangent (jvp)")


def check_kind(table: RotaryTable | RotaryTableStack) -> None:
    """That a table is one, also if it was put together by hand."""
    if not isinstance(table, (RotaryTable, RotaryTableStack)):
        raise TypeError(f"table: expected a RotaryTable or RotaryTableStack, got {type(table).__name__}")
    more = isinstance(table, RotaryTableStack)
    for name, dims in (("freq", 1), ("coarse", 3), ("fine", 3), ("positions", 1)):
        x = getattr(table, name)
        if x is None and name == "positions":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"table: expected a tensor {name}, got {type(x).__name__}")
        check_strided("table", x)
        if x.dim() != dims + more:
            raise ValueError(f"table: expected {name} with {dims + more} dimensions, got {list(x.shape)}")
    check_log_scale(table.log_scale, table.train_length)


def stacked(
    q: Tensor,
    dims: int,
    table: RotaryTable | RotaryTableStack,
    sequences: int,
    debug: bool,
    picks_by_length: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """freq, coarse, fine and positions with a leading T, and the index of each sequence, unless lengths pick it.

    q has the dtype and the device of what is rotated, heads of D = dims.
    """
    check_kind(table)
    check_flag("debug", debug)
    rotary_dim = 2 * table.coarse.shape[-1]
    if rotary_dim > dims:
        raise ValueError(f"table: expected a rotary dimension 2R of at most D={dims}, got {rotary_dim}")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    for x in (table.coarse, table.fine):
        if x.dtype != wanted:
            raise TypeError(f"table: expected dtype {wanted} for q of {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"table: expected it on q's device {q.device}, got {x.device}")
        if x.requires_grad:
            raise ValueError("table: expected cosines and sines without gradients, which freq carries, got some")
    tensors = table.freq, table.coarse, table.fine, table.positions
    if isinstance(table, RotaryTable):
        tensors = tuple(x if x is None else x.unsqueeze(0) for x in tensors)
    check_shapes(*tensors)
    for name, x in (("freq", table.freq), ("positions", table.positions)):
        if x is not None and (x.dtype != torch.float64 or x.device != q.device):
            error = TypeError if x.dtype != torch.float64 else ValueError
            raise error(f"table: expected {name} of torch.float64 on {q.device}, got {x.dtype} on {x.device}")
    if isinstance(table, RotaryTable):
        return *tensors, None
    if not picks_by_length:
        check_choice(table, sequences, debug)
    return *tensors, table.index


def check_shapes(freq: Tensor, coarse: Tensor, fine: Tensor, positions: Tensor | None) -> None:
    """That a table put together by hand is one: kernels read rows and pairs by its shapes."""
    tables, pairs = freq.shape if freq.dim() == 2 else (-1, -1)
    rows, tile = (x.shape[1] if x.dim() == 4 else -1 for x in (coarse, fine))
    fits = coarse.shape == (tables, rows, 2, pairs) and fine.shape == (tables, tile, 2, pairs)
    if not fits or (positions is not None and positions.shape != (tables, rows * tile)):
        shapes = [None if x is None else list(x.shape) for x in (freq, coarse, fine, positions)]
        raise ValueError(
            "table: expected freq [T, R], coarse [T, C, 2, R], fine [T, F, 2, R] and positions [T, C F] or None"
            f" as from_frequencies makes them, got {', '.join(map(str, shapes))} (a single table counted as T = 1)"
        )
    for name, x in (("coarse", coarse), ("fine", fine)):
        if x.stride(3) != 1 or x.stride(2) != pairs:
            raise ValueError(f"table: expected dense rows [2, R] in {name}, got strides {list(x.stride())}")


def check_choice(table: RotaryTableStack, sequences: int, debug: bool) -> None:
    """That every sequence has one of the tables of a stack."""
    tables = table.coarse.shape[0]
    if table.index is None:
        # one that is chosen from by length must not be taken for one table per sequence where T and B happen to agree.
        if tables not in (1, sequences) or (tables > 1 and table.train_length is not None):
            raise ValueError(f"table: a stack of T={tables} needs an index [B={sequences}], call table.select(lengths)")
        return
    check_index(table.index, tables, table.device, debug)
    if len(table.index) != sequences:
        raise ValueError(f"index: expected shape [B={sequences}], got {list(table.index.shape)}")


def check_positions(q: Tensor, length: int, position_ids: Tensor | None, offset: int, debug: bool) -> None:
    """Where the tokens stand: all of them within the table."""
    batch, tokens = q.shape[:2]
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset: expected an int, got {type(offset).__name__}")
    if position_ids is None:
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        if offset + tokens > length:
            raise ValueError(
                f"offset: expected offset + L to stay within the table's {length} positions, got {offset} + {tokens}"
            )
        return
    if not isinstance(position_ids, Tensor) or position_ids.dtype != torch.int64:
        got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise TypeError(f"position_ids: expected an int64 tensor, got {got}")
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise ValueError(f"position_ids: expected shape [B={batch} or 1, L={tokens}], got {list(position_ids.shape)}")
    if position_ids.device != q.device:
        raise ValueError(f"position_ids: expected it on q's device {q.device}, got {position_ids.device}")
    # within this, no 64-bit sum with an id comes round to a row of the table.
    if not -(2**62) <= offset <= 2**62:
        raise ValueError(f"offset: expected within 2^62 of 0, got {offset}")
    if position_ids.numel() > 0 and (on_host(position_ids) or debug):
        low, high = (int(bound) + offset for bound in position_ids.aminmax())
        if low < 0 or high >= length:
            raise ValueError(f"position_ids: expected positions in [0, {length}), got {low} to {high}")


def check_writable(name: str, x: Tensor) -> None:
    """That no two elements of x share memory, and that it holds its numbers as they are."""
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name}: can't be written to, since it is a view that negates; resolve_neg() it first")
    if x.is_contiguous():
        return
    dims = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    shared, reach = any(stride == 0 for stride, _ in dims), 0
    # comparing traced strides would tie compiled code to them.
    if not torch.compiler.is_compiling():
        for stride, size in sorted(dims):
            shared |= stride <= reach
            reach += stride * (size - 1)
    if shared:
        raise ValueError(f"{name}: can't be written to, since elements share memory (strides {list(x.stride())})")


def check_distinct(names: str, first: Tensor, second: Tensor | None) -> None:
    """That two tensors to write to are not one; overlap in general is not cheap to see."""
    if second is None:
        return
    shared = first is second
    if not shared and on_host(first) and on_host(second) and first.numel() > 0 and second.numel() > 0:
        shared = first.data_ptr() == second.data_ptr()
    if shared:
        raise ValueError(f"{names}: expected tensors that share no memory")


def check_apart(name: str, source: Tensor, target: Tensor) -> None:
    """That nothing read from `source` may have been written to `target` before, as far as the host can see."""
    if not (on_host(source) and on_host(target)) or source.numel() == 0 or target.numel() == 0:
        return
    first, second = sorted((x.data_ptr(), _reach(x)) for x in (source, target))
    if first[0] + first[1] > second[0]:
        raise ValueError(f"{name}: expected memory apart from what is written to; clone() it first")


def _reach(x: Tensor) -> int:
    """Bytes from the first to past the last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def check_in_place(q: Tensor, k: Tensor | None, wants_grad: bool) -> None:
    """What rotating in place asks of q and k."""
    check_distinct("q, k", q, k)
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        check_writable(name, x)
        if not wants_grad or torch.compiler.is_compiling():
            continue
        # autograd says the same, but only after the values are gone.
        base = x if x._base is None else x._base
        if base.is_leaf and base.requires_grad:
            raise RuntimeError(f"{name}: a leaf (or a view of one) that requires grad can't be rotated in place")


def check_out(
    q: Tensor, k: Tensor | None, out: tuple[Tensor, Tensor | None], inplace: bool, wants_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The memory to write to."""
    if inplace:
        raise ValueError("out: expected None together with inplace=True")
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError("out: expected (q_out, k_out)")
    q_out, k_out = out
    if (k_out is None) != (k is None):
        raise ValueError("out: expected k_out to be None where k is, and only there")
    for name, source, target in (("out[0]", q, q_out), ("out[1]", k, k_out)):
        if source is None:
            continue
        if not isinstance(target, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(target).__name__}")
        if wants_grad or target.requires_grad:
            raise ValueError("out: not differentiable, expected tensors that need no gradient (or torch.no_grad())")
        if (target.shape, target.dtype, target.device) != (source.shape, source.dtype, source.device):
            raise ValueError(
                f"{name}: expected {list(source.shape)} {source.dtype} on {source.device}, "
                f"got {list(target.shape)} {target.dtype} on {target.device}"
            )
        if target.shape[3] > 1 and target.stride(3) != 1 and target.numel() > 0:
            raise ValueError(f"{name}: expected unit stride in D, got strides {list(target.stride())}")
        check_writable(name, target)
    check_distinct("out", q_out, k_out)
    check_distinct("q, out[1]", q, k_out)
    check_distinct("out[0], k", q_out, k)
    return q_out, k_out
