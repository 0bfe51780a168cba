"""The projection to rotated q and k, and v: weights, inputs, truths, and the ways to compute it.

Two sets of hidden states alternate. The weights are the same in every call, as a model's are, but before it other
memory is read, more than the CPU's caches hold: a layer of a model finds its weights cold.

The truth is computed for ROWS tokens of every input set, other ones in each, from the weights as rounded to the dtype.
The gradient put in is zero in all others, so that gradients to x, the weight and the frequencies are checked in full.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way, errors_over_largest
from benchmarks.shapes import CONFIG, MAX_FACTOR, ROTARY_DTYPES, ProjectionShape
from benchmarks.weights import synthetic_weights
from clex_kernels import ClexConfig, RotaryTable, qkv_rotary, reference

SETS = 2
ROWS = 64
OTHERS_BYTES = 96 << 20
TIME = torch.tensor([float(MAX_FACTOR)], dtype=torch.float64)
# the tokens are the last ones of the longest sequence: the first position rotates nothing.
LENGTH = MAX_FACTOR * CONFIG.train_length
OUTPUTS = ("q", "k", "v")
RESULTS = (*OUTPUTS, "dx", "dweight", "dfreq")

OURS = "qkv_rotary"
PLAIN = "qkv_rotary, plain RoPE"
FROZEN = "qkv_rotary, frozen frequencies"
FLOOR = "floor: one linear, nothing rotated"
THREE = "three linears, nothing rotated"

Project = Callable[..., Sequence[Tensor]]


class Projection:
    """A layer's random weights, and the frequencies of its heads: CLEX's at t = 16, plain RoPE's, and no rotation."""

    def __init__(self, shape: ProjectionShape, dtype: str):
        generator = torch.Generator().manual_seed(11)
        self.shape, self.dtype = shape, dtype

        def draw(*size: int, std: float) -> Tensor:
            return torch.empty(size, dtype=ROTARY_DTYPES[dtype]).normal_(std=std, generator=generator)

        self.weight = draw(*shape.weight, std=shape.C**-0.5)
        self.bias = draw(shape.weight[0], std=1.0) if shape.has_bias else None
        config = ClexConfig(shape.D, CONFIG.train_length, MAX_FACTOR, rotary_dim=2 * shape.R)
        weights = synthetic_weights(config)
        plain = reference.plain_log_frequencies(config, torch.float64).exp()
        self.kind = weights.kind
        self.freqs = {
            "clex": exact.solve_exactly(*weights.sets[0], TIME, config)[0],
            "plain": plain,
            "none": torch.zeros_like(plain),
        }


