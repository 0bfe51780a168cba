"""Rotary frequencies as a function of the length factor t: the CLEX ODE, solved with an error estimate.

With R rotary pairs, s = ln(2t - 1) and u_i = ln freq_i + (i / (R-1)) s, the ODE of Chen et al. (ICLR 2024), dz/dt =
act((z + ntk(t)) @ up) @ down + d ntk/dt for z = ln freq, becomes

    du/ds = (e^s / 2) act((u - (i/R) ln ntk_base - 2 (i/(R-1)) s) @ up) @ down,    u_i(0) = -(i/R) ln rope_base.

DOP853 integrates it in fp64 (csrc/dynamics.h). Its steps follow from the weights alone; times are read from each step's
dense output, so the frequencies at a time do not depend on the other times asked. The backward is the exact adjoint of
the accepted steps, dense output included.
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from clex_kernels.config import ClexConfig, check_config
from clex_kernels.extension import has_cuda, library
from clex_kernels.weights import on_host

MAX_STEPS = 128
DENSE_TERMS = 7


library.define(
    "solve_frequencies(Tensor up, Tensor down, Tensor times, float log_rope_base, float log_ntk_base, str activation,"
    " Tensor? frozen_nodes=None) -> (Tensor freq, Tensor nodes, Tensor states, Tensor evaluations)"
)
library.define(
    "solve_frequencies_bwd(Tensor dfreq, Tensor freq, Tensor up, Tensor down, Tensor times, Tensor nodes,"
    " Tensor states, float log_ntk_base, str activation) -> (Tensor dup, Tensor ddown)"
)
library.define(
    "trajectory(Tensor up, Tensor down, float last, float log_rope_base, float log_ntk_base, str activation)"
    " -> (Tensor nodes, Tensor polynomials)"
)


@torch.library.register_fake("clex::solve_frequencies", lib=library)
def _solve_frequencies_fake(up, down, times, log_rope_base, log_ntk_base, activation, frozen_nodes=None):
    pairs = up.shape[0]
    return (
        times.new_empty(times.shape[0], pairs),
        times.new_empty(MAX_STEPS + 1),
        times.new_empty(MAX_STEPS, pairs),
        times.new_empty(1, dtype=torch.int64),
    )


@torch.library.register_fake("clex::solve_frequencies_bwd", lib=library)
def _solve_frequencies_bwd_fake(dfreq, freq, up, down, times, nodes, states, log_ntk_base, activation):
    return up.new_empty(up.shape), down.new_empty(down.shape)


@torch.library.register_fake("clex::trajectory", lib=library)
def _trajectory_fake(up, down, last, log_rope_base, log_ntk_base, activation):
    pairs = up.shape[0]
    nodes = up.new_empty(MAX_STEPS + 1, dtype=torch.float64)
    return nodes, up.new_empty(MAX_STEPS, 1 + DENSE_TERMS, pairs, dtype=torch.float64)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    up, down, times, _, log_ntk_base, activation, _ = inputs
    freq, nodes, states, evaluations = output
    ctx.mark_non_differentiable(nodes, states, evaluations)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(freq, up, down, times, nodes, states)
    ctx.settings = log_ntk_base, activation


def _backward(ctx: Any, dfreq: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    dup = ddown = None
    if dfreq is not None:
        dup, ddown = torch.ops.clex.solve_frequencies_bwd(dfreq, *ctx.saved_tensors, *ctx.settings)
    return dup, ddown, None, None, None, None, None


def _no_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    return None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("solve_frequencies: its gradient can't be differentiated again (no second derivatives)")


torch.library.register_autograd("clex::solve_frequencies", _backward, setup_context=_save_for_backward, lib=library)
torch.library.register_autograd(
    "clex::solve_frequencies_bwd", _no_second_derivative, setup_context=_no_context, lib=library
)


@functools.cache
def _warn_no_cuda() -> None:
    warnings.warn("clex_kernels was built without CUDA C++: frequencies are solved on the CPU", stacklevel=3)


def _on_cpu(op: Any, *arguments: Any) -> tuple[Tensor, ...]:
    # a ROCm build of torch, or one whose CUDA has no matching nvcc.
    _warn_no_cuda()
    device = arguments[0].device
    outputs = op(*(argument.cpu() if isinstance(argument, Tensor) else argument for argument in arguments))
    return tuple(output.to(device) for output in outputs)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _solve_frequencies_cuda(up, down, times, log_rope_base, log_ntk_base, activation, frozen_nodes=None):
    settings = log_rope_base, log_ntk_base, activation
    if not has_cuda():
        return _on_cpu(torch.ops.clex.solve_frequencies, up, down, times, *settings, frozen_nodes)
    up, down, times = up.contiguous(), down.contiguous(), times.contiguous()
    frozen_nodes = None if frozen_nodes is None else frozen_nodes.contiguous()
    outputs = _solve_frequencies_fake(up, down, times, *settings)
    with torch.cuda.device(up.device):
        torch.ops.clex_cuda.solve_frequencies(up, down, times, frozen_nodes, *settings, *outputs, _stream(up))
    return outputs


def _solve_frequencies_bwd_cuda(dfreq, freq, up, down, times, nodes, states, log_ntk_base, activation):
    inputs = [tensor.contiguous() for tensor in (dfreq, freq, up, down, times, nodes, states)]
    if not has_cuda():
        return _on_cpu(torch.ops.clex.solve_frequencies_bwd, *inputs, log_ntk_base, activation)
    dup = torch.zeros(up.shape, dtype=torch.float64, device=up.device)
    ddown = torch.zeros(down.shape, dtype=torch.float64, device=up.device)
    with torch.cuda.device(up.device):
        torch.ops.clex_cuda.solve_frequencies_bwd(*inputs, log_ntk_base, activation, dup, ddown, _stream(up))
    return dup.to(up.dtype), ddown.to(up.dtype)


def _trajectory_cuda(up, down, last, log_rope_base, log_ntk_base, activation):
    settings = last, log_rope_base, log_ntk_base, activation
    if not has_cuda():
        return _on_cpu(torch.ops.clex.trajectory, up, down, *settings)
    up, down = up.contiguous(), down.contiguous()
    outputs = _trajectory_fake(up, down, *settings)
    with torch.cuda.device(up.device):
        torch.ops.clex_cuda.trajectory(up, down, *settings, *outputs, _stream(up))
    return outputs


library.impl("solve_frequencies", _solve_frequencies_cuda, "CUDA")
library.impl("solve_frequencies_bwd", _solve_frequencies_bwd_cuda, "CUDA")
library.impl("trajectory", _trajectory_cuda, "CUDA")


def _check_weights(up: Tensor, down: Tensor, config: ClexConfig) -> None:
    check_config(config)
    pairs, hidden = config.pairs, config.hidden_size
    for name, weight, shape, letters in (
        ("up", up, (pairs, hidden), "[R, M]"),
        ("down", down, (hidden, pairs), "[M, R]"),
    ):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
        if weight.shape != shape:
            raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {list(weight.shape)}")
        if weight.dtype is not torch.float32 and weight.dtype is not torch.float64:
            raise TypeError(f"{name}: expected torch.float32 or torch.float64, got {weight.dtype}")
        if weight.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, got one of layout {weight.layout}")
    if up.dtype is not down.dtype:
        raise TypeError(f"down: expected the dtype of up, {up.dtype}, got {down.dtype}")
    if up.device != down.device:
        raise ValueError(f"down: expected the device of up, {up.device}, got {down.device}")


def _check_times(times: Tensor, other: str, device: torch.device) -> None:
    if not isinstance(times, Tensor):
        raise TypeError(f"times: expected a Tensor, got {type(times).__name__}")
    if times.dim() != 1:
        raise ValueError(f"times: expected shape [T], got {list(times.shape)}")
    if times.dtype is not torch.float64:
        raise TypeError(f"times: expected torch.float64, got {times.dtype}")
    if times.device != device:
        raise ValueError(f"times: expected the device of {other}, {device}, got {times.device}")
    if times.layout is not torch.strided:
        raise TypeError(f"times: expected a dense tensor, got one of layout {times.layout}")


def _check_values(up: Tensor, down: Tensor, times: Tensor | None) -> None:
    for name, weight in (("up", up), ("down", down)):
        if not weight.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got {weight[~weight.isfinite()][0].item()}")
    if times is not None and times.numel():
        if not (times.isfinite() & (times >= 1)).all():
            wrong = times[~(times.isfinite() & (times >= 1))][0].item()
            raise ValueError(f"times: expected finite values >= 1, got {wrong}")
        if (times.diff() < 0).any():
            raise ValueError(f"times: expected non-decreasing values, got {times.tolist()}")


def _settings(config: ClexConfig) -> tuple[float, float, str]:
    return math.log(config.rope_base), math.log(config.ntk_base), config.activation


def _solve(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> tuple[Tensor, ...]:
    _check_weights(up, down, config)
    _check_times(times, "up", up.device)
    try:
        solved = torch.ops.clex.solve_frequencies(up, down, times, *_settings(config))
    except RuntimeError:
        # the CPU solver refuses bad values; which they are is looked up only now.
        _check_values(up, down, times)
        raise
    # ln freq may be a number where freq is none.
    if on_host(up) and not solved[0].isfinite().all():
        raise ValueError("up, down: expected weights of finite frequencies, got some that are infinite in fp64")
    return solved


def solve_frequencies(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """Rotary frequencies at the length factors `times`, differentiable in the weights.

    Args:
        up: [R, M], fp32 or fp64.
        down: [M, R], dtype and device of `up`.
        times: [T] fp64 on the device of `up`, length factors >= 1 (dimensionless) in non-decreasing order.
        config: ClexConfig; rope_base, ntk_base, activation, pairs (R) and hidden_size (M) are read.

    Returns:
        freq [T, R] fp64, rad/token, within 1e-10 (relative) of the exact solution for weights of a trained size; plain
        RoPE exactly at t = 1. Row by row independent of the other times, bit for bit.

    Raises:
        ValueError: a shape, device or (on the CPU) value is wrong: NaN weights, weights whose frequencies
            are infinite in fp64, a time below 1, unsorted times, R = 1.
        TypeError: a dtype is wrong.
        RuntimeError: the weights are so large that 128 steps do not reach the last time (CPU).

    On CUDA nothing waits to look at values: rows without a solution, past the last accepted step, of times below 1 or
    of times that come after a later step's, are NaN.
    """
    return _solve(up, down, times, config)[0]


def evaluations(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> int:
    """How often `solve_frequencies` evaluates du/ds for these arguments, rejected steps included."""
    return int(_solve(up, down, times, config)[3].item())


def trajectory(up: Tensor, down: Tensor, config: ClexConfig) -> tuple[Tensor, Tensor]:
    """The whole solution for t in [1, config.max_factor], to be read by `evaluate`; not differentiable.

    Args:
        up: [R, M], fp32 or fp64.
        down: [M, R], dtype and device of `up`.
        config: ClexConfig; besides what `solve_frequencies` reads, max_factor.

    Returns:
        nodes [129] fp64, ln(2t - 1) at the boundaries of the steps, infinite past the last; polynomials [128, 8, R]
        fp64, for each step ln freq + (i / (R-1)) ln(2t - 1) at its start and 7 coefficients of the dense output.

    Raises:
        As `solve_frequencies`.
    """
    _check_weights(up, down, config)
    try:
        return torch.ops.clex.trajectory(up, down, float(config.max_factor), *_settings(config))
    except RuntimeError:
        _check_values(up, down, None)
        raise


def evaluate(nodes: Tensor, polynomials: Tensor, times: Tensor) -> Tensor:
    """Frequencies at any length factors, read from a trajectory in plain torch, without synchronisation.

    Args:
        nodes: [129] fp64, polynomials: [128, 8, R] fp64, from `trajectory`.
        polynomials: see nodes.
        times: [T] fp64, length factors in any order; outside the trajectory the result is NaN.

    Returns:
        freq [T, R] fp64, rad/token.

    Raises:
        ValueError: times has another shape or device.
        TypeError: times has another dtype.
    """
    _check_times(times, "nodes", nodes.device)
    s = torch.log(2 * times - 1)
    # each step holds its end but not its start, as in the solver.
    step = (torch.searchsorted(nodes, s) - 1).clamp(0, MAX_STEPS - 1)
    start, end = nodes[step], nodes[step + 1]
    inside = (s >= 0) & (end < math.inf)
    x = torch.where(inside, (s - start) / (end - start), math.nan)[:, None]
    state, *terms = polynomials[step].unbind(1)
    total = torch.zeros_like(state)
    for k, term in reversed(list(enumerate(terms))):
        total = (total + term) * (1 - x if k % 2 else x)
    pairs = polynomials.shape[-1]
    exponents = torch.arange(pairs, dtype=torch.float64, device=s.device) / (pairs - 1)
    return torch.exp(state + total - exponents * s[:, None])
