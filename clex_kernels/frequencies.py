"""Rotary frequencies as a function of the length factor t: the CLEX ODE, solved with an error estimate.

With R rotary pairs, s = ln(2t - 1) and u_i = ln freq_i + (i / (R-1)) s, the ODE of Chen et al. (ICLR 2024), dz/dt =
act((z + ntk(t)) @ up) @ down + d ntk/dt for z = ln freq, becomes

    du/ds = (e^s / 2) act((u - (i/R) ln ntk_base - 2 (i/(R-1)) s) @ up) @ down,    u_i(0) = -(i/R) ln rope_base.

DOP853 integrates it in fp64 (csrc/dynamics.h). Its steps follow from the weights alone; times are read from each step's
dense output, so the frequencies at a time do not depend on the other times asked. The backward is the exact adjoint of
the accepted steps, dense output included.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from clex_kernels.extension import has_cuda, library

MAX_STEPS = 128
DENSE_TERMS = 7


class FrequencySettings(Protocol):
    """What the solver reads of a ClexConfig."""

    rope_base: float
    ntk_base: float
    activation: str
    pairs: int
    hidden_size: int


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


torch.library.register_autograd(
    "clex::solve_frequencies", _backward, setup_context=_save_for_backward, lib=library
)


def _check_weights(up: Tensor, down: Tensor, config: FrequencySettings) -> None:
    pairs, hidden = config.pairs, config.hidden_size
    if pairs < 2:
        raise ValueError(f"config: expected at least 2 rotary pairs (rotary_dim >= 4), got {pairs}")
    for name, weight, shape, letters in (("up", up, (pairs, hidden), "[R, M]"), ("down", down, (hidden, pairs), "[M, R]")):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
        if weight.shape != shape:
            raise ValueError(f"{name}: expected shape {letters} = {list(shape)}, got {list(weight.shape)}")
        if weight.dtype is not torch.float32 and weight.dtype is not torch.float64:
            raise TypeError(f"{name}: expected torch.float32 or torch.float64, got {weight.dtype}")
    if up.dtype is not down.dtype:
        raise TypeError(f"down: expected the dtype of up, {up.dtype}, got {down.dtype}")
    if up.device != down.device:
        raise ValueError(f"down: expected the device of up, {up.device}, got {down.device}")


def _check_times(times: Tensor, up: Tensor) -> None:
    if not isinstance(times, Tensor):
        raise TypeError(f"times: expected a Tensor, got {type(times).__name__}")
    if times.dim() != 1:
        raise ValueError(f"times: expected shape [T], got {list(times.shape)}")
    if times.dtype is not torch.float64:
        raise TypeError(f"times: expected torch.float64, got {times.dtype}")
    if times.device != up.device:
        raise ValueError(f"times: expected the device of up, {up.device}, got {times.device}")


def solve_frequencies(up: Tensor, down: Tensor, times: Tensor, config: FrequencySettings) -> Tensor:
    """todo"""
    _check_weights(up, down, config)
    _check_times(times, up)
    return torch.ops.clex.solve_frequencies(
        up, down, times, math.log(config.rope_base), math.log(config.ntk_base), config.activation
    )[0]