class InputSet:
    """x [1, M, C], the rows that are checked, gradients of q, k and v if it trains, and what is true of a kind."""

    def __init__(self, projection: Projection, tokens: int, trains: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        shape, dtype = projection.shape, ROTARY_DTYPES[projection.dtype]
        self.projection = projection
        self.x = torch.randn(1, tokens, shape.C, generator=generator).to(dtype)
        self.rows = torch.randperm(tokens, generator=generator)[:ROWS].sort().values
        self.douts: tuple[Tensor, ...] = ()
        if trains:
            self.douts = tuple(torch.zeros(1, tokens, heads, shape.D, dtype=dtype) for heads in shape.heads)
            for dout in self.douts:
                part = torch.randn(1, len(self.rows), *dout.shape[2:], generator=generator)
                dout[:, self.rows] = part.to(dtype)
        self.truths: dict[str, dict[str, Tensor]] = {}

    @functools.cached_property
    def raw(self) -> Tensor:
        """[1, n, H + 2G, D] in fp64, nothing rotated."""
        bias = self.projection.bias
        product = F.linear(
            self.x[:, self.rows].double(), self.projection.weight.double(), None if bias is None else bias.double()
        )
        return product.unflatten(-1, (sum(self.projection.shape.heads), -1))

    def truth(self, kind: str, positions: Tensor) -> dict[str, Tensor]:
        if kind not in self.truths:
            leaves = self.raw.requires_grad_(), self.projection.freqs[kind].clone().requires_grad_()
            q, k, v = leaves[0].split(self.projection.shape.heads, dim=-2)
            cos, sin = reference.tables(leaves[1], positions[self.rows])
            outs = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin), v
            results = [out.detach() for out in outs]
            if self.douts:
                results += self.gradients(outs, leaves)
            self.truths[kind] = dict(zip(RESULTS, results, strict=False))
        return self.truths[kind]

    def gradients(self, outs: tuple[Tensor, ...], leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """dx and dweight, and dfreq; in fp64."""
        dqkv, dfreq = torch.autograd.grad(outs, leaves, [dout[:, self.rows].double() for dout in self.douts])
        dqkv = dqkv[0].flatten(-2)
        dx = torch.zeros(self.x.shape, dtype=torch.float64)
        dx[:, self.rows] = dqkv @ self.projection.weight.double()
        return dx, dqkv.T @ self.x[0, self.rows].double(), dfreq


class Case:
    """Input sets and the tensors that every timed call reads; positions are sampled where it trains."""

    def __init__(self, projection: Projection, tokens: int, trains: bool = False, device: str = "cpu"):
        generator = torch.Generator().manual_seed(12)
        self.projection, self.shape = projection, projection.shape
        self.tokens, self.trains, self.device = tokens, trains, device
        self.name = f"{self.shape.name}, {projection.dtype}, {tokens:,} token{'s' * (tokens > 1)}"
        self.positions = torch.arange(LENGTH - tokens, LENGTH, dtype=torch.float64)
        if trains:
            self.positions = reference.sample_positions(tokens, float(MAX_FACTOR), tokens, generator)
        self.sets = [InputSet(projection, tokens, trains, seed) for seed in range(SETS)]
        self.x = torch.empty_like(self.sets[0].x, device=device).requires_grad_(trains)
        self.weight = projection.weight.detach().to(device).requires_grad_(trains)
        self.bias = None if projection.bias is None else projection.bias.to(device)
        # ones, because memory that was never written to need not lie anywhere.
        self.others = torch.ones(OTHERS_BYTES // 4, device=device)

    @property
    def operations(self) -> int:
        """Of the products of one forward pass: 2 M C (H + 2G) D."""
        return 2 * self.tokens * self.weight.numel()

    @property
    def weight_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def load(self, turn: int) -> None:
        drawn = self.sets[turn % SETS]
        self.others.sum()
        with torch.no_grad():
            self.x.copy_(drawn.x)
        self.douts = drawn.douts
        self.wait()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def errors(self, kind: str, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        drawn = self.sets[turn % SETS]
        found = dict(zip(RESULTS, results, strict=False))
        for name in OUTPUTS:
            found[name] = found[name][:, drawn.rows.to(self.device)]
        return errors_over_largest(found, drawn.truth(kind, self.positions))

    def way(self, name: str, kind: str, run: Project, *leaves: Tensor, every: int = 1) -> Way:
        """`run(x, *leaves)`, and where it trains the gradients to x, the weight and these."""

        def timed() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(self.trains):
                results = tuple(run(self.x, *leaves))
            if self.trains:
                results += torch.autograd.grad(results, (self.x, self.weight, *leaves), self.douts)
            self.wait()
            return results

        return Way(name, timed, self.load, partial(self.errors, kind), every)

    def ours(self, name: str, kind: str = "clex", learns: bool = False, backend: Any = "auto", every: int = 1) -> Way:
        """The table is made beforehand, except for frequencies that are learned."""
        freq, positions = (x.to(self.device) for x in (self.projection.freqs[kind], self.positions))
        heads = self.shape.H, self.shape.G, self.bias

        def learned(x: Tensor, freq: Tensor) -> tuple[Tensor, ...]:
            return qkv_rotary(x, self.weight, RotaryTable.from_frequencies(freq, positions=positions), *heads)

        if learns:
            return self.way(name, kind, learned, freq.clone().requires_grad_(), every=every)
        if self.trains:
            table, offset = RotaryTable.from_frequencies(freq, positions=positions), 0
        else:
            table, offset = RotaryTable.from_frequencies(freq, length=LENGTH), LENGTH - self.tokens

        def fixed(x: Tensor) -> tuple[Tensor, ...]:
            return qkv_rotary(x, self.weight, table, *heads, offset=offset, backend=backend)

        return self.way(name, kind, fixed, every=every)

    def linear(self) -> Way:
        operands = self.weight, self.bias, self.shape.heads
        return self.way(FLOOR, "none", lambda x: formulations.project(x, *operands))

    def three_linears(self, every: int) -> Way:
        rows = [heads * self.shape.D for heads in self.shape.heads]
        operands = self.weight.split(rows), None if self.bias is None else self.bias.split(rows), self.shape.heads
        return self.way(THREE, "none", lambda x: formulations.project_apart(x, *operands), every=every)

    def rivals(self, every: int, count: int) -> list[Way]:
        """So many of the four, the first in transformers' way; cos and sin are made beforehand."""
        operands = self.weight, self.bias, self.shape.heads
        doubled = [table.to(self.x.dtype) for table in reference.tables(self.projection.freqs["clex"], self.positions)]
        single = [table.float() for table in exact.cos_sin(self.positions, self.projection.freqs["clex"])]
        in_place = formulations.compiled_whole(formulations.split_halves_in_place)
        together = formulations.compiled_whole(formulations.project_split_halves)
        fresh = formulations.for_q_and_k(formulations.split_halves, compiled=True)

        def linear_in_place(x: Tensor) -> Sequence[Tensor]:
            qkv = F.linear(x, self.weight, self.bias).unflatten(-1, (sum(self.shape.heads), -1))
            in_place(qkv[:, :, : self.shape.H + self.shape.G, : 2 * self.shape.R], *single)
            return qkv.split(self.shape.heads, dim=-2)

        def linear_fresh(x: Tensor) -> Sequence[Tensor]:
            q, k, v = formulations.project(x, *operands)
            return *fresh(q, k, *single), v

        runs: dict[str, Project] = {
            "linear + eager rotate-half (transformers)": lambda x: formulations.project_rotate_half(
                x, *operands, *doubled
            ),
            "linear + torch.compile split halves, in place": linear_in_place,
            "torch.compile of linear and split halves together": lambda x: together(x, *operands, *single),
            "linear + torch.compile split halves, fresh": linear_fresh,
        }
        return [self.way(name, "clex", run, every=every) for name, run in list(runs.items())[:count]]

    def training_rivals(self, every: int) -> list[Way]:
        """From frequencies that want a gradient, and the sampled positions."""
        freq, positions = (x.float() for x in (self.projection.freqs["clex"], self.positions))
        leaf, operands = freq.requires_grad_(), (self.weight, self.bias, self.shape.heads)

        def eager(x: Tensor, freq: Tensor) -> Sequence[Tensor]:
            return formulations.project_rotate_half(x, *operands, *reference.tables(freq, positions))

        def compiled(x: Tensor, freq: Tensor, form: formulations.Formulation) -> Sequence[Tensor]:
            q, k, v = formulations.project(x, *operands)
            return *formulations.with_frequencies(form, compiled=True)(q, k, freq, positions), v

        runs: dict[str, Project] = {
            "linear + eager rotate-half (transformers)": eager,
            "linear + torch.compile rotate-half": partial(compiled, form=formulations.rotate_half),
            "linear + torch.compile split halves": partial(compiled, form=formulations.split_halves),
        }
        return [self.way(name, "clex", run, leaf, every=every) for name, run in runs.items()]
