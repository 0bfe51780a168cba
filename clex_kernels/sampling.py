"""What a training step draws: a length factor t for every sequence, and L positions out of the L t that t stands for.

A sequence of L tokens spread over [0, L t) shows the model the distances, and the ODE the frequencies, of a context of
L t tokens at the price of L. Positions are sorted, 0 and the last one kept, all divided by max(1, L // train_length).
They are "uniform", the authors' draw without replacement; or come in "runs", 2 to 8 contiguous ones with random gaps,
which leave neighbours one token apart as they are in use.

The host draws t, the numbers of runs and a seed, and a generator on the device draws positions from that seed: nothing
waits for the device. The host's generator advances alike whatever the options.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from clex_kernels.config import ClexConfig

RUNS = (2, 8)


def draw_times(
    config: ClexConfig, count: int, generator: torch.Generator | None, factors: str, plain_share: float
) -> list[float]:
    """Length factors of `count` sequences."""
    # on the CPU, whatever torch.set_default_device says.
    plain = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") < plain_share
    whole = torch.randint(1, config.max_factor + 1, (count,), generator=generator, device="cpu").double()
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    real = 1 + (config.max_factor - 1) * uniform
    return torch.where(plain, 1.0, whole if factors == "integer" else real).tolist()


def draw_positions(
    config: ClexConfig,
    length: int,
    times: list[float],
    generator: torch.Generator | None,
    positions: str,
    device: torch.device,
) -> Tensor:
    """Positions [B, L] fp64 on `device`, tokens, of sequences with the length factors `times` [B]."""
    runs = torch.randint(RUNS[0], RUNS[1] + 1, (len(times),), generator=generator, device="cpu").tolist()
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
    on_device = torch.Generator(device).manual_seed(seed)
    spans = [math.floor(length * t) for t in times]
    if positions == "uniform":
        rows = [_uniform(length, span, on_device) for span in spans]
    else:
        rows = [_in_runs(length, span, n, on_device) for span, n in zip(spans, runs, strict=True)]
    # divided in fp64: an exact quotient's nearest number.
    return torch.stack(rows).double() / max(1, length // config.train_length)


def check_sampling(generator: torch.Generator | None, positions: str, factors: str, plain_share: float) -> None:
    """Raises TypeError or ValueError for a bad option of `sample`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator: expected one on the CPU, where t is drawn, got one on {generator.device}")
    if not isinstance(positions, str) or positions not in ("uniform", "runs"):
        raise ValueError(f"positions: expected 'uniform' or 'runs', got {positions!r}")
    if not isinstance(factors, str) or factors not in ("integer", "continuous"):
        raise ValueError(f"factors: expected 'integer' or 'continuous', got {factors!r}")
    if isinstance(plain_share, bool) or not isinstance(plain_share, Real):
        raise TypeError(f"plain_share: expected a number, got {plain_share!r}")
    if not 0.0 <= plain_share <= 1.0:
        raise ValueError(f"plain_share: expected a probability from 0 to 1, got {plain_share!r}")


def _uniform(length: int, span: int, generator: torch.Generator) -> Tensor:
    """[L] int64: 0, span - 1 and L - 2 of the numbers between, without replacement, sorted."""
    device = generator.device
    inner = torch.randperm(max(span - 2, 0), generator=generator, device=device)[: max(length - 2, 0)].sort().values + 1
    ends = torch.arange(2, device=device) * (span - 1)
    return torch.cat((ends[:1], inner, ends[1:]))[:length]


def _in_runs(length: int, span: int, runs: int, generator: torch.Generator) -> Tensor:
    """[L] int64: up to `runs` contiguous runs of random lengths with random gaps between, from 0 to span - 1."""
    device = generator.device
    cuts = torch.randperm(max(length - 1, 0), generator=generator, device=device)[: runs - 1].sort().values + 1
    # what a run is shifted by: none for the first, all free room for the last.
    shifts = torch.randint(0, span - length + 1, (len(cuts) + 1,), generator=generator, device=device).sort().values
    shifts[0] = 0
    shifts[len(cuts) :] = (span - length) if len(cuts) else 0
    token = torch.arange(length, device=device)
    return token + shifts[torch.searchsorted(cuts, token, right=True)]
