"""An attention layer, forward and backward, and its decode step: with CLEX, with frozen frequencies, without CLEX.

transformers' way is here one packed projection, rotate-half, SDPA and the output projection, with plain RoPE. Training
steps are checked at some query rows, the gradient put in being zero in the others.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way
from benchmarks.on_gpu import angles
from benchmarks.on_gpu.case import SETS, WRONG_DFREQ, Aim, Bench, Case, draw, errors_of, sampled_rows
from benchmarks.on_gpu.decode_cases import layout
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost, size_of
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.shapes import LAYER_GOALS, MAX_FACTOR, DecodeShape, ProjectionShape
from clex_kernels import ClexAttention, RotaryTable, append_kv, apply_rotary, decode_attention, qkv_rotary, reference

DTYPE = torch.bfloat16
CLEX = "ClexAttention with CLEX"
FROZEN = "ClexAttention, frozen frequencies: plain RoPE"
EAGER = "eager rotate-half + SDPA (transformers), plain RoPE"
COMPILED = "torch.compile of the same"
RESULTS = ("out", "dx", "dqkv", "do_proj", "dfreq")


def make_layer(gpu: Gpu, shape: ProjectionShape) -> ClexAttention:
    config = angles.weights_of(shape.D, shape.R).config
    layer = ClexAttention(config, shape.C, shape.H, shape.G, device=gpu.device, dtype=DTYPE)
    generator = torch.Generator(gpu.device).manual_seed(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return layer


class Training:
    """Hidden states on the device, the layer, and what is true with CLEX and with plain RoPE."""

    def __init__(self, gpu: Gpu, shape: ProjectionShape, length: int, rows: int):
        self.gpu, self.shape, self.length = gpu, shape, length
        self.layer = make_layer(gpu, shape)
        self.parameters = (self.layer.qkv_proj.weight, self.layer.o_proj.weight)
        self.rows_of = sampled_rows(gpu, length, rows)
        sizes = ((1, length, shape.C), (1, rows, shape.C))
        self.sets = [draw(gpu, seed, *sizes, dtype=DTYPE) for seed in range(SETS)]
        self.x = torch.empty_like(self.sets[0][0]).requires_grad_()
        self.dout = torch.zeros_like(self.x, requires_grad=False)
        generator = torch.Generator().manual_seed(7)
        sampled = reference.sample_positions(length, float(MAX_FACTOR), length, generator)
        self.angles = {
            kind: (angles.frequencies(kind, shape.D, shape.R).to(gpu.device), positions.to(gpu.device))
            for kind, positions in (("clex", sampled), ("plain", torch.arange(length, dtype=torch.float64)))
        }
        self.truths: dict[tuple[str, int], dict[str, Tensor]] = {}

    def load(self, turn: int) -> None:
        x, dout = self.sets[turn % SETS]
        with torch.no_grad():
            self.x.copy_(x)
        self.dout.zero_()
        self.dout[:, self.rows_of[turn % SETS]] = dout

    def truth(self, kind: str, turn: int) -> dict[str, Tensor]:
        key = kind, turn % SETS
        if key not in self.truths:
            freq, positions = self.angles[kind]
            x, dout = self.sets[key[1]]
            leaves = [leaf.detach().double().requires_grad_() for leaf in (x, *self.parameters, freq)]
            x, qkv, o_proj, freq = leaves
            heads = (x @ qkv.T).unflatten(-1, (-1, self.shape.D))
            q, k, v = heads.split(self.shape.heads, dim=-2)
            out = exact.attention(q, k, v, freq, positions, self.rows_of[key[1]]).flatten(-2) @ o_proj.T
            gradients = torch.autograd.grad(out, leaves, dout.double())
            self.truths[key] = dict(zip(RESULTS, (out.detach(), *gradients), strict=True))
        return self.truths[key]

    def errors(self, kind: str, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        found = dict(zip(RESULTS, results, strict=False))
        found["out"] = found["out"][:, self.rows_of[turn % SETS]]
        return errors_of(found, self.truth(kind, turn))

    def way(self, name: str, kind: str, forward: Callable[[Tensor], Tensor], *leaves: Tensor) -> Way:
        """Gradients to x, to both weights and to these."""

        def run() -> tuple[Tensor, ...]:
            out = forward(self.x)
            return (out, *torch.autograd.grad(out, (self.x, *self.parameters, *leaves), self.dout))

        return Way(name, run, self.load, partial(self.errors, kind))

    def clex(self) -> Way:
        """The table is made once a step for all layers: not here."""
        freq, positions = self.angles["clex"]
        leaf = freq.clone().requires_grad_()
        table = RotaryTable.from_frequencies(leaf, positions=positions)
        return self.way(CLEX, "clex", lambda x: self.layer(x, table), leaf)

    def frozen(self) -> Way:
        table = RotaryTable.from_frequencies(self.angles["plain"][0], length=self.length)
        return self.way(FROZEN, "plain", lambda x: self.layer(x, table))

    def without_clex(self, name: str, compiled: bool) -> Rival:
        tables = angles.doubled_tables(*self.angles["plain"], DTYPE)
        heads = self.shape.heads

        def forward(x: Tensor, qkv: Tensor, o_proj: Tensor) -> Tensor:
            q, k, v = formulations.project_rotate_half(x, qkv, None, heads, *tables)
            return F.linear(formulations.bare_sdpa(q, k, v).flatten(-2), o_proj)

        def make() -> Way:
            apply = torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward
            return self.way(name, "plain", lambda x: apply(x, *self.parameters))

        return Rival(name, make)

    @property
    def cost(self) -> Cost:
        """Products of linears once forward and twice backward, of attention twice and five times; every weight and its
        gradient, and what passes between the parts.
        """
        shape, tokens = self.shape, self.length
        linears = 2 * tokens * sum(parameter.numel() for parameter in self.parameters)
        products = tokens**2 * shape.H * shape.D
        between = tokens * (2 * shape.C + shape.weight[0] + shape.H * shape.D) * DTYPE.itemsize
        return Cost(3 * (size_of(*self.parameters) + between), 3 * linears + 7 * products)


def training(shape: ProjectionShape, length: int, rows: int, gpu: Gpu) -> Bench:
    case = Training(gpu, shape, length, rows)
    over_frozen, over_eager = LAYER_GOALS
    return Bench(
        ours=ready(case.clex()),
        rivals=[case.without_clex(COMPILED, True), case.without_clex(EAGER, False)],
        own=[ready(case.frozen())],
        follows=True,
        without=FROZEN,
        cost=case.cost,
        aims=[
            Aim(FROZEN, over_frozen, "time over this package with frozen frequencies"),
            Aim(EAGER, over_eager, "time over the transformers-style layer with plain RoPE"),
        ],
        wrong=WRONG_DFREQ,
        notes=[str(shape), f"positions sampled up to {MAX_FACTOR * length}", "rivals have plain RoPE: no dfreq"],
    )


class Step:
    """A decode step of the layer: one new token, its raw key and value appended, attention over the cache."""

    def __init__(self, gpu: Gpu, layer: ProjectionShape, cache: DecodeShape):
        self.gpu, self.shape, self.cache = gpu, layer, cache
        self.layer = make_layer(gpu, layer)
        self.parameters = (self.layer.qkv_proj.weight.detach(), self.layer.o_proj.weight.detach())
        size = (cache.B, cache.S, layer.G, layer.D)
        self.keys, self.values, *self.xs = draw(gpu, 4, size, size, *[(cache.B, 1, layer.C)] * SETS, dtype=DTYPE)
        self.x = torch.empty_like(self.xs[0])
        self.ends = torch.full((cache.B,), cache.S, dtype=torch.int64, device=gpu.device)
        self.freqs = {kind: angles.frequencies(kind, layer.D, layer.R).to(gpu.device) for kind in ("clex", "plain")}
        self.tables = {kind: RotaryTable.from_frequencies(freq, length=cache.S) for kind, freq in self.freqs.items()}
        self.rotated = apply_rotary(self.keys, None, self.tables["plain"])[0]
        self.truths: dict[tuple[str, int], Tensor] = {}

    def load(self, turn: int) -> None:
        self.x.copy_(self.xs[turn % SETS])

    @torch.no_grad()
    def truth(self, kind: str, turn: int) -> Tensor:
        key = kind, turn % SETS
        if key not in self.truths:
            qkv, o_proj = (weight.double() for weight in self.parameters)
            heads = (self.xs[key[1]].double() @ qkv.T).unflatten(-1, (-1, self.shape.D))
            q, new_k, new_v = heads.split(self.shape.heads, dim=-2)
            outs = []
            for row in zip(q, new_k, new_v, self.keys, self.values, strict=True):
                q_row, k_row, v_row, keys, values = row
                # the last slot is the new token's.
                keys, values = (torch.cat((old[:-1].double(), new)) for old, new in ((keys, k_row), (values, v_row)))
                with torch.device(self.gpu.device):
                    outs.append(exact.decode(q_row[0], keys, values, self.freqs[kind]).flatten())
            self.truths[key] = (torch.stack(outs) @ o_proj.T)[:, None]
        return self.truths[key]

    def errors(self, kind: str, turn: int, out: Tensor) -> dict[str, float]:
        return errors_of({"out": out}, {"out": self.truth(kind, turn)})

    def way(self, name: str, kind: str, run: Callable[[Tensor], Tensor]) -> Way:
        @torch.no_grad()
        def timed() -> Tensor:
            return run(self.x)

        return Way(name, timed, self.load, partial(self.errors, kind))

    def clex(self) -> Way:
        table = self.tables["clex"]
        return self.way(CLEX, "clex", lambda x: self.layer.decode(x, table, self.keys, self.values, self.ends))

    def rotated_cache(self) -> Way:
        """The same calls over a cache of rotated keys: nothing is rotated but the new token."""
        table, heads = self.tables["plain"], self.shape.heads[:2]
        qkv, o_proj = self.parameters

        def run(x: Tensor) -> Tensor:
            q, k, v = qkv_rotary(x, qkv, table, *heads, position_ids=self.ends[:, None] - 1)
            append_kv(k, v, self.rotated, self.values, self.ends)
            out = decode_attention(q, self.rotated, self.values, table, self.ends, rotated="qk")
            return F.linear(out.flatten(-2), o_proj)

        return self.way(FROZEN, "plain", run)

    def without_clex(self, name: str, compiled: bool) -> Rival:
        last = torch.tensor([self.cache.S - 1], device=self.gpu.device)
        tables = angles.doubled_tables(self.freqs["plain"], last, DTYPE)
        heads = self.shape.heads

        def project(x: Tensor, qkv: Tensor) -> Sequence[Tensor]:
            return formulations.project_rotate_half(x, qkv, None, heads, *tables)

        def make() -> Way:
            apply = torch.compile(project, dynamic=False, fullgraph=True) if compiled else project

            def run(x: Tensor) -> Tensor:
                q, k, v = apply(x, self.parameters[0])
                self.rotated[:, -1:] = k
                self.values[:, -1:] = v
                q = q.unflatten(2, (self.shape.G, -1))[:, 0]
                keys, values = (cache.transpose(1, 2) for cache in (self.rotated, self.values))
                return F.linear(formulations.decode_sdpa(q, keys, values).flatten(1)[:, None], self.parameters[1])

            return self.way(name, "plain", run)

        return Rival(name, make)

    @property
    def cost(self) -> Cost:
        """Weights, keys and values, each once."""
        tokens = self.cache.B * self.cache.S
        linears = 2 * self.cache.B * sum(weight.numel() for weight in self.parameters)
        products = 4 * tokens * self.shape.H * self.shape.D
        return Cost(size_of(*self.parameters, self.keys, self.values), linears + products)


def step(layer: ProjectionShape, cache: DecodeShape, gpu: Gpu) -> Bench:
    case = Step(gpu, layer, cache)
    return Bench(
        ours=ready(case.clex()),
        rivals=[case.without_clex(COMPILED, True), case.without_clex(EAGER, False)],
        own=[ready(case.rotated_cache())],
        without=FROZEN,
        cost=case.cost,
        aims=[Aim(EAGER, LAYER_GOALS[1], "time over the transformers-style step with plain RoPE")],
        notes=[str(layer), layout(cache), "rivals have a cache of rotated keys and plain RoPE"],
    )


def layer_cases(sizes: Sizes) -> list[Case]:
    shape = sizes.layer
    steps = [
        Case("layer", "decode step of a layer", cache.name, partial(step, shape, cache)) for cache in sizes.layer_caches
    ]
    lengths = [
        Case(
            "layer",
            "attention layer, forward and backward",
            f"bf16, {length:,} tokens",
            partial(training, shape, length, sizes.rows_checked),
        )
        for length in sizes.layer_lengths
    ]
    return [*steps, *lengths]
