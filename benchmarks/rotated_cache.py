"""The other way to decode with CLEX: a cache of rotated keys, and how far its results drift as t changes.

A key at position p was rotated by p freq. When t changes, and freq with it, the cache may be turned on by
p (new freq - old freq), which rounds every key once more, or be left as it is, which mixes frequencies in one cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import exact
from benchmarks.measure import max_difference
from benchmarks.weights import synthetic_weights
from clex_kernels import ClexConfig, RotaryTable, apply_rotary, decode_attention

DRIFT_CONFIG = ClexConfig(head_dim=128, train_length=256, max_factor=16)
DRIFT_STEP = 64
HEADS, KV_HEADS = 16, 4
# by what the plot calls them.
STALE = "rotated once (today's engines)"
TURNED = "re-rotated at each new t, bf16"
RAW = "raw keys, rotated on load (this package)"


class RotatedCache:
    """Keys [B, S, G, D], rotated as they come by the frequencies of that moment; `turns`: and again at each new t."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, freq: Tensor, turns: bool = True):
        self.keys = torch.zeros(shape, dtype=dtype)
        self.freq, self.turns = freq, turns
        self.length = 0

    def append(self, keys: Tensor) -> None:
        """Raw keys [B, n, G, D] of the next n tokens."""
        start, self.length = self.length, self.length + keys.shape[1]
        self.keys[:, start : self.length] = keys
        self._rotate(self.freq, start)

    def change(self, freq: Tensor) -> None:
        """The frequencies [R] of a new t."""
        if self.turns:
            self._rotate(freq - self.freq, 0)
        self.freq = freq

    def _rotate(self, freq: Tensor, start: int) -> None:
        dtype = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
        table = RotaryTable.from_frequencies(freq, length=self.length, dtype=dtype)
        apply_rotary(self.keys[:, start : self.length], None, table, offset=start, inplace=True)


@dataclass(frozen=True)
class Drift:
    """By kind of cache, the largest error of a decode step's output over its largest exact value, at `tokens` cached.

    t changes where the cache holds more than `changes` tokens.
    """

    tokens: list[int]
    changes: list[int]
    errors: dict[str, list[float]]


def measure_drift(config: ClexConfig = DRIFT_CONFIG, step: int = DRIFT_STEP) -> Drift:
    """Random keys and queries, a bf16 cache that grows by `step` tokens at a time up to the config's limit.

    Every output is computed by decode_attention, over keys as each cache holds them.
    """
    weights, limit = synthetic_weights(config), config.train_length * config.max_factor
    times = torch.arange(1, config.max_factor + 1, dtype=torch.float64)
    freqs = exact.solve_exactly(*weights.sets[0], times, config)
    generator = torch.Generator().manual_seed(9)
    k, v = torch.randn(2, 1, limit, KV_HEADS, config.head_dim, generator=generator).bfloat16()
    caches = {name: RotatedCache(tuple(k.shape), k.dtype, freqs[0], name == TURNED) for name in (STALE, TURNED)}
    drift = Drift([], list(range(config.train_length, limit, config.train_length)), {STALE: [], TURNED: [], RAW: []})
    for end in range(step, limit + 1, step):
        freq = freqs[(end - 1) // config.train_length]
        table = RotaryTable.from_frequencies(freq, length=end)
        q = torch.randn(1, 1, HEADS, config.head_dim, generator=generator).bfloat16()
        true = exact.decode(q[0, 0], k[0, :end], v[0, :end], freq)
        held = {RAW: (k, "none")}
        for name, cache in caches.items():
            if not torch.equal(freq, cache.freq):
                cache.change(freq)
            cache.append(k[:, cache.length : end])
            held[name] = cache.keys, "k"
        for name, (keys, rotated) in held.items():
            out = decode_attention(q, keys, v, table, torch.tensor([end]), rotated=rotated)
            drift.errors[name].append(max_difference(out[0, 0], true) / true.abs().max().item())
        drift.tokens.append(end)
    return drift
