"""Gradients of accepted calls: finite for finite numbers, and those that autograd finds in what the calls must give."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clex_kernels import RotaryTable, RotaryTableStack

from .truths import assert_within, is_plain
from .values import Draw, tensors_in

# relative to the largest number; of half precision only finite gradients are asked, whose parts are rounded on the way.
SLACK = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass
class Derivative:
    """Which arguments a call is differentiated in, and its results in plain torch, fp64."""

    leaves: tuple[str, ...]
    truth: Callable[[dict[str, Any]], tuple[Tensor | None, ...]]
    # where the truth is an approximation itself.
    slack: float | None = None
    # whether arguments are of a size that the truth is known for.
    applies: Callable[[dict[str, Any]], bool] = lambda arguments: True


def _with_leaves(value: Any, wide: bool, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        leaves.append((value.detach().double().clone() if wide else value.detach()).requires_grad_())
        return leaves[-1]
    if isinstance(value, (RotaryTable, RotaryTableStack)):
        return replace(value, freq=_with_leaves(value.freq, wide, leaves))
    if isinstance(value, (tuple, list)):
        return type(value)(_with_leaves(part, wide, leaves) for part in value)
    return value


def _differentiated(
    function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...], wide: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves: list[Tensor] = []
    given = {name: _with_leaves(x, wide, leaves) if name in names else x for name, x in arguments.items()}
    results = function(given) if wide else function(**given)
    return leaves, list(results) if isinstance(results, tuple) else [results]


def check(derivative: Derivative, function: Callable[..., Any], arguments: dict[str, Any], seed: str) -> None:
    """Raises AssertionError unless the gradients are right, for random ones of the results, laid out in any way."""
    names = derivative.leaves
    given = [arguments.get(name) for name in names]
    # autograd takes no inference tensors, whoever differentiates.
    is_any_inference = any(x.is_inference() for x in tensors_in(list(arguments.values())))
    if is_any_inference or not is_plain(*given) or not derivative.applies(arguments):
        return
    leaves, results = _differentiated(function, arguments, names, wide=False)
    true_leaves, true_results = _differentiated(derivative.truth, arguments, names, wide=True)
    draw, pairs = Draw(seed), []
    for i, (x, truth) in enumerate(zip(results, true_results, strict=False)):
        if x is None or draw.maybe(0.1):
            continue
        assert x.requires_grad, f"result {i}: without a gradient"
        dx = draw.normal(*x.shape, dtype=x.dtype)
        # that of a sum is one number, expanded.
        dx = x.new_ones(()).expand(x.shape) if draw.maybe(0.2) else draw.laid_out(dx, unit=False)
        # what is -inf whatever happens does not change.
        pairs.append((x, dx, truth, dx.double().masked_fill(truth.isinf(), 0.0)))
    if not pairs:
        return
    outputs, cotangents, true_outputs, true_cotangents = map(list, zip(*pairs, strict=True))
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    # a leaf more, so that there is something to differentiate where results are empty or seen by nobody.
    anything = torch.zeros((), dtype=torch.float64, requires_grad=True)
    true_outputs = [truth + anything for truth in true_outputs]
    expected = torch.autograd.grad(true_outputs, true_leaves, true_cotangents, allow_unused=True)
    for i, (leaf, gradient, truth) in enumerate(zip(leaves, found, expected, strict=True)):
        _compare(f"gradient {i}", leaf, gradient, truth, derivative.slack or SLACK.get(results[0].dtype))


def _compare(name: str, leaf: Tensor, gradient: Tensor | None, truth: Tensor | None, slack: float | None) -> None:
    truth = torch.zeros(leaf.shape, dtype=torch.float64) if truth is None else truth
    # none is zero.
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype), f"{name}: {gradient.dtype}"
    assert gradient.isfinite().all(), f"{name}: not finite"
    if slack is not None:
        assert_within(name, gradient, truth, slack)
