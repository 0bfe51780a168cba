"""Frequencies and amplitude of transformers' RoPE types by a sequence's length, in fp64, from a model's own settings.

R pairs, i = 0 .. R-1, b = rope_theta, L0 the length of training (original_max_position_embeddings; for "dynamic"
max_position_embeddings), s = factor, plain_i = b^(-i/R). Each type is its paper's, with transformers' conventions:

    default    plain_i
    linear     plain_i / s
    dynamic    plain_i alpha^(-i/(R-1)),  alpha = max(1, s length / L0 - (s - 1))      NTK-aware, by length
    yarn       plain_i (1 - ramp_i) + plain_i ramp_i / s, ramp from beta_fast to beta_slow turns in L0 tokens
    llama3     plain_i / s for wavelengths over L0 / low_freq_factor, plain_i under L0 / high_freq_factor, and in
               between a mixture linear in L0 / wavelength
    longrope   plain_i / short_factor_i up to L0 tokens, plain_i / long_factor_i beyond

yarn and longrope multiply cosines and sines by an amplitude, `attention_factor` or what the papers derive from s;
PhiMoE's longrope by `short_mscale` and `long_mscale`. (transformers' PhiMoE takes short_factor at any length, since it
asks for its frequencies without saying one.)
"""

import math
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from clex_kernels.tables import RotaryTableStack, on_host

__all__ = ["ROPE_TYPES", "RopeFrequencies", "read_dims"]


class _Sets(NamedTuple):
    """Frequencies [T, R] and amplitudes [T]; T = 1, or 2, of which sequences over `switch` tokens take the second."""

    freq: Tensor
    amplitude: tuple[float, ...] = (1.0,)
    switch: float | None = None


