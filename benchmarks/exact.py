"""The fp64 truths that every timed result is compared with, from the reference's equations and no kernel.

Frequencies come from torchdiffeq's dopri8 at a tolerance of 1e-13 in (z, t), made to step on every time asked: its
interpolation between steps is only good to 3e-8.
"""

import torch
from torch import Tensor
from torchdiffeq import odeint

from clex_kernels import ClexConfig, reference

TOLERANCE = 1e-13
TOKENS_AT_ONCE = 32
KEYS_AT_ONCE = 256


def solve_exactly(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """Frequencies [T, R] in fp64, rad/token; times [T] increase."""
    up, down = up.double(), down.double()
    start = reference.plain_log_frequencies(config, torch.float64)
    grid = times if times[0] == 1 else torch.cat((times.new_ones(1), times))
    if len(grid) == 1:
        return start.exp()[None]
    z = odeint(
        lambda t, z: reference.log_frequency_slope(t, z, up, down, config),
        start,
        grid,
        method="dopri8",
        rtol=TOLERANCE,
        atol=TOLERANCE,
        options={"step_t": grid},
    )
    return z[-len(times) :].exp()


def weight_gradients(
    up: Tensor, down: Tensor, times: Tensor, dfreq: Tensor, config: ClexConfig
) -> tuple[Tensor, Tensor]:
    """(dup, ddown) of sum(dfreq * frequencies) in fp64, by autograd through the exact solve."""
    up, down = (weight.detach().double().requires_grad_() for weight in (up, down))
    return torch.autograd.grad(solve_exactly(up, down, times, config), (up, down), dfreq)


def cos_sin(positions: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [L, R] in fp64."""
    angle = positions.double()[:, None] * freq.double()
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D] with all of D rotated, in fp64; cos and sin [L, R]."""
    y = torch.empty(x.shape, dtype=torch.float64)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    # a few tokens at a time stay in cache: five times faster than whole fp64 temporaries.
    for start in range(0, x.shape[1], TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        y[:, rows] = reference.rotary(x[:, rows].double(), cos[rows], sin[rows])
    return y


def frequency_gradient(y: Tensor, dy: Tensor, positions: Tensor) -> Tensor:
    """dfreq [R] in fp64 from rotated y and its gradient dy, both [B, L, H, D]."""
    dangle = torch.empty(y.shape[1], y.shape[-1] // 2, dtype=torch.float64)
    for start in range(0, y.shape[1], TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        y0, y1 = y[:, rows].double().chunk(2, dim=-1)
        dy0, dy1 = dy[:, rows].double().chunk(2, dim=-1)
        dangle[rows] = (dy1 * y0 - dy0 * y1).sum(dim=(0, 2))
    return positions.double() @ dangle


def attention(q: Tensor, k: Tensor, v: Tensor, freq: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Causal attention [B, n, H, D] in fp64 of the query rows [n], over raw q, k and v; differentiable.

    Only these rows are computed. A gradient that is zero in all others flows back through them alone, so that every
    gradient of the whole attention is exact as well, at n/L of its cost.
    """
    cos, sin = reference.tables(freq.double(), positions.double())
    q = reference.rotary(q[:, rows].double(), cos[rows], sin[rows])
    k = reference.rotary(k.double(), cos, sin)
    mask = torch.arange(k.shape[1], device=k.device) <= rows[:, None]
    return reference.attention(q, k, v.double(), mask[None])[0]


def decode(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
    """Attention [H, D] in fp64 of the last token over all: q [H, D], k and v [S, G, D], all raw.

    It holds no fp64 copy of the cache, whose keys are rotated some at a time.
    """
    (keys, groups, dims), scale = k.shape, k.shape[-1] ** -0.5
    blocks = [slice(start, start + KEYS_AT_ONCE) for start in range(0, keys, KEYS_AT_ONCE)]
    cos, sin = reference.tables(freq.double(), torch.arange(keys, dtype=torch.float64))
    q = reference.rotary(q[None, None].double(), cos[-1:], sin[-1:]).view(groups, -1, dims)
    logits = torch.empty(groups, q.shape[1], keys, dtype=torch.float64)
    for rows in blocks:
        rotated = reference.rotary(k[None, rows].double(), cos[rows], sin[rows])[0]
        torch.bmm(q, rotated.permute(1, 2, 0), out=logits[..., rows])
    weights = logits.mul_(scale).softmax(dim=-1)
    out = torch.zeros_like(q)
    for rows in blocks:
        out.baddbmm_(weights[..., rows], v[rows].double().transpose(0, 1))
    return out.flatten(0, 1)
