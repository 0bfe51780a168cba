"""An attention layer, forward and backward, by length: with CLEX, with frozen frequencies, and as transformers has it.

The layer is one of many: its table comes from outside, since t and positions are drawn and the ODE is solved once a
step for all layers (bench_training.py has that). CLEX is then sampled positions and gradients to the frequencies.

Outputs are checked at ROWS query rows of every input set; the gradient put in is zero in the others, so that all
gradients, also those to the weights, are checked in full. Peak memory is taken in the untimed first call of a way.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks import exact, formulations
from benchmarks.measure import Goal, Way, compare, errors_over_largest, peak_memory, record
from benchmarks.shapes import (
    LAYER_GOALS,
    LAYER_HEAD_DIM,
    LAYER_HEADS,
    LAYER_KV_HEADS,
    LAYER_LENGTHS,
    LAYER_WIDTH,
    MAX_FACTOR,
)
from benchmarks.weights import synthetic_weights
from clex_kernels import ClexAttention, ClexConfig, ClexRotaryEmbedding, RotaryTable, reference

SETS = 2
ROWS = 32
ROUNDS = {1 << 10: 11, 2 << 10: 9, 4 << 10: 5, 8 << 10: 3, 16 << 10: 1}
# of a bf16 gradient to the frequencies: what rounding dq and dk costs, times positions up to 16 L.
WRONG = 0.2
# fewer decide nothing: such a length is reported without goals.
ROUNDS_OF_A_GOAL = 3
DTYPE = torch.bfloat16
CLEX = "ClexAttention with CLEX: sampled t and positions, gradients to the frequencies"
FROZEN = "ClexAttention, frozen frequencies: plain RoPE, one fixed table"
EAGER = "transformers-style: eager rotate-half + SDPA, plain RoPE"
RESULTS = ("out", "dx", "dqkv", "do_proj", "dfreq")


class EagerLayer(nn.Module):
    """Attention as transformers has it: three projections, rotate-half, SDPA, one projection back."""

    def __init__(self, layer: ClexAttention):
        super().__init__()
        heads = [n * LAYER_HEAD_DIM for n in (LAYER_HEADS, LAYER_KV_HEADS, LAYER_KV_HEADS)]
        rows = layer.qkv_proj.weight.detach().split(heads)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
            for weight in (*rows, layer.o_proj.weight)
        )
        for linear, weight in zip(self.children(), (*rows, layer.o_proj.weight), strict=True):
            linear.weight.data.copy_(weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, LAYER_HEAD_DIM)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(formulations.sdpa_shared(q, k, v, cos, sin).flatten(-2))


class Case:
    """Layers with the same weights, inputs that alternate, and what is true of them."""

    def __init__(self, length: int, device: str):
        self.length, self.device = length, torch.device(device)
        self.config = ClexConfig(head_dim=LAYER_HEAD_DIM, train_length=length, max_factor=MAX_FACTOR)
        torch.manual_seed(8)
        self.layer = ClexAttention(
            self.config, LAYER_WIDTH, LAYER_HEADS, LAYER_KV_HEADS, device=self.device, dtype=DTYPE
        )
        self.eager = EagerLayer(self.layer)
        self.rope = ClexRotaryEmbedding(self.config)
        self.weights = synthetic_weights(self.config)
        with torch.no_grad():
            self.rope.proj_func.ode_up_proj.copy_(self.weights.up)
            self.rope.proj_func.ode_down_proj.copy_(self.weights.down)
        self.rope.to(self.device)
        self.plain = reference.plain_log_frequencies(self.config, torch.float64).exp()
        self.positions = torch.arange(length, dtype=torch.float64)
        self.inputs = [self.draw(seed) for seed in range(SETS)]
        self.x, self.dout = (torch.empty_like(x, device=self.device) for x in self.inputs[0][:2])
        self.x.requires_grad_()
        self.truths: dict[tuple[int, bool], dict[str, Tensor]] = {}

    def draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, the gradient of the output, and the rows where it is not zero."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, self.length, LAYER_WIDTH, generator=generator).to(DTYPE)
        rows = torch.randperm(self.length, generator=generator)[:ROWS].sort().values
        dout = torch.zeros_like(x)
        dout[:, rows] = torch.randn(1, ROWS, LAYER_WIDTH, generator=generator).to(DTYPE)
        return x, dout, rows

    def load(self, turn: int) -> None:
        self.seed = turn % SETS
        x, dout, _ = self.inputs[self.seed]
        with torch.no_grad():
            self.x.copy_(x)
        self.dout.copy_(dout)
        table = self.sample(self.seed)
        self.table = replace(table, freq=table.freq.detach().requires_grad_())

    def sample(self, seed: int) -> RotaryTable:
        return self.rope.sample(self.length, generator=torch.Generator().manual_seed(seed))

    def truth(self, seed: int, learns: bool) -> dict[str, Tensor]:
        if (seed, learns) in self.truths:
            return self.truths[seed, learns]
        freq, positions = self.plain, self.positions
        if learns:
            table = self.sample(seed)
            freq, positions = table.freq.cpu(), table.positions.cpu()
        x, dout, rows = self.inputs[seed]
        linears = (self.layer.qkv_proj, self.layer.o_proj)
        leaves = [
            leaf.detach().cpu().to(torch.float64, copy=True).requires_grad_()
            for leaf in (x, *(linear.weight for linear in linears), freq)
        ]
        x, qkv, o_proj, freq = leaves
        heads = (x @ qkv.T).unflatten(-1, (-1, LAYER_HEAD_DIM))
        q, k, v = heads.split((LAYER_HEADS, LAYER_KV_HEADS, LAYER_KV_HEADS), dim=-2)
        out = exact.attention(q, k, v, freq, positions, rows).flatten(-2) @ o_proj.T
        gradients = torch.autograd.grad(out, leaves, dout[:, rows].double())
        self.truths[seed, learns] = dict(zip(RESULTS, (out.detach(), *gradients), strict=False))
        return self.truths[seed, learns]

    def errors(self, learns: bool, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        out, dx, *weights = results
        found = dict(zip(RESULTS, (out[:, self.inputs[turn % SETS][2].to(self.device)], dx, *weights), strict=False))
        return errors_over_largest(found, self.truth(turn % SETS, learns))

    def way(self, name: str, forward: Callable[[], Tensor], weights: Callable[[], Sequence[Tensor]]) -> Way:
        """`weights` are what gradients are asked for besides x, at the moment of the call."""
        learns = name == CLEX

        def run() -> tuple[Tensor, ...]:
            out = forward()
            results = (out, *torch.autograd.grad(out, (self.x, *weights()), self.dout))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return results

        return Way(name, run, self.load, partial(self.errors, learns))

    def clex(self) -> Way:
        parameters = tuple(self.layer.parameters())
        return self.way(CLEX, lambda: self.layer(self.x, self.table), lambda: (*parameters, self.table.freq))

    def frozen(self) -> Way:
        table = RotaryTable.from_frequencies(self.plain.to(self.device), length=self.length)
        parameters = tuple(self.layer.parameters())
        return self.way(FROZEN, lambda: self.layer(self.x, table), lambda: parameters)

    def transformers_style(self) -> Way:
        # as a model's own rotary embedding makes them, once for all layers.
        cos, sin = (table.to(self.device, DTYPE) for table in reference.tables(self.plain, self.positions))
        parameters = tuple(self.eager.parameters())
        way = self.way(EAGER, lambda: self.eager(self.x, cos, sin), lambda: parameters)

        def errors(turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
            out, dx, *projections, do_proj = results
            return way.errors(turn, (out, dx, torch.cat(projections), do_proj))

        return Way(way.name, way.run, way.prepare, errors)


def length_name(length: int) -> str:
    return f"{length >> 10}K"


@pytest.mark.parametrize("length", LAYER_LENGTHS, ids=length_name)
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def bench_layer(benchmark: BenchmarkFixture, length: int, device: str) -> None:
    case = Case(length, device)
    peaks: dict[str, int] = {}

    def follow(way: Way) -> tuple[Tensor, ...]:
        results, peaks[way.name] = peak_memory(way.run, case.device)
        return results

    others = [case.frozen(), case.transformers_style()]
    result = compare(benchmark, case.clex(), others, rounds=ROUNDS[length], wrong=WRONG, first=follow)
    goals = [
        Goal(f"time over {name}", result.ratio(CLEX, way), "at most", bound)
        for (name, way), bound in zip(
            (("this package with frozen frequencies", FROZEN), ("the transformers-style layer with plain RoPE", EAGER)),
            LAYER_GOALS,
            strict=True,
        )
    ]
    sizes = f"C {LAYER_WIDTH}, H {LAYER_HEADS}, G {LAYER_KV_HEADS}, D {LAYER_HEAD_DIM}"
    record(
        benchmark,
        section="layer",
        row="attention layer, forward and backward",
        case=f"{device}, {length_name(length)} tokens, bf16",
        memory="torch's default allocator for all",
        weights=case.weights.kind,
        error_unit="largest error over largest exact value of that tensor",
        comparison=result,
        ours=CLEX,
        rivals=[EAGER],
        overhead=(CLEX, FROZEN),
        goals=goals if ROUNDS[length] >= ROUNDS_OF_A_GOAL else [],
        notes=[sizes, f"checked at {ROWS} query rows per input set, the gradient put in being zero in the others"],
        curves={"device": device, "peak_bytes": peaks},
        positions=length,
    )
