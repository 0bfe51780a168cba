"""Checks of what qkv_rotary is given, in shape letters, and its weights put in order."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clex_kernels.config import one_of
from clex_kernels.rotary_checks import DTYPES, check_kind, check_strided

# by name: whether rotated keys are given, and whether raw ones are.
KEYS = {"rotated": (True, False), "raw": (False, True), "both": (True, True)}
BACKENDS = ("auto", "triton", "linear")

OneOrThree = Tensor | Sequence[Tensor]


class Weights(NamedTuple):
    """Of q, k and v: three of them, or one for all, rows in this order; biases alike, or none."""

    weight: Tensor
    k_weight: Tensor | None
    v_weight: Tensor | None
    bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None

    @classmethod
    def of(cls, weight: OneOrThree, bias: OneOrThree | None) -> "Weights":
        """As given; a bias must come in as many parts as the weight."""
        parts = []
        for name, given in (("weight", weight), ("bias", bias)):
            several = isinstance(given, (tuple, list))
            if several and len(given) != 3:
                raise ValueError(f"{name}: expected one tensor or those of (q, k, v), got {len(given)}")
            for i, part in enumerate(given if several else ()):
                if not isinstance(part, Tensor):
                    raise TypeError(f"{name}[{i}] ({'qkv'[i]}): expected a tensor, got {type(part).__name__}")
            parts.append(tuple(given) if several else (given, None, None))
        if bias is not None and isinstance(weight, (tuple, list)) != isinstance(bias, (tuple, list)):
            raise ValueError("bias: expected one tensor where weight is one, or those of (q, k, v) where it is three")
        return cls(*parts[0], *parts[1])

    def split(self, num_heads: int, num_kv_heads: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Weights, and biases or None, of q, k and v."""
        if not self.is_packed:
            return self[:3], None if self.bias is None else self[3:]
        dims = self.weight.shape[0] // (num_heads + 2 * num_kv_heads)
        sizes = [heads * dims for heads in (num_heads, num_kv_heads, num_kv_heads)]
        return self.weight.split(sizes), None if self.bias is None else self.bias.split(sizes)

    @property
    def is_packed(self) -> bool:
        """Whether one tensor holds all."""
        return self.k_weight is None


def check_choices(x: Tensor, keys: str, backend: str) -> None:
    """The two choices by name, and that the backend exists where x is."""
    for name, value, choices in (("keys", keys, tuple(KEYS)), ("backend", backend, BACKENDS)):
        one_of(name, value, choices)
    if backend == "triton" and x.device.type == "cpu":
        raise ValueError("backend: expected 'auto' or 'linear' on the CPU, got 'triton', whose kernels need a GPU")


def check_projection(x: Tensor, weights: Weights, table: Any, num_heads: int, num_kv_heads: int) -> int:
    """Types, shapes, dtypes and devices of the projection's operands; returns D."""
    check_kind(table)
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected G to divide H = {num_heads}, got {num_kv_heads}")
    _check_input(x)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    if weights.is_packed:
        parts = [("weight", weights.weight, "bias", weights.bias, num_heads + 2 * num_kv_heads, "(H + 2G) D")]
    else:
        names = (f"{{}}[{i}] ({letter})" for i, letter in enumerate("qkv"))
        parts = [
            (name.format("weight"), weight, name.format("bias"), bias, count, rows)
            for name, weight, bias, count, rows in zip(
                names, weights[:3], weights[3:], heads, ("H D", "G D", "G D"), strict=True
            )
        ]
    dims = _head_dim(x, *parts[0][:2], parts[0][4], parts[0][5])
    for name, weight, bias_name, bias, count, rows in parts:
        _check_operand(name, weight, x, (count * dims, x.shape[2]), f"[{rows}, C]")
        if weights.bias is not None:
            _check_operand(bias_name, bias, x, (count * dims,), f"[{rows}]")
    return dims


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and x.device.type == "cuda"):
        raise TypeError(f"x: expected float32, float16, bfloat16, or float64 on the CPU, got {x.dtype}")
    check_strided("x", x)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x: expected shape [B, L, C], C at least 1, got {list(x.shape)}")


def _head_dim(x: Tensor, name: str, weight: Any, heads: int, rows: str) -> int:
    """D, from the rows of the first weight."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weight).__name__}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % heads:
        letters = f"{rows} = {heads} D rows"
        raise ValueError(f"{name}: expected shape [{rows}, C], {letters}, got {list(weight.shape)}")
    return weight.shape[0] // heads


def _check_operand(name: str, operand: Any, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if not isinstance(operand, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(operand).__name__}")
    check_strided(name, operand)
    if operand.shape != shape:
        if operand.dim() == 2 and operand.shape[0] == shape[0]:
            raise ValueError(
                f"x: expected shape [B, L, C] with C = {operand.shape[1]} as {name}'s, got {list(x.shape)}"
            )
        raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {list(operand.shape)}")
    if operand.dtype != x.dtype:
        raise ValueError(
            f"{name}: expected x's dtype {x.dtype}, got {operand.dtype}; outside autocast x, weight and bias must not"
            " mix dtypes"
        )
    if operand.device != x.device:
        raise ValueError(f"{name}: expected on x's device {x.device}, got {operand.device}")
