"""The whole pipeline in plain torch and torchdiffeq: the oracle, imported by tests and benchmarks only.

Nothing here is fast or clever, so that it can be checked by eye against the paper (Chen et al., ICLR 2024) and against
the authors' own numbers. Every function computes in the dtype of its first tensor: in fp32 it reproduces the authors'
results to their rounding, in fp64 it is the truth that kernels are compared with.

Letters: B batch, L query tokens, S key tokens, H query heads, G key/value heads, D head dim, R rotary pairs,
M width of the ODE's hidden layer, T length factors.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional
from torchdiffeq import odeint

from clex_kernels.config import ClexConfig


def plain_log_frequencies(config: ClexConfig, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """z(1) = -(i/R) ln b [R], ln(rad/token), by way of b^(i/R) as the authors' buffer `inv_freq` has it."""
    exponent = torch.arange(config.pairs, dtype=dtype, device=device) / config.pairs
    return torch.log(1.0 / config.rope_base**exponent)


def log_frequency_slope(t: Tensor, z: Tensor, up: Tensor, down: Tensor, config: ClexConfig) -> Tensor:
    """dz/dt = act((z + ntk(t)) @ up) @ down + xi(t), in (z, t) as the authors integrate it.

    ntk_i(t) = -(i/R) ln(n alpha^(R/(R-1))) and xi_i(t) = -(2i/(R-1)) / alpha, with alpha = 2t - 1.

    Args:
        t: length factor, scalar.
        z: [R] ln(rad/token).
        up: [R, M].
        down: [M, R].
        config: names n = ntk_base and the activation.
    """
    pairs = config.pairs
    i = torch.arange(pairs, dtype=z.dtype, device=z.device)
    alpha = 2 * t.to(z) - 1
    ntk = -(i / pairs) * torch.log(config.ntk_base * alpha ** (pairs / (pairs - 1)))
    activation = torch.tanh if config.activation == "tanh" else functional.silu
    return activation((z + ntk) @ up) @ down - (2 * i / (pairs - 1)) / alpha


def frequencies(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """Frequencies exp z(t) [T, R], rad/token, by torchdiffeq's "rk4" at `config.step_size`, differentiable.

    Each time ends a stretch of its own: torchdiffeq interpolates linearly between its steps, which is of second
    order only.

    Args:
        up: [R, M], its dtype is the one computed in.
        down: [M, R].
        times: [T] length factors >= 1, in any order, repeats allowed.
        config: everything else.
    """
    moments, index = torch.unique(times.to(up), return_inverse=True)
    time, z = torch.ones_like(moments[0]), plain_log_frequencies(config, up.dtype, up.device)
    solved = []
    for moment in moments:
        if moment > time:
            stretch = torch.stack((time, moment))
            z = odeint(
                lambda t, z: log_frequency_slope(t, z, up, down, config),
                z,
                stretch,
                method="rk4",
                options={"step_size": config.step_size},
            )[-1]
            time = moment
        solved.append(z)
    return torch.exp(torch.stack(solved))[index]


def tables(freq: Tensor, positions: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Full tables cos, sin [..., L, 2R] of positions x freq, each half repeated for rotate-half.

    Args:
        freq: [..., R] rad/token, its dtype is the one computed in.
        positions: [..., L] tokens, fractions allowed.
        amplitude: factor on both tables (YaRN's and LongRoPE's attention factor).
    """
    angle = positions.to(freq).unsqueeze(-1) * freq.unsqueeze(-2)
    angle = torch.cat((angle, angle), dim=-1)
    return amplitude * angle.cos(), amplitude * angle.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (x_i, x_(R+i)) of the first 2R channels; the others pass through.

    Args:
        x: [B, L, H, D].
        cos: [L, 2R] or [B, L, 2R], from `tables`.
        sin: like cos.
    """
    rotary_dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x), sin.unsqueeze(-2).to(x)
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    x0, x1 = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-x1, x0), dim=-1) * sin, passed), dim=-1)


