"""Random arguments: tensors of any layout, and values that have no business where they go."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clex_kernels import RotaryTable, RotaryTableStack

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = (
    *FLOATS,
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
)
EDGES = (-(2**63), -(2**31), -1, 0, 1, 2, 16, 17, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**62, 2**63 - 1)
NUMBERS = (*EDGES, 2**63, 10**30, -(10**30), 10**400, 0.0, 0.5, 1.5, -1.5, 1e-45, 1e-300, 1e38, 1e300)
OTHERS = (None, True, False, "", "none", "qk", "cuda", "integer", b"none", (), [], [1, 2], {}, {"a": 1}, 1j)


class Draw(random.Random):
    """A seeded source of tensors."""

    def __init__(self, seed: str):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))

    def maybe(self, share: float) -> bool:
        return self.random() < share

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def laid_out(self, values: Tensor, unit: bool = True, overlaps: bool = True) -> Tensor:
        """The same numbers within a larger buffer, in any order of dimensions; `unit`: the last with stride 1.

        What surrounds them is NaN, or a number that no index may have.
        """
        if values.dim() == 0 or self.maybe(0.25):
            return values.clone()
        if overlaps and values.dim() > 1 and self.maybe(0.15):
            dim = self.randrange(values.dim() - 1)
            if values.shape[dim] > 0:
                return values.narrow(dim, 0, 1).clone().expand_as(values)
        order = list(range(values.dim() - 1 if unit else values.dim()))
        self.shuffle(order)
        order += [values.dim() - 1] if unit else []
        pads = [(self.randrange(3), self.randrange(3)) for _ in order]
        sizes = [values.shape[dim] + sum(pad) for dim, pad in zip(order, pads, strict=True)]
        filling = torch.nan if values.is_floating_point() else 0 if values.dtype == torch.bool else 101
        buffer = torch.full(sizes, filling, dtype=values.dtype)
        for i, (dim, (before, _)) in enumerate(zip(order, pads, strict=True)):
            buffer = buffer.narrow(i, before, values.shape[dim])
        view = buffer.permute([order.index(dim) for dim in range(values.dim())])
        return view.copy_(values)

    def integers(self, values: Sequence[int]) -> Tensor:
        """Either kind of integers, any stride."""
        dtype = self.choice((torch.int32, torch.int64))
        return self.laid_out(torch.tensor(list(values), dtype=dtype), unit=False)


@dataclass
class Spoiled:
    """A wild value and how it came about."""

    value: Any
    how: str


def wild(draw: Draw) -> Any:
    """Anything."""
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 5:
        return draw.choice(OTHERS)
    more = (
        object(),
        float("nan"),
        float("inf"),
        -float("inf"),
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        np.int64(3),
        np.float32(0.5),
        np.arange(3),
        torch.device("meta"),
        torch.Generator(),
        nn.Linear(2, 2),
        torch.tensor(2),
        torch.tensor(0.5, dtype=torch.float64),
        torch.tensor([], dtype=torch.int64),
        range(3),
        slice(None),
        max,
    )
    if kind < 7:
        return draw.choice(more)
    shape = [draw.choice((0, 1, 2, 3)) for _ in range(draw.randrange(6))]
    return as_dtype(draw.normal(*shape), draw.choice(DTYPES))


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype; zeros where torch can't convert, as it is the dtype that a call is tried with."""
    try:
        return x.detach().to(dtype)
    # torch raises either, by the pair of dtypes.
    except (RuntimeError, NotImplementedError):
        return torch.zeros(x.shape).to(dtype)


def _edge(draw: Draw, x: Tensor) -> Tensor:
    """One of its numbers replaced by an extreme one."""
    x = x.detach().clone()
    if x.numel() == 0 or x.is_complex() or x.dtype.itemsize == 1 or x.dtype == torch.uint16:
        return x
    place = tuple(draw.randrange(size) for size in x.shape)
    if x.is_floating_point():
        x[place] = draw.choice((torch.nan, torch.inf, -torch.inf, 1e30, -1e4))
    else:
        info = torch.iinfo(x.dtype)
        x[place] = draw.choice([edge for edge in (*EDGES, 3, 5, 40, -2) if info.min <= edge <= info.max])
    return x


