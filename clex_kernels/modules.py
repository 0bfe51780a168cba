"""ClexRotaryEmbedding: the ODE's weights, and the tables they give; beside it ClexAttention, a layer that reads one.

Tables are looked up and built outside compiled regions, in methods that torch.compile does not enter, and travel into
them as arguments. A table that came out of an operator inside a compiled graph would be Inductor's to reuse: it writes
later results over op outputs it holds for dead, and so silently over the cache.

Training takes frequencies from `solve_frequencies`, with gradients; evaluation reads them off one cached solution over
all t (a trajectory), be it for one length, for all integer t or for one t per sequence, so that they are bit for bit
the same for a sequence alone and in any batch. The two agree to fp64 rounding.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clex_kernels.attention_layer import ClexAttention
from clex_kernels.config import ClexConfig, check_config, check_integer
from clex_kernels.frequencies import evaluate, solve_frequencies, trajectory
from clex_kernels.sampling import check_sampling, draw_positions, draw_times
from clex_kernels.tables import MAX_LENGTH, CacheStats, RotaryTable, RotaryTableStack, TableCache, weights_fingerprint
from clex_kernels.weights import OdeProjection, are_plain, check_device

__all__ = ["ClexAttention", "ClexRotaryEmbedding"]

_not_compiled = torch.compiler.disable(reason="clex_kernels: build rotary tables outside, pass them in as arguments")


class ClexRotaryEmbedding(nn.Module):
    """Rotary tables whose frequencies are a learned function of the length factor t.

    Parameters: proj_func.ode_up_proj [R, M] and proj_func.ode_down_proj [M, R], fp32 also under model.to(bfloat16) and
    autocast (fp64 after .double(), and then so are the tables). The authors' state dicts load; their buffer `inv_freq`
    is compared with `config.rope_base` and not kept.

    Evaluation tables are cached until the weights change. On the CPU every change is seen; elsewhere optimizer steps,
    load_state_dict, .to(...) and train() or eval() are, and after a write through `.data`, to inference tensors, by a
    collective or by a replayed CUDA graph `invalidate()` is the caller's to call.

    In training mode with grad enabled, tables carry frequencies with gradients to both weights.

    Args:
        config: all settings.
        device: of the weights.
        cache_bytes: budget of the cached tables, in bytes.
    """

    def __init__(self, config: ClexConfig, device: torch.device | str | None = None, cache_bytes: int = 256 << 20):
        super().__init__()
        check_config(config)
        check_device(device)
        self.config = config
        self.proj_func = OdeProjection(config, device)
        # with max_factor = 1 the solution would end where it starts and have no step to read.
        self._solved = replace(config, max_factor=max(config.max_factor, 2))
        self._cache = TableCache(cache_bytes)
        self._warned = False

    @property
    def device(self) -> torch.device:
        """Where weights and tables live."""
        return self.proj_func.ode_up_proj.device

    @_not_compiled
    def forward(self, length: int) -> RotaryTable:
        """The table for a sequence of `length` tokens, with t by the config's scale policy; cached.

        It holds all positions of its t, so a growing sequence meets one build per t. Past train_length * max_factor
        tokens, t stays (warned once) and the table doubles when it has to grow.

        Raises:
            TypeError: length is no int.
            ValueError: length is negative, or the weights are not finite.
        """
        length = check_integer("length", length)
        t = self.config.length_factor(length)
        room = max(round(t * self.config.train_length), self._room(length))
        freq, _, coarse, fine = self._cached(f"t = {t!r}", room, [t])
        return RotaryTable(freq[0], t, None, coarse[0], fine[0], **self._scale)

    @_not_compiled
    def stack(self, max_length: int | None = None) -> RotaryTableStack:
        """Tables of all integer t = 1 .. max_factor, cached; `stack.select(lengths)` picks one per sequence.

        That choice is the integer policy's, whatever the config says; `at` is its continuous counterpart.

        Args:
            max_length: positions each table holds at least; None: train_length * max_factor.
        """
        room = self._limit if max_length is None else self._room(check_integer("max_length", max_length))
        times = [float(t) for t in range(1, self.config.max_factor + 1)]
        freq, t, coarse, fine = self._cached("integers", room, times)
        return RotaryTableStack(freq, t, None, coarse, fine, **self._scale)

    @_not_compiled
    def at(self, lengths: Tensor, max_length: int | None = None) -> RotaryTableStack:
        """One table per sequence at its own continuous t = lengths / train_length in [1, max_factor]; no gradients.

        Computed on the device and never read back. Not cached: these t rarely return. Under the integer policy
        `stack` serves mixed lengths.

        Args:
            lengths: [B] int32 or int64, on the weights' device or the CPU.
            max_length: positions the tables hold; None: the longest of `lengths` where they are on the CPU, else
                train_length * max_factor. Rows past it are NaN in kernels.

        Raises:
            TypeError: lengths is no integer tensor.
            ValueError: lengths has another shape or device, or (on the CPU) a negative length.
        """
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths: expected an int32 or int64 tensor, got {getattr(lengths, 'dtype', lengths)}")
        if lengths.dim() != 1 or len(lengths) == 0 or lengths.device.type not in ("cpu", self.device.type):
            expected = f"shape [B], B >= 1, on {self.device} or the CPU"
            raise ValueError(f"lengths: expected {expected}, got {list(lengths.shape)} on {lengths.device}")
        room = self._limit if max_length is None else self._room(check_integer("max_length", max_length))
        if lengths.device.type == "cpu":
            shortest, longest = (int(value) for value in lengths.aminmax())
            check_integer("lengths", shortest)
            needed = self._room(longest)
            if max_length is None:
                room = needed
            elif longest > room:
                raise ValueError(f"max_length: expected at least the longest of lengths, {longest}, got {max_length}")
        with torch.inference_mode(False), torch.no_grad():
            t = lengths.to(self.device, torch.float64, non_blocking=True) / self.config.train_length
            t = t.clamp(1.0, self.config.max_factor)
            freq = self._evaluate(t, weights_fingerprint(*self._weights))
            index = torch.arange(len(t), device=self.device)
            return RotaryTableStack.from_frequencies(
                freq, t, length=room, index=index, dtype=self._dtype, **self._scale
            )

    @_not_compiled
    def sample(
        self,
        length: int,
        batch: int | None = None,
        generator: torch.Generator | None = None,
        positions: Literal["uniform", "runs"] = "uniform",
        factors: Literal["integer", "continuous"] = "integer",
        plain_share: float = 0.0,
    ) -> RotaryTable | RotaryTableStack:
        """A training step's table: t at random, and L = `length` positions at random from [0, L t).

        Positions are sorted, 0 and the last one kept, all divided by max(1, L // train_length). The host draws t and a
        seed, and a generator on the device draws the positions from it, so nothing waits. The draw depends on
        `generator` and the kind of device only.

        Args:
            length: L, tokens of a training sequence.
            batch: None for one RotaryTable with positions [L]; B for a RotaryTableStack with a t and positions [B, L]
                for every sequence, and index 0 .. B - 1.
            generator: on the CPU; None: torch's default one.
            positions: "uniform", the authors' draw without replacement; or "runs", 2 to 8 contiguous runs with random
                gaps, on which a toy model learned to extrapolate far better.
            factors: t uniform on the integers 1 .. max_factor, as the authors do; or on the interval [1, max_factor].
            plain_share: probability of t = 1 on top of that, in [0, 1]; 0.25 kept a toy model's quality at
                train_length.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range.
        """
        length = check_integer("length", length, least=1)
        if length * self.config.max_factor > MAX_LENGTH:
            expected = f"length * max_factor of at most {MAX_LENGTH}"
            raise ValueError(f"length: expected {expected}, got {length} * {self.config.max_factor}")
        count = 1 if batch is None else check_integer("batch", batch, least=1)
        check_sampling(generator, positions, factors, plain_share)
        times = draw_times(self.config, count, generator, factors, plain_share)
        drawn = draw_positions(self.config, length, times, generator, positions, self.device)
        distinct = sorted(set(times))
        freq = solve_frequencies(*self._weights, self._on_device(distinct), self.config)
        if batch is None:
            return RotaryTable.from_frequencies(
                freq[0], positions=drawn[0], t=times[0], dtype=self._dtype, **self._scale
            )
        place = self._on_device([distinct.index(t) for t in times])
        return RotaryTableStack.from_frequencies(
            # the backward of index_select adds in no fixed order on CUDA.
            freq[place],
            self._on_device(times),
            positions=drawn,
            index=torch.arange(count, device=self.device),
            dtype=self._dtype,
            **self._scale,
        )

    def invalidate(self) -> None:
        """Drop all cached tables; needed after a change of the weights that can't be seen (class docstring)."""
        self._cache.invalidate()

    def cache_stats(self) -> CacheStats:
        """Hits, misses, evictions, bytes and entries of the table cache."""
        return self._cache.stats()

    def train(self, mode: bool = True) -> "ClexRotaryEmbedding":
        """Switch between training and evaluation; drops cached tables."""
        self._cache.invalidate()
        return super().train(mode)

    def extra_repr(self) -> str:
        """The settings that matter most."""
        config = self.config
        return f"rotary_dim={config.rotary_dim}, train_length={config.train_length}, max_factor={config.max_factor}"

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.proj_func.ode_up_proj, self.proj_func.ode_down_proj

    @property
    def _dtype(self) -> torch.dtype:
        return self.proj_func.ode_up_proj.dtype

    @property
    def _scale(self) -> dict[str, Any]:
        return {"train_length": self.config.train_length, "log_scale": self.config.log_scale}

    @property
    def _limit(self) -> int:
        return self.config.train_length * self.config.max_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClexRotaryEmbedding":
        self._cache.invalidate()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._cache.invalidate()
        inv_freq = state_dict.pop(prefix + "inv_freq", None)
        if inv_freq is not None and not are_plain(inv_freq, self.config):
            *_, error_msgs = args
            error_msgs.append(
                f"{prefix}inv_freq: expected the {self.config.pairs} plain frequencies of"
                f" rope_base = {self.config.rope_base:g}, got others; the checkpoint belongs to another config"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _room(self, length: int) -> int:
        """Positions to hold for `length`: itself, or past the limit the limit doubled until it fits."""
        if length <= self._limit:
            return length
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{length} tokens are past train_length * max_factor = {self._limit}: positions go on, but the"
                f" frequencies stay those of t = {self.config.max_factor}",
                stacklevel=3,
            )
        return self._limit << ((length - 1) // self._limit).bit_length()

    def _on_device(self, values: list[float] | list[int]) -> Tensor:
        dtype = torch.float64 if isinstance(values[0], float) else torch.int64
        return torch.tensor(values, dtype=dtype, device="cpu").to(self.device, non_blocking=True)

    def _cached(self, key: str, length: int, times: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """freq [T, R], t [T], coarse [T, C, 2, R] and fine [T, F, 2, R]; in training freq carries gradients."""
        fingerprint = weights_fingerprint(*self._weights)

        def build() -> tuple[Tensor, ...]:
            t = self._on_device(times)
            freq = self._evaluate(t, fingerprint)
            stack = RotaryTableStack.from_frequencies(freq, t, length=length, dtype=self._dtype)
            return stack.freq, stack.t, stack.coarse, stack.fine

        freq, t, coarse, fine = self._cache.fetch(f"{key} {self.device}", length, fingerprint, build)
        if self.training and torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights):
            freq = solve_frequencies(*self._weights, t, self.config)
        return freq, t, coarse, fine

    def _evaluate(self, t: Tensor, fingerprint: int) -> Tensor:
        """Frequencies [T, R] at `t` [T], read off the one solution over all t, which is cached like a table."""
        nodes, polynomials = self._cache.fetch(
            f"trajectory {self.device}", 0, fingerprint, lambda: trajectory(*self._weights, self._solved)
        )
        return evaluate(nodes, polynomials, t)