class _Settings(NamedTuple):
    """What a type may look at: the model's, its parameters, the rotary dimension 2R, and max_position_embeddings."""

    model_type: str
    parameters: Mapping[str, Any]
    rotary_dim: int
    longest: int

    @property
    def plain(self) -> Tensor:
        """[R]."""
        pairs = self.rotary_dim // 2
        return self.base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)

    @property
    def base(self) -> float:
        """b."""
        return self.number("rope_theta", above=1.0)

    @property
    def trained(self) -> float:
        """L0."""
        return self.number("original_max_position_embeddings", self.longest, above=1.0)

    @property
    def factor(self) -> float:
        """s; where a checkpoint leaves it out, how much longer than L0 its sequences may be."""
        return self.number("factor", self.longest / self.trained)

    def number(self, name: str, default: float | None = None, above: float = 0.0) -> float:
        """A parameter; where a checkpoint leaves it out, `default`."""
        value = self.parameters.get(name)
        value = default if value is None else value
        if not _is_number(value) or not above < value < math.inf:
            raise ValueError(f"rope_parameters[{name!r}]: expected a finite number > {above:g}, got {value!r}")
        return float(value)

    def numbers(self, name: str) -> Tensor:
        """[R] numbers of a parameter."""
        values, pairs = self.parameters.get(name), self.rotary_dim // 2
        if not isinstance(values, (list, tuple)) or len(values) != pairs:
            got = f"{len(values)} of them" if isinstance(values, (list, tuple)) else repr(values)
            raise ValueError(f"rope_parameters[{name!r}]: expected R={pairs} numbers, got {got}")
        if not all(_is_number(value) and 0.0 < value < math.inf for value in values):
            raise ValueError(f"rope_parameters[{name!r}]: expected finite numbers > 0, got {list(values)}")
        return torch.tensor(values, dtype=torch.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _default(settings: _Settings) -> _Sets:
    return _Sets(settings.plain[None])


def _linear(settings: _Settings) -> _Sets:
    return _Sets(settings.plain[None] / settings.number("factor"))


def _yarn(settings: _Settings) -> _Sets:
    parameters, plain, factor = settings.parameters, settings.plain, settings.factor
    pairs = len(plain)

    def pair_of(turns: float) -> float:
        """Which pair, as a real number, makes so many turns in L0 tokens."""
        return pairs * math.log(settings.trained / (turns * 2 * math.pi)) / math.log(settings.base)

    # 0 counts as left out.
    slowest = settings.number("beta_slow", 1.0) if parameters.get("beta_slow") else 1.0
    first, last = pair_of(settings.number("beta_fast", 32.0)), pair_of(slowest)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    # transformers' bounds; a ramp of no width is a step.
    first, last = max(first, 0), min(last, settings.rotary_dim - 1)
    width = last - first or 1e-3
    ramp = ((torch.arange(pairs, dtype=torch.float64) - first) / width).clamp(0, 1)
    return _Sets((plain * (1 - ramp) + plain / factor * ramp)[None], (_yarn_amplitude(settings),))


def _yarn_amplitude(settings: _Settings) -> float:
    parameters, factor = settings.parameters, settings.factor

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    derived = scaled(1.0)
    # a weight of 0 counts as none.
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        derived = scaled(settings.number("mscale")) / scaled(settings.number("mscale_all_dim"))
    return settings.number("attention_factor", derived)


def _llama3(settings: _Settings) -> _Sets:
    plain, factor = settings.plain, settings.number("factor")
    low, high = (settings.number(f"{end}_freq_factor") for end in ("low", "high"))
    if high <= low:
        raise ValueError(f"rope_parameters['high_freq_factor']: expected more than low_freq_factor={low}, got {high}")
    turns = settings.trained * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return _Sets((plain * smooth + plain / factor * (1 - smooth))[None])


def _longrope(settings: _Settings) -> _Sets:
    trained, factor = settings.trained, settings.factor
    freq = torch.stack([settings.plain / settings.numbers(f"{name}_factor") for name in ("short", "long")])
    derived = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    amplitude = settings.number("attention_factor", derived)
    if settings.model_type == "phimoe":
        return _Sets(freq, (settings.number("short_mscale"), settings.number("long_mscale")), trained)
    return _Sets(freq, (amplitude, amplitude), trained)


def read_dims(config: PreTrainedConfig) -> tuple[int, int]:
    """D and 2R of a model's heads."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim, int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


_SETS: dict[str, Callable[[_Settings], _Sets]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    # whose one set is that of sequences up to L0.
    "dynamic": _default,
}
ROPE_TYPES = tuple(_SETS)


class RopeFrequencies:
    """The tables of sequences by their lengths, for a model's RoPE.

    Args:
        config: the model's, with one set of rope_parameters for all layers.
        dtype: of the tables, fp32 or fp64.

    Raises:
        ValueError: the type is unknown, or a parameter is missing or does not fit.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype = torch.float32):
        parameters = getattr(config, "rope_parameters", None) or {}
        self.rope_type = parameters.get("rope_type")
        if self.rope_type not in _SETS:
            hint = "; use apply_clex" if self.rope_type == "clex" else ""
            raise ValueError(
                f"rope_parameters: expected one rope_type of {', '.join(ROPE_TYPES)} for all layers, got"
                f" {self.rope_type or parameters!r}{hint}"
            )
        if config.model_type == "phimoe" and self.rope_type not in ("default", "longrope"):
            raise ValueError(
                f"rope_parameters: expected rope_type default or longrope for PhiMoE, got {self.rope_type!r}"
            )
        head_dim, rotary_dim = read_dims(config)
        settings = _Settings(config.model_type, parameters, rotary_dim, config.max_position_embeddings)
        least = 4 if self.rope_type == "dynamic" else 2
        if rotary_dim % 2 or not least <= rotary_dim <= head_dim:
            raise ValueError(
                f"rope_parameters: expected an even rotary dimension, {least} to D={head_dim}, for rope_type"
                f" {self.rope_type!r}, got {rotary_dim}"
            )
        self._sets = _SETS[self.rope_type](settings)
        self._factor = settings.number("factor") if self.rope_type == "dynamic" else 1.0
        self._longest = config.max_position_embeddings
        self._dtype = dtype
        self._freq = {torch.device("cpu"): self._sets.freq}
        self._kept: dict[torch.device, RotaryTableStack] = {}

    def to(self, dtype: torch.dtype) -> "RopeFrequencies":
        """The same with tables in `dtype`."""
        if dtype == self._dtype:
            return self
        other = copy(self)
        other._dtype, other._kept = dtype, {}
        return other

    @property
    def changes_once(self) -> bool:
        """Whether a sequence that grows meets one change of its frequencies."""
        return self._sets.switch is not None

    @property
    def moves(self) -> bool:
        """Whether frequencies change with length."""
        return self.rope_type == "dynamic" or self.changes_once

    def state(self, lengths: Tensor) -> Tensor:
        """[B] int64, equal where frequencies are, for lengths [B]."""
        lengths = lengths.long()
        if self.rope_type == "dynamic":
            return lengths.clamp(min=self._longest)
        return torch.zeros_like(lengths) if self._sets.switch is None else (lengths > self._sets.switch).long()

    def at(self, lengths: Tensor, most: int) -> RotaryTableStack:
        """Tables for sequences of these lengths [B], integers on any device, and positions 0 .. most - 1.

        Nothing waits for the device, but where tables that are kept are built or have to grow.
        """
        if self.rope_type != "dynamic" or self._are_short(lengths):
            stack = self._fixed(lengths.device, most)
            return stack if self._sets.switch is None else replace(stack, index=self.state(lengths))
        t = self.state(lengths).double() / self._longest
        pairs = self._sets.freq.shape[1]
        exponent = torch.arange(pairs, dtype=torch.float64, device=lengths.device) / (pairs - 1)
        alpha = self._factor * t - (self._factor - 1)
        freq = self._freq_on(lengths.device) * alpha[:, None] ** -exponent
        return RotaryTableStack.from_frequencies(freq, t, length=most, dtype=self._dtype)

    def _are_short(self, lengths: Tensor) -> bool:
        """Whether none is past L0, as far as that can be seen for nothing."""
        return on_host(lengths) and lengths.numel() > 0 and int(lengths.max()) <= self._longest

    def _fixed(self, device: torch.device, most: int) -> RotaryTableStack:
        """The sets' tables for at least `most` positions, kept."""
        stack = self._kept.get(device)
        if stack is None or stack.length < most:
            room = max(self._longest, 1 << (most - 1).bit_length()) if most else self._longest
            freq = self._freq_on(device)
            t = torch.ones(len(freq), dtype=torch.float64, device=device)
            amplitude = torch.tensor(self._sets.amplitude, dtype=torch.float64, device=device)
            stack = RotaryTableStack.from_frequencies(freq, t, length=room, amplitude=amplitude, dtype=self._dtype)
            self._kept[device] = stack
        return stack

    def _freq_on(self, device: torch.device) -> Tensor:
        """Frequencies of the sets [T, R], copied to a device once."""
        if device not in self._freq:
            self._freq[device] = self._sets.freq.to(device)
        return self._freq[device]
