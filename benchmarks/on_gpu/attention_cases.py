"""Causal attention from raw q, k and v: prefill, and a training step with gradients to the frequencies.

The truth is computed for some query rows of every input set, and the gradient put in is zero in the others: so outputs
are checked at these rows, and gradients in full.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way
from benchmarks.on_gpu import angles, rivals
from benchmarks.on_gpu.case import NOISE, SETS, WRONG_DFREQ, Aim, Bench, Case, draw, errors_of, sampled_rows
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost, size_of
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.shapes import MAX_FACTOR
from clex_kernels import RotaryTable, attention, reference

RESULTS = ("out", "dq", "dk", "dv", "dfreq")
DTYPE = torch.bfloat16
ROTATED_BEFOREHAND = "attention, q and k rotated beforehand"

Attend = Callable[..., Tensor]


class Attention:
    """Input sets on the device and the tensors that every call reads; at sampled positions where it trains."""

    def __init__(self, gpu: Gpu, length: int, heads: tuple[int, int, int], rows: int, trains: bool):
        H, G, D = heads
        self.gpu, self.length, self.trains = gpu, length, trains
        self.rows_of = sampled_rows(gpu, length, rows)
        sizes = ((1, length, H, D), (1, length, G, D), (1, length, G, D), (1, rows, H, D))
        self.sets = [draw(gpu, seed, *sizes, dtype=DTYPE) for seed in range(SETS)]
        self.operands = [torch.empty_like(x).requires_grad_(trains) for x in self.sets[0][:3]]
        self.dout = torch.zeros_like(self.operands[0], requires_grad=False)
        in_order = torch.arange(length, dtype=torch.float64, device=gpu.device)
        generator = torch.Generator().manual_seed(7)
        sampled = reference.sample_positions(length, float(MAX_FACTOR), length, generator).to(gpu.device)
        self.angles = {
            kind: (
                angles.frequencies(kind, D, D // 2).to(gpu.device),
                sampled if trains and kind == "clex" else in_order,
            )
            for kind in ("clex", "none")
        }
        self.truths: dict[tuple[str, int], dict[str, Tensor]] = {}

    def load(self, turn: int) -> None:
        *operands, dout = self.sets[turn % SETS]
        with torch.no_grad():
            for into, x in zip(self.operands, operands, strict=True):
                into.copy_(x)
            self.dout.zero_()
            self.dout[:, self.rows_of[turn % SETS]] = dout

    def truth(self, kind: str, turn: int) -> dict[str, Tensor]:
        key = kind, turn % SETS
        if key not in self.truths:
            freq, positions = self.angles[kind]
            *operands, dout = self.sets[key[1]]
            leaves = [x.to(torch.float64, copy=True).requires_grad_(self.trains) for x in (*operands, freq)]
            out = exact.attention(*leaves, positions, self.rows_of[key[1]])
            gradients = torch.autograd.grad(out, leaves, dout.double()) if self.trains else ()
            self.truths[key] = dict(zip(RESULTS, (out.detach(), *gradients), strict=False))
        return self.truths[key]

    def errors(self, kind: str, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        found = dict(zip(RESULTS, results, strict=False))
        found["out"] = found["out"][:, self.rows_of[turn % SETS]]
        return errors_of(found, self.truth(kind, turn))

    def way(self, name: str, attend: Attend, kind: str = "clex", *leaves: Tensor) -> Way:
        """`attend(q, k, v, *leaves)`, and where it trains the gradients to all of these."""

        def run() -> tuple[Tensor, ...]:
            inputs = (*self.operands, *leaves)
            out = attend(*inputs)
            return (out, *torch.autograd.grad(out, inputs, self.dout)) if self.trains else (out,)

        return Way(name, run, self.load, partial(self.errors, kind))

    def ours(self, name: str, **options: Any) -> Way:
        """Frequencies are learned where it trains."""
        freq, positions = self.angles["clex"]
        if self.trains:

            def learned(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
                table = RotaryTable.from_frequencies(freq, positions=positions)
                return attention(q, k, v, table, is_causal=True, **options)

            return self.way(name, learned, "clex", freq.clone().requires_grad_())
        table = RotaryTable.from_frequencies(freq, length=self.length)
        return self.way(name, lambda q, k, v: attention(q, k, v, table, is_causal=True, **options))

    def frozen(self) -> Way:
        freq, positions = self.angles["clex"]
        table = RotaryTable.from_frequencies(freq, positions=positions)
        run = partial(attention, table=table, is_causal=True)
        return self.way("attention, frozen frequencies", lambda q, k, v: run(q, k, v))

    def unrotated(self, name: str, **options: Any) -> Way:
        table = RotaryTable.from_frequencies(self.angles["none"][0], length=self.length)
        run = partial(attention, table=table, is_causal=True, rotated="qk", **options)
        return self.way(name, lambda q, k, v: run(q, k, v), "none")

    def eager(self) -> Rival:
        """transformers' way, in the operands' dtype."""
        name, form = "eager rotate-half + SDPA (transformers)", formulations.sdpa_shared
        freq, positions = self.angles["clex"]

        def make() -> Way:
            if self.trains:
                apply = formulations.attend_with_frequencies(form, compiled=False)
                leaf = freq.float().requires_grad_()
                return self.way(name, lambda *x: apply(*x, positions.float()), "clex", leaf)
            tables = angles.doubled_tables(freq, positions, DTYPE)
            return self.way(name, lambda q, k, v: form(q, k, v, *tables))

        return Rival(name, make)

    def after_compiled(self, name: str, needs: tuple[str, ...], attend: Callable[[], Attend]) -> Rival:
        """A compiled rotary, which passes gradients on to the frequencies, and then an attention by another package."""
        full = f"torch.compile rotary + {name}"
        freq, positions = self.angles["clex"]

        def make() -> Way:
            then = attend()
            if self.trains:
                rotate = formulations.with_frequencies(formulations.split_halves, compiled=True)

                def learned(q: Tensor, k: Tensor, v: Tensor, freq: Tensor) -> Tensor:
                    return then(*rotate(q, k, freq, positions.float()), v)

                return self.way(full, learned, "clex", freq.float().requires_grad_())
            tables = angles.half_tables(freq, positions)
            turn = formulations.for_q_and_k(formulations.split_halves, compiled=True)
            return self.way(full, lambda q, k, v: then(*turn(q, k, *tables), v))

        return Rival(full, make, needs)

    def after_flash(self, library: str, module: str) -> Rival:
        name = f"flash-attn rotary + {library}"
        freq, positions = self.angles["clex"]

        def make() -> Way:
            rotate, then = rivals.flash_rotary(inplace=False), rivals.flash_attention(module)
            tables = angles.half_tables(freq, positions)
            return self.way(name, lambda q, k, v: then(*rotate(q, k, *tables), v))

        return Rival(name, make, ("flash_attn", module))

    def flashinfer(self) -> Rival:
        name = "FlashInfer rotary + single_prefill"

        def make() -> Way:
            rotate, then = rivals.flashinfer_rotary(inplace=False), rivals.flashinfer_prefill()
            table = torch.cat(angles.half_tables(*self.angles["clex"]), dim=-1)
            rows = torch.arange(self.length, dtype=torch.int32, device=self.gpu.device)
            return self.way(name, lambda q, k, v: then(*rotate(q, k, table, rows), v))

        return Rival(name, make, ("flashinfer",))

    def all_rivals(self) -> list[Rival]:
        """Those without a gradient to the frequencies are none of a training step."""
        sdpa = [
            self.after_compiled(f"SDPA by {name}", (), partial(rivals.sdpa_by, backend))
            for name, backend in rivals.SDPA_BACKENDS.items()
        ]
        flash = [
            self.after_compiled(library, (module,), partial(rivals.flash_attention, module))
            for library, module in rivals.FLASH_ATTENTION.items()
        ]
        if self.trains:
            return [*sdpa, *flash, self.eager()]
        whole = [self.after_flash(*item) for item in rivals.FLASH_ATTENTION.items()]
        return [*sdpa, *whole, self.flashinfer(), self.eager()]


def count(case: Attention, heads: tuple[int, int, int]) -> Cost:
    """Products q k^T and P v of half of all pairs; backward has five products where forward has two."""
    q, k, v = case.operands
    operations = 4 * case.length**2 * heads[0] * heads[2] // 2
    if not case.trains:
        return Cost(size_of(q, k, v, q), operations)
    # forward as above; backward reads them all and dout again, and writes three gradients.
    return Cost(size_of(q, k, v, q) + size_of(q, k, v, q, q) + size_of(q, k, v), 7 * operations // 2)


def make_attention(length: int, sizes: Sizes, trains: bool, gpu: Gpu) -> Bench:
    heads = sizes.attention_heads
    case = Attention(gpu, length, heads, sizes.rows_checked, trains)
    engines = [ready(case.ours(f"attention, backend={engine}", backend=engine)) for engine in gpu.attention_backends]
    bare = [ready(case.unrotated(ROTATED_BEFOREHAND))]
    frozen = [ready(case.frozen())] if trains else []
    return Bench(
        ours=ready(case.ours("attention")),
        rivals=case.all_rivals(),
        own=[*engines, *bare, *frozen],
        without=ROTATED_BEFOREHAND,
        cost=count(case, heads),
        aims=[
            *([] if trains else [Aim(ROTATED_BEFOREHAND, 1.03, "time over the same kernel without rotary")]),
            *(Aim(engine.name, NOISE, f"auto over {engine.name}") for engine in engines),
        ],
        wrong=WRONG_DFREQ,
        notes=[
            f"H {heads[0]}, G {heads[1]}, D {heads[2]}, causal; backend=auto",
            f"checked at {sizes.rows_checked} query rows per input set",
            *([f"positions sampled up to {MAX_FACTOR * length}"] if trains else []),
        ],
    )


def attention_cases(sizes: Sizes) -> list[Case]:
    rows = (
        ("attention, prefill", sizes.prefill, False),
        ("attention, forward, backward and dfreq", sizes.training, True),
    )
    return [
        Case("attention", row, f"bf16, {length:,} tokens", partial(make_attention, length, sizes, trains))
        for row, lengths, trains in rows
        for length in lengths
    ]
