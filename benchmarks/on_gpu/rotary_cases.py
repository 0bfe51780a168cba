"""Rotary of q and k: in place, out of place, and forward and backward with the gradient to the frequencies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way
from benchmarks.on_gpu import angles, rivals
from benchmarks.on_gpu.case import OVER_FLOOR, SETS, WRONG_DFREQ, Aim, Bench, Case, draw, errors_of
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost, size_of
from benchmarks.on_gpu.rivals import Pair
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.shapes import MAX_FACTOR, ROTARY_DTYPES, RotaryShape
from clex_kernels import RotaryTable, apply_rotary, reference

NO_DFREQ = "no gradient to the frequencies"


class Rotary:
    """Input sets on the device, the tensors that every call reads, and what is true of each kind of angles."""

    def __init__(self, gpu: Gpu, shape: RotaryShape, dtype: str, positions: Tensor):
        self.gpu, self.shape, self.dtype = gpu, shape, ROTARY_DTYPES[dtype]
        self.positions = positions.to(gpu.device)
        self.freqs = {
            kind: angles.frequencies(kind, shape.D, shape.D // 2).to(gpu.device) for kind in ("clex", "plain")
        }
        self.cos, self.sin = angles.half_tables(self.freqs["clex"], self.positions)
        self.sets = [tuple(draw(gpu, seed, shape.q, shape.k, dtype=self.dtype)) for seed in range(SETS)]
        self.q, self.k = (torch.empty_like(x) for x in self.sets[0])
        self.out = (torch.empty_like(self.q), torch.empty_like(self.k))
        self.truths: dict[tuple[str, int], dict[str, Tensor]] = {}

    def load(self, turn: int) -> None:
        for into, x in zip((self.q, self.k), self.sets[turn % SETS], strict=True):
            into.copy_(x)

    def truth(self, kind: str, turn: int) -> dict[str, Tensor]:
        key = kind, turn % SETS
        if key not in self.truths:
            # the oracle makes its own tensors, which must lie where these do.
            with torch.device(self.gpu.device):
                cos, sin = exact.cos_sin(self.positions, self.freqs[kind])
                rotated = [exact.rotate(x, cos, sin) for x in self.sets[key[1]]]
            self.truths[key] = dict(zip(("q", "k"), rotated, strict=True))
        return self.truths[key]

    def errors(self, kind: str, turn: int, pair: Pair) -> dict[str, float]:
        return errors_of(dict(zip(("q", "k"), pair, strict=True)), self.truth(kind, turn))

    def way(self, name: str, run: Callable[[], Pair], kind: str = "clex") -> Way:
        return Way(name, run, self.load, partial(self.errors, kind))

    def ours(self, name: str, kind: str, **policy: Any) -> Way:
        table = RotaryTable.from_frequencies(self.freqs[kind], length=self.shape.L)
        return self.way(name, partial(apply_rotary, self.q, self.k, table, **policy), kind)

    def torch_way(self, name: str, form: formulations.Formulation, compiled: bool) -> Rival:
        into = self.out if form.__name__.endswith("_into") else ()
        kept = (self.q, self.k) if form.__name__.endswith("_in_place") else into

        def make() -> Way:
            apply = formulations.for_q_and_k(form, compiled)

            def run() -> Pair:
                fresh = apply(self.q, self.k, self.cos, self.sin, *into)
                return kept or fresh

            return self.way(full, run)

        full = f"{'torch.compile' if compiled else 'eager'} {name}"
        return Rival(full, make)

    def packages(self, inplace: bool) -> list[Rival]:
        """flash-attn, Liger and FlashInfer; Liger is always in place."""

        def rival(name: str, module: str, make: Callable[[], Callable[[], Pair]]) -> Rival:
            return Rival(name, lambda: self.way(name, make()), (module,))

        def flash() -> Callable[[], Pair]:
            return partial(rivals.flash_rotary(inplace), self.q, self.k, self.cos, self.sin)

        def liger() -> Callable[[], Pair]:
            doubled = (torch.cat((table, table), dim=-1)[None] for table in (self.cos, self.sin))
            return partial(rivals.liger_rotary(), self.q, self.k, *doubled)

        def flashinfer() -> Callable[[], Pair]:
            table = torch.cat((self.cos, self.sin), dim=-1)
            rows = torch.arange(self.shape.L, dtype=torch.int32, device=self.gpu.device).repeat(self.shape.B)
            return partial(rivals.flashinfer_rotary(inplace), self.q, self.k, table, rows)

        return [
            rival("flash-attn rotary", "flash_attn", flash),
            *([rival("Liger rotary", "liger_kernel", liger)] if inplace else []),
            rival("FlashInfer rotary", "flashinfer", flashinfer),
        ]


def in_place(shape: RotaryShape, dtype: str, gpu: Gpu) -> Bench:
    case = Rotary(gpu, shape, dtype, torch.arange(shape.L))
    plain = ready(case.ours("apply_rotary in place, plain RoPE", "plain", inplace=True))
    return Bench(
        ours=ready(case.ours("apply_rotary in place", "clex", inplace=True)),
        rivals=[
            case.torch_way("split halves, in place", formulations.split_halves_in_place, compiled=True),
            *case.packages(inplace=True),
            case.torch_way("rotate-half, fresh (transformers)", formulations.rotate_half, compiled=False),
        ],
        own=[plain],
        cost=Cost(2 * size_of(case.q, case.k)),
        notes=[str(shape)],
    )


def out_of_place(shape: RotaryShape, dtype: str, gpu: Gpu) -> Bench:
    case = Rotary(gpu, shape, dtype, torch.arange(shape.L))
    out = tuple(map(torch.empty_like, case.out))
    return Bench(
        ours=ready(case.ours("apply_rotary, preallocated", "clex", out=out)),
        rivals=[
            case.torch_way("split halves, preallocated", formulations.split_halves_into, compiled=True),
            *case.packages(inplace=False),
        ],
        aims=[Aim(OVER_FLOOR, 1.15, "time over a copy of the same bytes (the measured floor)")],
        cost=Cost(2 * size_of(case.q, case.k)),
        notes=[str(shape)],
    )


class Training:
    """Forward and backward at sampled positions, every way from frequencies to its own cos and sin."""

    def __init__(self, gpu: Gpu, shape: RotaryShape, dtype: str):
        generator = torch.Generator().manual_seed(5)
        positions = reference.sample_positions(shape.L, float(MAX_FACTOR), shape.L, generator)
        self.case = case = Rotary(gpu, shape, dtype, positions)
        self.q, self.k = (x.detach().requires_grad_() for x in (case.q, case.k))
        self.douts = [tuple(draw(gpu, 10 + seed, shape.q, shape.k, dtype=case.dtype)) for seed in range(SETS)]
        self.dout = self.douts[0]
        self.truths: dict[int, dict[str, Tensor]] = {}

    def load(self, turn: int) -> None:
        self.case.load(turn)
        self.dout = self.douts[turn % SETS]

    def truth(self, turn: int) -> dict[str, Tensor]:
        at = turn % SETS
        if at not in self.truths:
            case, douts = self.case, self.douts[at]
            rotated = case.truth("clex", at).values()
            with torch.device(case.gpu.device):
                cos, sin = exact.cos_sin(case.positions, case.freqs["clex"])
                dq, dk = (exact.rotate(dy, cos, -sin) for dy in douts)
                dfreq = sum(
                    exact.frequency_gradient(y, dy, case.positions) for y, dy in zip(rotated, douts, strict=True)
                )
            self.truths[at] = {"dq": dq, "dk": dk, "dfreq": dfreq}
        return self.truths[at]

    def errors(self, turn: int, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        return errors_of(dict(zip(("dq", "dk", "dfreq"), gradients, strict=False)), self.truth(turn))

    def way(self, name: str, rotate: Callable[..., Pair], freq: Tensor | None = None) -> Way:
        """`rotate(q, k, freq)` and its gradients; frequencies are frozen where freq is None."""
        leaves = () if freq is None else (freq.clone().requires_grad_(),)

        def run() -> tuple[Tensor, ...]:
            # q and k themselves are nobody's to overwrite here, and a leaf can't be.
            q, k = self.q.view_as(self.q), self.k.view_as(self.k)
            return torch.autograd.grad(rotate(q, k, *leaves), (self.q, self.k, *leaves), self.dout)

        return Way(name, run, self.load, self.errors)

    def learned(self, q: Tensor, k: Tensor, freq: Tensor) -> Pair:
        return apply_rotary(q, k, RotaryTable.from_frequencies(freq, positions=self.case.positions))

    def frozen(self) -> Way:
        table = RotaryTable.from_frequencies(self.case.freqs["clex"], positions=self.case.positions)
        return self.way("apply_rotary, frozen frequencies", lambda q, k: apply_rotary(q, k, table))

    def torch_way(self, name: str, form: formulations.Formulation, compiled: bool) -> Rival:
        freq, positions = self.case.freqs["clex"].float(), self.case.positions.float()
        full = f"{'torch.compile' if compiled else 'eager'} {name}"

        def make() -> Way:
            apply = formulations.with_frequencies(form, compiled)
            return self.way(full, lambda q, k, freq: apply(q, k, freq, positions), freq)

        return Rival(full, make)

    def flash(self) -> Rival:
        name = f"flash-attn rotary, {NO_DFREQ}"

        def make() -> Way:
            rotate = rivals.flash_rotary(inplace=False)
            return self.way(name, lambda q, k: rotate(q, k, self.case.cos, self.case.sin))

        return Rival(name, make, ("flash_attn",))


def training(shape: RotaryShape, dtype: str, gpu: Gpu) -> Bench:
    steps = Training(gpu, shape, dtype)
    pair = size_of(steps.case.q, steps.case.k)
    return Bench(
        ours=ready(steps.way("apply_rotary", steps.learned, steps.case.freqs["clex"])),
        rivals=[
            steps.torch_way("split halves", formulations.split_halves, compiled=True),
            steps.torch_way("rotate-half (the authors' form)", formulations.rotate_half, compiled=False),
        ],
        own=[ready(steps.frozen())],
        besides=[steps.flash()],
        # forward reads and writes; backward reads the gradient and what was rotated, and writes.
        cost=Cost(5 * pair),
        wrong=WRONG_DFREQ,
        notes=[str(shape), f"positions sampled up to {MAX_FACTOR * shape.L}"],
    )


def rotary_cases(sizes: Sizes) -> list[Case]:
    shape = sizes.rotary
    rows = {
        "rotary in place": in_place,
        "rotary out of place, preallocated": out_of_place,
        "rotary forward, backward and dfreq": training,
    }
    return [
        Case("rotary", row, f"{shape.name}, {dtype}", partial(make, shape, dtype))
        for dtype in ("bf16", "fp32")
        for row, make in rows.items()
    ]
