"""Runs Triton kernels on CPU tensors, through Triton's interpreter, with bf16 that is right.

Inside `interpreted()` every launch whose tensors are on the CPU is interpreted, any other is compiled as always, so
launchers of the package run unchanged and ahead-of-time compilation works in the same process. TRITON_INTERPRET, the
official switch, holds for the whole process instead.

Triton 3.7 and 3.8 keep bf16 as uint16 and then truncate casts, multiply raw bits in tl.dot and add bits as integers;
`Bf16Builder` computes in fp32 and rounds to nearest even, bit for bit as torch does. The interpreter accepts more than
a GPU: the compile gate is the other half of this test.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceScanOpInterface, TensorHandle
from triton.runtime.jit import JITFunction

# all that the interpreter patches; a nested device function leaves its patches behind.
PATCHED = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
LOCK = threading.RLock()
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(handle: TensorHandle) -> TensorHandle:
    """The same values in fp32 if the handle holds bf16."""
    if not is_bf16(handle):
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def narrow(values: np.ndarray) -> TensorHandle:
    """Values rounded to the nearest bf16, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # rounding up the bits of a NaN would carry into the exponent or the sign.
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


class Bf16Builder(InterpreterBuilder):
    def get_bf16(self, value: float) -> TensorHandle:
        return narrow(np.array([value]))

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if is_bf16(src):
            src = widen(src)
        if dst_type.scalar == tl.bfloat16:
            return narrow(src.data)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding_mode: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return narrow(super().create_fp_to_fp(src, tl.float32, rounding_mode).data)
        return super().create_fp_to_fp(widen(src), dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        if op in BITWISE or not (is_bf16(lhs) and is_bf16(rhs)):
            return super().binary_op(lhs, rhs, op)
        out = op(widen(lhs).data, widen(rhs).data)
        return TensorHandle(out, tl.bfloat16) if out.dtype == np.bool_ else narrow(out)

    def unary_op(self, arg: TensorHandle, op: Callable) -> TensorHandle:
        return narrow(op(widen(arg).data)) if is_bf16(arg) else super().unary_op(arg, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not is_bf16(z):
            return super().create_fma(x, y, z)
        # the product of two bf16 is exact in fp32.
        return narrow(widen(x).data * widen(y).data + widen(z).data)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        out = super().create_dot(widen(a), widen(b), widen(d), *options)
        return narrow(out.data) if is_bf16(d) else out


def check_reduced(self: ReduceScanOpInterface, tensors: tuple[tl.tensor, ...]) -> None:
    # numpy would add bits, and the order of a GPU's bf16 additions is nobody's promise.
    if any(is_bf16(tensor.handle) for tensor in tensors):
        raise TypeError("reductions and scans: expected fp32, got bf16")


@functools.cache
def interpreted_function(fn: Callable) -> InterpretedFunction:
    return InterpretedFunction(fn)


@contextlib.contextmanager
def patched_language() -> Iterator[None]:
    """Turn triton.language into the interpreter's for one launch."""
    before = [dict(vars(scope)) for scope in PATCHED]
    builder_class, check_tensor = interpreter.interpreter_builder.__class__, ReduceScanOpInterface.check_tensor
    interpreter.interpreter_builder.__class__ = Bf16Builder
    ReduceScanOpInterface.check_tensor = check_reduced
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        yield
    finally:
        interpreter.interpreter_builder.__class__ = builder_class
        ReduceScanOpInterface.check_tensor = check_tensor
        for scope, names in zip(PATCHED, before, strict=True):
            for name, value in dict(vars(scope)).items():
                if name not in names:
                    delattr(scope, name)
                elif names[name] is not value:
                    setattr(scope, name, names[name])


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Interpret the launches on CPU tensors."""
    run, call = JITFunction.run, JITFunction.__call__
    launching = threading.local()

    def run_or_interpret(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        if warmup or not any(tensor.device.type == "cpu" for tensor in tensors):
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        # a GPU raises no warning either.
        with LOCK, patched_language(), np.errstate(all="ignore"):
            launching.depth = getattr(launching, "depth", 0) + 1
            try:
                return interpreted_function(self.fn).run(*args, grid=grid, warmup=False, **kwargs)
            finally:
                launching.depth -= 1

    def call_or_interpret(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if getattr(launching, "depth", 0) == 0:
            return call(self, *args, **kwargs)
        return interpreted_function(self.fn).rewrite()(*args, **kwargs)

    JITFunction.run, JITFunction.__call__ = run_or_interpret, call_or_interpret
    try:
        yield
    finally:
        JITFunction.run, JITFunction.__call__ = run, call
