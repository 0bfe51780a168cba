"""Factored tables of rotary cosines and sines.

Position p = F c + j needs cos and sin of p * freq, one complex product of a coarse and a fine row:

    coarse[c] = amplitude * (cos, sin)(F c freq)     [C, 2, R]
    fine[j]   = (cos, sin)(j freq)                   [F, 2, R],  F = 64

Both are computed in fp64 from fp64 frequencies (csrc/tables.h has the arithmetic) and then rounded to `dtype`. Sampled
or fractional positions are the case F = 1: one coarse row per position and fine = (1, 0). Rows are planar: R cosines,
then R sines.
"""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Literal
from warnings import warn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clex_kernels.config import one_of
from clex_kernels.extension import has_cuda, library
from clex_kernels.table_cache import CacheStats, TableCache, weights_fingerprint
from clex_kernels.weights import check_dense, on_host

__all__ = ["TILE", "CacheStats", "RotaryTable", "RotaryTableStack", "TableCache", "on_host", "weights_fingerprint"]

TILE = 64

# where fp64 ends to tell positions apart.
MAX_LENGTH = 2**53

library.define(
    "tables(Tensor freq, SymInt length, Tensor? positions, float amplitude, ScalarType dtype)"
    " -> (Tensor coarse, Tensor fine)"
)


