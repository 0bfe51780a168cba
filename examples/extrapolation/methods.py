"""Rotary methods: a rule for the frequencies at a length factor t, and where training puts the tokens.

With R pairs, i = 0 .. R - 1, and plain RoPE's freq_i = b^(-i/R) rad/token:

- rope: freq_i at every t.
- linear (position interpolation): freq_i / t.
- ntk: freq_i (2t - 1)^(-i/(R-1)), "dynamic NTK" with factor 2, and CLEX's frequencies while its ODE adds nothing.
- yarn: between the two by wavelength, pairs that turn more than 32 times within train_length as in rope, fewer than
  once as in linear; cosines and sines times 0.1 ln t + 1.
- clex: the ODE's.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from clex_kernels import ClexConfig, ClexRotaryEmbedding, RotaryTable, RotaryTableStack
from clex_kernels.weights import plain_frequencies
from examples.extrapolation.settings import Tuning

Rule = Literal["rope", "linear", "ntk", "yarn", "clex"]
YARN_FAST, YARN_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned.

    rule: for the frequencies. positions: "plain" are 0 .. L - 1; "runs" and "uniform" as in
    ClexRotaryEmbedding.sample. fixed: frequencies of t = max_factor throughout, else of each sequence's own t.
    """

    name: str
    rule: Rule
    positions: Literal["plain", "runs", "uniform"]
    fixed: bool = False

    @property
    def learns(self) -> bool:
        """Whether the ODE is trained."""
        return self.rule == "clex"


METHODS = (
    Method("RoPE", "rope", "plain"),
    Method("linear, factor 16", "linear", "plain", fixed=True),
    Method("YaRN, factor 16", "yarn", "plain", fixed=True),
    Method("RoPE, runs", "rope", "runs"),
    Method("linear by t, runs", "linear", "runs"),
    Method("YaRN by t, runs", "yarn", "runs"),
    Method("ODE off, uniform", "ntk", "uniform"),
    Method("CLEX, uniform", "clex", "uniform"),
    Method("ODE off, runs", "ntk", "runs"),
    Method("CLEX, runs", "clex", "runs"),
)
# where the model stays as it was trained at train_length.
UNTUNED = Method("no fine-tuning", "rope", "plain")
ODE_ALONE = Method("CLEX, ODE alone", "clex", "runs")
ODE_ALONE_SLOW = Method("CLEX, ODE alone, slow", "clex", "runs")


def frequencies(rule: Rule, t: float, config: ClexConfig) -> tuple[Tensor, float]:
    """Frequencies [R] fp64 at length factor t, rad/token, and what cosines and sines are multiplied by."""
    plain = plain_frequencies(config)
    if rule == "rope" or t == 1:
        return plain, 1.0
    if rule == "linear":
        return plain / t, 1.0
    if rule == "ntk":
        exponents = torch.arange(config.pairs, dtype=torch.float64) / (config.pairs - 1)
        return plain * (2 * t - 1) ** -exponents, 1.0
    if rule == "yarn":
        return _yarn(plain, t, config), 0.1 * math.log(t) + 1
    raise ValueError(f"rule: expected 'rope', 'linear', 'ntk' or 'yarn', got {rule!r}")


def _yarn(plain: Tensor, t: float, config: ClexConfig) -> Tensor:
    def pair_of(turns: float) -> float:
        wavelength = config.train_length / turns
        return config.pairs * math.log(wavelength / (2 * math.pi)) / math.log(config.rope_base)

    first, last = max(math.floor(pair_of(YARN_FAST)), 0), min(math.ceil(pair_of(YARN_SLOW)), config.pairs - 1)
    ramp = ((torch.arange(config.pairs, dtype=torch.float64) - first) / max(last - first, 1)).clamp(0, 1)
    return plain / t * ramp + plain * (1 - ramp)


def plain_table(config: ClexConfig, length: int) -> RotaryTable:
    """Plain RoPE at positions 0 .. length - 1."""
    return RotaryTable.from_frequencies(plain_frequencies(config), length=length, train_length=config.train_length)


class Rotary(nn.Module):
    """A method's tables: for a training batch, and for a length. Its parameters are the ODE's, used by CLEX alone."""

    def __init__(self, tuning: Tuning, method: Method):
        super().__init__()
        self.tuning, self.method, self.config = tuning, method, tuning.config()
        self.clex = ClexRotaryEmbedding(self.config)
        if tuning.ode.down_std and method.learns:
            nn.init.normal_(self.clex.proj_func.ode_down_proj, std=tuning.ode.down_std)
        self.requires_grad_(method.learns)

    def sample(self, batch: int, generator: torch.Generator) -> RotaryTable | RotaryTableStack:
        """A training step's table. Draws of t and positions are the same for all methods with the same positions."""
        length, method = self.config.train_length, self.method
        if method.positions == "plain":
            return self.at(length)
        table = self.clex.sample(
            length,
            batch if self.tuning.per_sequence else None,
            generator,
            positions=method.positions,
            factors=self.tuning.factors,
            plain_share=self.tuning.plain_share,
        )
        if method.rule == "clex":
            return table
        if isinstance(table, RotaryTable):
            freq, amplitude = self._rule(table.t)
            return RotaryTable.from_frequencies(freq, positions=table.positions, amplitude=amplitude, t=table.t)
        rows = [self._rule(t) for t in table.t.tolist()]
        stack = RotaryTableStack.from_frequencies(
            torch.stack([freq for freq, _ in rows]), table.t, positions=table.positions, index=table.index
        )
        # a stack has one amplitude, these rows each their own.
        amplitudes = torch.tensor([amplitude for _, amplitude in rows])
        return replace(stack, coarse=stack.coarse * amplitudes[:, None, None, None])

    def at(self, length: int, rule: Rule | None = None, log_scale: bool = False) -> RotaryTable:
        """The table for `length` contiguous tokens, under the method's rule or another that needs no training."""
        rule = rule or self.method.rule
        if rule == "clex":
            table = self.clex(length)
        else:
            t = self.config.length_factor(length)
            freq, amplitude = self._rule(t, rule)
            table = RotaryTable.from_frequencies(
                freq, length=length, amplitude=amplitude, t=t, train_length=self.config.train_length
            )
        return replace(table, log_scale="clamped") if log_scale else table

    def _rule(self, t: float, rule: Rule | None = None) -> tuple[Tensor, float]:
        t = float(self.config.max_factor) if self.method.fixed else t
        return frequencies(rule or self.method.rule, t, self.config)