def log_factor(lengths: Tensor, config: ClexConfig) -> Tensor:
    """Factor on queries [B], fp64: ln(length) / ln(train_length) under `config.log_scale`, else 1."""
    if not config.log_scale:
        return torch.ones(lengths.shape, dtype=torch.float64, device=lengths.device)
    factor = torch.log(lengths.double()) / math.log(config.train_length)
    return factor.clamp(min=1.0) if config.log_scale == "clamped" else factor


def visible(
    queries: int,
    keys: int,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | int = 0,
    kv_end: Tensor | int | None = None,
    q_offset: Tensor | int | None = None,
    k_offset: Tensor | int = 0,
) -> Tensor:
    """Mask [B or 1, L, S], true where a query sees a key.

    Key slot j counts if kv_start <= j < kv_end and stands at k_offset + j; query l stands at q_offset + l, by default
    such that the last query meets the last valid key. Causal: key <= query; window: query - window < key <= query.

    Args:
        queries: L.
        keys: S.
        is_causal: see above.
        window: tokens a query sees, itself included; implies causality.
        kv_start: first valid slot, int or [B].
        kv_end: end of the valid slots, int or [B]; None: S.
        q_offset: int or [B].
        k_offset: int or [B].
    """

    def column(value: Tensor | int) -> Tensor:
        return torch.as_tensor(value).cpu().reshape(-1, 1, 1)

    slot = torch.arange(keys).reshape(1, 1, -1)
    start, end = column(kv_start), column(keys if kv_end is None else kv_end)
    key = column(k_offset) + slot
    first = column(k_offset) + end - queries if q_offset is None else column(q_offset)
    query = first + torch.arange(queries).reshape(1, -1, 1)
    # the comparison with query widens the mask to [B or 1, L, S] even when nothing else depends on it.
    mask = (start <= slot) & (slot < end) & (query == query)
    if is_causal or window is not None:
        mask = mask & (key <= query)
    if window is not None:
        mask = mask & (query - window < key)
    return mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    query_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Naive softmax attention over rotated q and k, and its logarithm of the sum of exponentials.

    Args:
        q: [B, L, H, D].
        k: [B, S, G, D]; query head h reads key head h // (H / G).
        v: [B, S, G, D].
        mask: [B or 1, L, S] from `visible`; None: everything is seen.
        scale: of the logits; None: D^(-1/2).
        softcap: c in c tanh(logits / c); None: no cap.
        query_factor: [B] from `log_factor`.

    Returns:
        out [B, L, H, D], zero where a query sees no key, and lse [B, H, L], -inf there.
    """
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads_per_group, dim=2) for x in (k, v))
    if query_factor is not None:
        q = q * query_factor.to(q).reshape(-1, 1, 1, 1)
    logits = torch.einsum("blhd,bshd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        mask = mask.to(q.device).unsqueeze(1)
        logits = logits.masked_fill(~mask, -math.inf)
        # what a masked slot of a cache holds is nobody's business: 0 * NaN would leak it.
        v = v.masked_fill(~mask.any(dim=2).transpose(1, 2).unsqueeze(-1), 0.0)
    lse = torch.logsumexp(logits, dim=-1)
    # a row of -inf only would give NaN.
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    return torch.einsum("bhls,bshd->blhd", weights, v), lse


def sample_positions(length: int, t: float, train_length: int, generator: torch.Generator | None = None) -> Tensor:
    """The authors' training positions [L], fp64: uniform without replacement from [0, L t), sorted, both ends kept.

    They are divided by max(1, L // train_length), so that sequences longer than train_length cover the same range.
    (The authors put the last one at L t // divisor - 1, which is the same for divisor 1 but falls behind its
    neighbours for larger ones; here all are divided alike.)
    """
    span = math.floor(length * t)
    inner = torch.randperm(max(span - 2, 0), generator=generator)[: max(length - 2, 0)].sort().values + 1
    ends = torch.tensor([0, span - 1])
    positions = torch.cat((ends[:1], inner, ends[1:]))[:length]
    return positions.double() / max(1, length // train_length)
