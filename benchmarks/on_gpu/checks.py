"""Every kernel against fp64 on the device at hand, by the project's one tolerance rule.

Every head dimension meets every dtype and every feature, and every feature meets every dtype; not all three together,
which would compile for longer than all else takes. Sizes are small and odd, so that tiles have tails; the benchmarks'
shapes are checked where they are timed, and some of them here too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import assert_within_rule
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.timing import describe, raise_if_lost

Head = tuple[int, int]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Check:
    """A comparison by name, of some kernel; raises AssertionError, or anything else, where it fails."""

    kernel: str
    what: str
    run: Callable[[Gpu], None]

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.what}"


def run_check(gpu: Gpu, check: Check, without: Mapping[str, str], trying: Callable[[str], None]) -> dict[str, Any]:
    """Its record; the device being lost is not caught here."""
    if check.name in without:
        return {"kernel": check.kernel, "what": check.what, "problem": without[check.name]}
    trying(check.name)
    problem = None
    try:
        check.run(gpu)
        gpu.wait()
    except Exception as error:
        # a kernel that raises is as wrong as one whose numbers are.
        raise_if_lost(gpu, error)
        problem = describe(error)
    return {"kernel": check.kernel, "what": check.what, "problem": problem}


def spread_over(features: Sequence[str], heads: Sequence[Head]) -> list[tuple[str, Head, str]]:
    """Every feature with every head, dtypes taking turns such that each feature and each head meets all of them."""
    names = list(DTYPES)
    return [
        (feature, head, names[(i + j) % len(names)])
        for i, feature in enumerate(features)
        for j, head in enumerate(heads)
    ]


def everywhere(feature: str, heads: Sequence[Head]) -> list[tuple[str, Head, str]]:
    """One feature with every head and dtype."""
    return [(feature, head, dtype) for head in heads for dtype in DTYPES]


def label(feature: str, head: Head, dtype: str) -> str:
    return f"{feature}, D {head[0]}, R {head[1]}, {dtype}"


def move(gpu: Gpu, value: Any) -> Any:
    """Tensors within it to the device, differentiably."""
    return tree_map_only(Tensor, lambda x: x.to(gpu.device), value)


def follow_rule(
    dtype: torch.dtype, actual: Mapping[str, Tensor], near: Mapping[str, Tensor], true: Mapping[str, Tensor]
) -> None:
    """The rule for tensors by name; `near` is the reference in dtype, `true` in fp64."""
    for name, x in actual.items():
        tensors = [y.detach().cpu() for y in (x, near[name], true[name])]
        if x.dtype == torch.float64:
            # a sum that is fp64 by type only: judged in what went in, whose range it may exceed.
            largest = tensors[2].abs().max()
            tensors = [(tensors[0] / largest).to(dtype), (tensors[1] / largest).to(dtype), tensors[2] / largest]
        try:
            assert_within_rule(*tensors)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