def _negated(x: Tensor) -> Tensor:
    """x as a view with the bit that says to negate it when it is read."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def _twice(x: Tensor, dim: int) -> Tensor:
    return torch.stack((x, x), dim=-1).flatten(-2)[..., ::2] if dim == x.dim() - 1 else x.repeat_interleave(2, dim)


def spoil_tensor(draw: Draw, x: Tensor) -> Spoiled:
    """x with one thing changed."""
    if x.layout != torch.strided or x.is_meta:
        return Spoiled(x, "as it was")
    x = x.detach()
    dims = max(x.dim(), 1)
    dim, size = draw.randrange(dims), x.shape[-1] if x.dim() else 1
    dim = min(dim, max(x.dim() - 1, 0))
    dtype = draw.choice(DTYPES)
    real = x.dtype in (torch.float32, torch.float64)
    ways: dict[str, Any] = {
        f"to {dtype}": lambda: as_dtype(x, dtype),
        "on meta": lambda: x.to("meta"),
        "with a dimension": lambda: x.unsqueeze(dim),
        "without a dimension": lambda: x.select(dim, 0) if x.dim() and x.shape[dim] else x.flatten(),
        "transposed": lambda: x.transpose(dim, -1) if x.dim() else x,
        "cut": lambda: x.narrow(dim, 0, max(x.shape[dim] - 1, 0)) if x.dim() else x,
        "emptied": lambda: x.narrow(dim, 0, 0) if x.dim() else x,
        "longer": lambda: torch.cat((x, x), dim) if x.dim() else x,
        "spread": lambda: _twice(x, dim) if x.dim() else x,
        "expanded": lambda: x.narrow(dim, 0, 1).expand_as(x) if x.dim() and x.shape[dim] else x,
        "flat": lambda: x.flatten(),
        "0-dim": lambda: x.flatten()[0] if x.numel() else x.new_zeros(()),
        "edge": lambda: _edge(draw, x),
        "edges": lambda: _edge(draw, _edge(draw, x)),
        "requiring grad": lambda: x.clone().requires_grad_(x.is_floating_point() or x.is_complex()),
        "a parameter": lambda: nn.Parameter(x.clone(), requires_grad=x.is_floating_point()),
        "sparse": lambda: x.to_sparse() if real else x,
        "negated": lambda: _negated(x) if real else x,
        "a list": lambda: x.tolist() if x.dtype.itemsize > 1 and size else [],
        "an array": lambda: (
            x.resolve_neg().resolve_conj().numpy() if x.dtype != torch.bfloat16 and x.dtype.itemsize > 1 else None
        ),
        "inference": lambda: _inference(x),
    }
    how = draw.choice(list(ways))
    return Spoiled(ways[how](), how)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def spoil_table(draw: Draw, table: Any) -> Spoiled:
    """A table of which one field does not fit."""
    name = draw.choice([field.name for field in fields(table)])
    value = getattr(table, name)
    changed = (
        spoil_tensor(draw, value) if isinstance(value, Tensor) and draw.maybe(0.7) else Spoiled(wild(draw), "wild")
    )
    return Spoiled(replace(table, **{name: changed.value}), f"{name} {changed.how}")


def spoil(draw: Draw, value: Any) -> Spoiled:
    """`value` changed, or something else altogether."""
    if isinstance(value, Tensor) and draw.maybe(0.75):
        return spoil_tensor(draw, value)
    if isinstance(value, (RotaryTable, RotaryTableStack)) and draw.maybe(0.75):
        return spoil_table(draw, value)
    if isinstance(value, tuple) and value and draw.maybe(0.7):
        i = draw.randrange(len(value))
        changed = spoil(draw, value[i])
        return Spoiled((*value[:i], changed.value, *value[i + 1 :]), f"[{i}] {changed.how}")
    return Spoiled(wild(draw), "wild")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors that an argument holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (RotaryTable, RotaryTableStack)):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, nn.Module):
        yield from tensors_in(list(value.state_dict(keep_vars=True).values()))


def described(value: Any) -> str:
    """One line that says what it is."""
    if isinstance(value, Tensor):
        text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if value.layout == torch.strided:
            text += f" strides {list(value.stride())}"
            if not value.dtype.is_complex and value.dtype.itemsize > 1 and 0 < value.numel() <= 8 and value.is_cpu:
                text += f" = {value.tolist()}"
        return text + (f" {value.layout}" if value.layout != torch.strided else "") + f" {value.device}" * value.is_meta
    if isinstance(value, (RotaryTable, RotaryTableStack)):
        parts = ", ".join(f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({parts})"
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    return repr(value)[:200]