def _empty_tables(
    freq: Tensor, length: int, positions: Tensor | None, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    factors, pairs = freq.shape
    rows, tile = ((length + TILE - 1) // TILE, TILE) if positions is None else (positions.shape[1], 1)
    coarse = freq.new_empty((factors, rows, 2, pairs), dtype=dtype)
    fine = freq.new_empty((factors, tile, 2, pairs), dtype=dtype)
    return coarse, fine


torch.library.register_fake("clex::tables", _empty_tables, lib=library)


def _tables_torch(
    freq: Tensor, length: int, positions: Tensor | None, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The op in plain torch, for devices without the C++ one. Rounds angles to fp64: 2e-7 off at 2^31 rad."""
    if positions is None:
        coarse_rows = torch.arange((length + TILE - 1) // TILE, dtype=freq.dtype, device=freq.device)[None] * TILE
        fine_rows = torch.arange(TILE, dtype=freq.dtype, device=freq.device)[None]
    else:
        coarse_rows, fine_rows = positions, freq.new_zeros((1, 1))

    def rows(at: Tensor, size: float) -> Tensor:
        angle = at[..., None] * freq[:, None]
        return (size * torch.stack((angle.cos(), angle.sin()), dim=-2)).to(dtype)

    return rows(coarse_rows, amplitude), rows(fine_rows, 1.0)


def _tables_cuda(
    freq: Tensor, length: int, positions: Tensor | None, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not has_cuda():
        return _tables_torch(freq, length, positions, amplitude, dtype)
    coarse, fine = _empty_tables(freq, length, positions, amplitude, dtype)
    positions = None if positions is None else positions.contiguous()
    with torch.cuda.device(freq.device):
        stream = torch.cuda.current_stream(freq.device).cuda_stream
        torch.ops.clex_cuda.tables(freq.contiguous(), positions, amplitude, coarse, fine, stream)
    return coarse, fine


library.impl("tables", _tables_cuda, "CUDA")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _check_freq(freq: Tensor, shape: str) -> None:
    if not isinstance(freq, Tensor):
        raise TypeError(f"freq: expected a tensor, got {type(freq).__name__}")
    check_dense("freq", freq)
    if freq.dtype != torch.float64:
        raise TypeError(
            f"freq: expected torch.float64, got {freq.dtype}; rounding frequencies to float32 alone moves an angle by"
            " up to 0.2 rad at position 1M, so compute them in float64"
        )
    if freq.dim() != shape.count(",") + 1 or 0 in freq.shape:
        raise ValueError(f"freq: expected shape {shape}, none of them 0, got {list(freq.shape)}")
    # the sum is cheaper, but may be infinite by itself.
    if on_host(freq) and not math.isfinite(freq.detach().sum()) and not freq.isfinite().all():
        raise ValueError("freq: expected finite numbers, got NaN or infinity")


def _check_positions(positions: Tensor, freq: Tensor, shape: str, rows: tuple[int, ...]) -> Tensor:
    """Positions as fp64, with their leading sizes among `rows`."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}")
    if positions.dtype not in (torch.float64, torch.int64, torch.int32):
        raise TypeError(f"positions: expected torch.float64, torch.int64 or torch.int32, got {positions.dtype}")
    check_dense("positions", positions)
    if positions.dim() != freq.dim() or (positions.dim() == 2 and positions.shape[0] not in rows):
        raise ValueError(f"positions: expected shape {shape}, got {list(positions.shape)}")
    if positions.device != freq.device:
        raise ValueError(f"positions: expected on {freq.device}, where freq is, got {positions.device}")
    if on_host(positions) and not positions.isfinite().all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return positions.double()


def _normal_mode() -> AbstractContextManager[object]:
    """Tensors made here may be saved by autograd later, also where the caller is in inference mode."""
    return nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def _savable(tensor: Tensor) -> Tensor:
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


def _check_amplitude(amplitude: float | Tensor, freq: Tensor, dtype: torch.dtype) -> None:
    """One for all tables, or one for each of them."""
    if isinstance(amplitude, Tensor):
        if amplitude.dtype != torch.float64:
            raise TypeError(f"amplitude: expected a number or a torch.float64 tensor, got {amplitude.dtype}")
        check_dense("amplitude", amplitude)
        if amplitude.shape != freq.shape[:1] or amplitude.device != freq.device:
            expected = f"shape [T] = [{freq.shape[0]}] on {freq.device}"
            raise ValueError(f"amplitude: expected {expected}, got {list(amplitude.shape)} on {amplitude.device}")
        values = amplitude.tolist() if on_host(amplitude) else []
    else:
        _check_number("amplitude", amplitude)
        values = [amplitude]
    for value in values:
        # below the smallest normal number rounding would leave little of it, or nothing.
        if not torch.finfo(dtype).tiny <= value <= torch.finfo(dtype).max:
            raise ValueError(f"amplitude: expected a finite number > 0 of {dtype}, got {value}")


def _build(
    freq: Tensor, length: int | None, positions: Tensor | None, amplitude: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """coarse and fine of freq [T, R], once the rest of the arguments is found valid."""
    if (length is None) == (positions is None):
        raise ValueError(
            "length, positions: expected exactly one of them, got " + ("both" if positions is not None else "none")
        )
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype!r}")
    _check_amplitude(amplitude, freq, dtype)
    if length is None:
        length = 0
    elif isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise TypeError(f"length: expected an int, got {type(length).__name__}")
    elif not 0 <= length <= MAX_LENGTH:
        raise ValueError(f"length: expected 0 to {MAX_LENGTH}, got {length}")
    elif isinstance(length, int) and 2 * freq.numel() * length // TILE * dtype.itemsize >= 2**47:
        raise ValueError(f"length: expected tables that a process can address, got {length} for {list(freq.shape)}")
    if isinstance(amplitude, Tensor):
        coarse, fine = torch.ops.clex.tables(freq.detach(), length, positions, 1.0, dtype)
        return (amplitude[:, None, None, None] * coarse).to(dtype), fine
    return torch.ops.clex.tables(freq.detach(), length, positions, float(amplitude), dtype)


class _Factored:
    """What one table and a stack of tables have in common."""

    coarse: Tensor
    fine: Tensor

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated, 2R."""
        return 2 * self.coarse.shape[-1]

    @property
    def tile(self) -> int:
        """F: 64, or 1 for a table of sampled positions."""
        return self.fine.shape[-3]

    @property
    def length(self) -> int:
        """How many positions (or rows of sampled positions) the table holds, C F."""
        return self.coarse.shape[-3] * self.fine.shape[-3]

    @property
    def device(self) -> torch.device:
        """Where the table lives."""
        return self.coarse.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the cosines and sines."""
        return self.coarse.dtype


@dataclass(frozen=True, eq=False)
class RotaryTable(_Factored):
    """Cosines and sines of one set of frequencies. A pytree; build it with `from_frequencies`.

    freq [R] fp64, rad/token, may carry a gradient; t, the length factor it belongs to; positions [L] fp64 tokens, or
    None for 0, 1, 2, ...; coarse [C, 2, R] and fine [F, 2, R] as in the module docstring; amplitude, already in coarse;
    train_length, tokens per unit of t; log_scale: attention multiplies logits by ln(length) / ln(train_length), which
    "clamped" keeps at 1 or above.
    """

    freq: Tensor
    t: float
    positions: Tensor | None
    coarse: Tensor
    fine: Tensor
    amplitude: float = 1.0
    train_length: int | None = None
    log_scale: bool | Literal["clamped"] = False

    @classmethod
    def from_frequencies(
        cls,
        freq: Tensor,
        length: int | None = None,
        positions: Tensor | None = None,
        amplitude: float = 1.0,
        dtype: torch.dtype = torch.float32,
        t: float = 1.0,
        train_length: int | None = None,
        log_scale: bool | Literal["clamped"] = False,
    ) -> "RotaryTable":
        """A table of `freq` [R] fp64 for positions 0 .. length - 1 or for `positions` [L].

        `amplitude` multiplies cosines and sines (the attention factor of YaRN and LongRoPE). Raises TypeError for a
        wrong dtype (freq must be fp64) and ValueError for wrong shapes, devices and values.
        """
        _check_freq(freq, "[R]")
        _check_number("t", t)
        if not 1.0 <= t <= sys.float_info.max:
            raise ValueError(f"t: expected a finite number >= 1, got {t}")
        check_log_scale(log_scale, train_length)
        with _normal_mode():
            freq = _savable(freq)
            if positions is not None:
                positions = _savable(_check_positions(positions, freq, "[L]", ()))
            rows = None if positions is None else positions[None]
            _check_number("amplitude", amplitude)
            coarse, fine = _build(freq[None], length, rows, amplitude, dtype)
            return cls(freq, float(t), positions, coarse[0], fine[0], float(amplitude), train_length, log_scale)


@dataclass(frozen=True, eq=False)
class RotaryTableStack(_Factored):
    """T tables, one of which serves each sequence of a batch. A pytree; build it with `from_frequencies`.

    freq [T, R] fp64, t [T] fp64, positions [T, L] fp64 or None, coarse [T, C, 2, R], fine [T, F, 2, R]; amplitude one
    for all or [T] fp64; the rest as in RotaryTable. Sequence b uses table index[b] (int64 [B]); without an index table
    b, or the only one; but a stack with a train_length and no index is chosen from by length, by `select` or by
    attention.
    """

    freq: Tensor
    t: Tensor
    positions: Tensor | None
    coarse: Tensor
    fine: Tensor
    amplitude: float | Tensor = 1.0
    index: Tensor | None = None
    train_length: int | None = None
    log_scale: bool | Literal["clamped"] = False

    @classmethod
    def from_frequencies(
        cls,
        freq: Tensor,
        t: Tensor,
        length: int | None = None,
        positions: Tensor | None = None,
        amplitude: float | Tensor = 1.0,
        index: Tensor | None = None,
        train_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        log_scale: bool | Literal["clamped"] = False,
    ) -> "RotaryTableStack":
        """Tables of `freq` [T, R] fp64 for positions 0 .. length - 1 or for `positions` [T, L] (or [1, L], shared).

        Raises TypeError and ValueError as RotaryTable.from_frequencies does.
        """
        _check_freq(freq, "[T, R]")
        factors = freq.shape[0]
        _check_factors(t, freq)
        if index is not None:
            check_index(index, factors, freq.device)
        check_log_scale(log_scale, train_length)
        with _normal_mode():
            freq, t = _savable(freq), _savable(t)
            index = index if index is None else _savable(index)
            if positions is not None:
                positions = _savable(_check_positions(positions, freq, "[T, L] or [1, L]", (1, factors)))
            coarse, fine = _build(freq, length, positions, amplitude, dtype)
            if positions is not None:
                positions = positions.expand(factors, -1).contiguous()
            amplitude = _savable(amplitude) if isinstance(amplitude, Tensor) else float(amplitude)
            return cls(freq, t, positions, coarse, fine, amplitude, index, train_length, log_scale)

    def select(self, lengths: Tensor) -> "RotaryTableStack":
        """The stack with sequence b on the table of t = ceil(lengths[b] / train_length), for t = 1, 2, .., T.

        lengths [B], integers, on the table's device; nothing waits for the device. A longer sequence stays at t = T,
        with a warning where the lengths are on the CPU. Raises ValueError without a `train_length`, and for a stack
        that has its `index` already, whose tables need not be those of t = 1, 2, .., T.
        """
        if self.index is not None:
            raise ValueError("index: expected None, since select sets it, got one")
        if self.train_length is None:
            raise ValueError("train_length: expected from from_frequencies(..., train_length=...), got None")
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
            got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths: expected torch.int64 or torch.int32, got {got}")
        if lengths.dim() != 1 or lengths.device != self.device:
            raise ValueError(
                f"lengths: expected shape [B] on {self.device}, got {list(lengths.shape)} on {lengths.device}"
            )
        factors = self.freq.shape[0]
        if on_host(lengths) and lengths.numel():
            if lengths.min() < 0:
                raise ValueError(f"lengths: expected >= 0, got {int(lengths.min())}")
            self.warn_past_limit(int(lengths.max()), stacklevel=3)
        with _normal_mode():
            full = torch.div(lengths.long() - 1, self.train_length, rounding_mode="floor")
            return replace(self, index=full.clamp(0, factors - 1))

    def warn_past_limit(self, length: int, stacklevel: int) -> None:
        """Warn if the tables, those of t = 1, 2, .., T, end before `length` tokens."""
        factors = self.freq.shape[0]
        if length > factors * self.train_length:
            warn(
                f"lengths past {factors} * {self.train_length} tokens keep the frequencies of t = {factors}",
                stacklevel=stacklevel,
            )


for _cls in (RotaryTable, RotaryTableStack):
    # last field first: torch.export's guards replace names as text, and would find a `.t` in `.train_length`.
    _names = [field.name for field in reversed(fields(_cls))]
    pytree.register_dataclass(_cls, field_names=_names, serialized_type_name=f"clex_kernels.{_cls.__name__}")


def check_log_scale(log_scale: bool | str, train_length: int | None) -> None:
    """That logits can be scaled as the two say."""
    if train_length is not None:
        if isinstance(train_length, bool) or not isinstance(train_length, int):
            raise TypeError(f"train_length: expected an int, got {type(train_length).__name__}")
        if not 1 <= train_length <= MAX_LENGTH:
            raise ValueError(f"train_length: expected 1 to {MAX_LENGTH}, got {train_length}")
    one_of("log_scale", log_scale, (False, True, "clamped"))
    if log_scale and (train_length is None or train_length == 1):
        raise ValueError(
            f"log_scale: expected a train_length > 1, since it divides by ln(train_length), got {train_length}"
        )


def _check_factors(t: Tensor, freq: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.float64:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected a torch.float64 tensor, got {got}")
    check_dense("t", t)
    if t.shape != freq.shape[:1] or t.device != freq.device:
        expected = f"shape [T] = [{freq.shape[0]}] on {freq.device}"
        raise ValueError(f"t: expected {expected}, got {list(t.shape)} on {t.device}")
    if on_host(t) and not ((t >= 1) & t.isfinite()).all():
        raise ValueError(f"t: expected finite numbers >= 1, got {t.tolist()}")


def check_index(index: Tensor, tables: int, device: torch.device, debug: bool = False) -> None:
    """Each sequence's choice among `tables` tables; values on a device are looked at under `debug` only."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected torch.int64, got {got}")
    if index.dim() != 1 or index.device != device:
        raise ValueError(f"index: expected shape [B] on {device}, got {list(index.shape)} on {index.device}")
    if index.numel() and (on_host(index) or debug):
        first, last = (int(bound) for bound in index.aminmax())
        if first < 0 or last >= tables:
            raise ValueError(f"index: expected in [0, T) = [0, {tables}), got {first} to {last}")
