"""Checks of the rotary kernels, of the frequencies and of the tables."""

from functools import partial

import torch
from torch import Tensor

from benchmarks import exact
from benchmarks.on_gpu import angles
from benchmarks.on_gpu.checks import DTYPES, Check, Head, everywhere, follow_rule, label, spread_over
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.sizes import Sizes
from clex_kernels import ClexConfig, RotaryTable, RotaryTableStack, apply_rotary, reference, solve_frequencies

SEQUENCES, TABLES, OFFSET = 2, 3, 100
# how positions and tables are given, besides 0, 1, 2, ... of one table.
FEATURES = (
    "in place",
    "sampled positions",
    "position ids",
    "a stack by index",
    "one token",
    "in place, sampled positions",
)
TIMES = (1.0, 2.5, 2.5, 8.0, 16.0)
ROWS_FAR = 1 << 20


class Call:
    """q and k as views of one tensor [B, L, H + G, D], their gradients, and the angles of a feature."""

    def __init__(self, feature: str, head: Head, dtype: str, length: int = 129, heads: tuple[int, int] = (5, 3)):
        generator = torch.Generator().manual_seed(1)
        length = 1 if feature == "one token" else length
        self.dims, self.pairs = head
        self.dtype, self.heads, self.inplace = DTYPES[dtype], heads, "in place" in feature
        size = (SEQUENCES, length, sum(heads), self.dims)
        self.x, self.dy = (torch.randn(size, generator=generator).to(self.dtype) for _ in range(2))
        self.freq = 10000.0 ** -(torch.arange(self.pairs, dtype=torch.float64) / self.pairs)
        self.index: Tensor | None = None
        self.ids: Tensor | None = None
        self.sampled: Tensor | None = None
        self.positions = torch.arange(OFFSET, OFFSET + length, dtype=torch.float64).expand(SEQUENCES, -1)
        if "sampled positions" in feature:
            self.sampled = reference.sample_positions(length, 16.0, length, generator)
            self.positions = self.sampled.expand(SEQUENCES, -1)
        if feature == "position ids":
            self.ids = torch.randint(4096, (SEQUENCES, length), generator=generator)
            self.positions = self.ids.double()
        if feature == "a stack by index":
            self.index = torch.tensor([2, 0])
            self.freq = self.freq / torch.arange(1, TABLES + 1)[:, None] ** 0.3

    def table(self, freq: Tensor) -> RotaryTable | RotaryTableStack:
        if self.index is not None:
            times = torch.arange(1.0, TABLES + 1, dtype=torch.float64, device=freq.device)
            return RotaryTableStack.from_frequencies(freq, times, length=4096, index=self.index.to(freq.device))
        if self.sampled is not None:
            return RotaryTable.from_frequencies(freq, positions=self.sampled.to(freq.device))
        return RotaryTable.from_frequencies(freq, length=4096)

    def actual(self, gpu: Gpu) -> dict[str, Tensor]:
        source = self.x.to(gpu.device, copy=True).requires_grad_()
        freq = self.freq.to(gpu.device, copy=True).requires_grad_()
        # not a leaf, so that it may be written to.
        packed = source * 1
        h = self.heads[0]
        where = {"offset": OFFSET} if self.ids is None and self.sampled is None else {}
        if self.ids is not None:
            where = {"position_ids": self.ids.to(gpu.device)}
        q, k = apply_rotary(packed[:, :, :h], packed[:, :, h:], self.table(freq), inplace=self.inplace, **where)
        dy = self.dy.to(gpu.device)
        torch.autograd.backward((q, k), (dy[:, :, :h], dy[:, :, h:]))
        return {"q, k": torch.cat((q, k), dim=2), "dq, dk": source.grad, "dfreq": freq.grad}

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        source, freq = self.x.to(dtype).requires_grad_(), self.freq.clone().requires_grad_()
        rows = freq if self.index is None else freq[self.index]
        y = reference.rotary(source, *reference.tables(rows.expand(SEQUENCES, -1), self.positions))
        dx, dfreq = torch.autograd.grad(y, (source, freq), self.dy.to(dtype))
        return {"q, k": y, "dq, dk": dx, "dfreq": dfreq}


def check_rotary(call: partial[Call], gpu: Gpu) -> None:
    given = call()
    follow_rule(given.dtype, given.actual(gpu), given.expected(given.dtype), given.expected(torch.float64))


def check_frequencies(activation: str, gpu: Gpu) -> None:
    """Values to 1e-10 of the exact ones, gradients to 1e-5 of the largest."""
    plain = angles.weights_of(128, 64)
    config = ClexConfig(**{**vars(plain.config), "activation": activation})
    times = torch.tensor(TIMES, dtype=torch.float64)
    up, down = (weight.to(gpu.device, copy=True).requires_grad_() for weight in plain.sets[0])
    freq = solve_frequencies(up, down, times.to(gpu.device), config)
    distinct, number = times.unique(return_inverse=True)
    true = exact.solve_exactly(*plain.sets[0], distinct, config)[number]
    error = (freq.detach().cpu() / true - 1).abs().max().item()
    assert error <= 1e-10, f"freq: relative error {error:.1e}, expected at most 1e-10"
    dfreq = 1.0 / true[-1:]
    found = torch.autograd.grad(freq[-1:], (up, down), dfreq.to(gpu.device))
    gradients = exact.weight_gradients(*plain.sets[0], times[-1:], dfreq, config)
    for name, x, y in zip(("dup", "ddown"), found, gradients, strict=True):
        error = ((x.cpu().double() - y).abs().max() / y.abs().max()).item()
        assert error <= 1e-5, f"{name}: error {error:.1e} of the largest, expected at most 1e-5"


def check_tables(positions: Tensor | None, gpu: Gpu) -> None:
    """Rows of the factored tables, and of sampled positions, to 3e-7 at up to a million."""
    freq = angles.frequencies("clex", 128, 64)
    where = {"length": ROWS_FAR} if positions is None else {"positions": positions.to(gpu.device)}
    table = RotaryTable.from_frequencies(freq.to(gpu.device), **where)
    rows = torch.cat((torch.arange(200), ROWS_FAR - 1 - torch.arange(200)))
    if positions is not None:
        rows = torch.arange(len(positions))
    coarse, fine = table.coarse.cpu()[rows // table.tile], table.fine.cpu()[rows % table.tile]
    cos = coarse[:, 0] * fine[:, 0] - coarse[:, 1] * fine[:, 1]
    sin = coarse[:, 0] * fine[:, 1] + coarse[:, 1] * fine[:, 0]
    true = exact.cos_sin(rows if positions is None else positions, freq)
    for name, x, y in zip(("cos", "sin"), (cos, sin), true, strict=True):
        error = (x.double() - y).abs().max().item()
        assert error <= 3e-7, f"{name}: error {error:.1e}, expected at most 3e-7"


def rotary_checks(sizes: Sizes) -> list[Check]:
    shape = sizes.rotary
    whole = (shape.D, shape.D // 2)
    large = partial(Call, "whole heads", whole, "bf16", shape.L // SEQUENCES, (shape.H, shape.G))
    sampled = torch.linspace(0, ROWS_FAR, 777, dtype=torch.float64)
    variants = [*everywhere("rows of a table", sizes.heads), *spread_over(FEATURES, sizes.heads)]
    return [
        *(Check("rotary", label(*variant), partial(check_rotary, partial(Call, *variant))) for variant in variants),
        Check("rotary", f"the benchmark's heads, {shape}", partial(check_rotary, large)),
        *(Check("frequencies", name, partial(check_frequencies, name)) for name in ("tanh", "silu")),
        Check("tables", f"{ROWS_FAR:,} positions", partial(check_tables, None)),
        Check("tables", "sampled positions", partial(check_tables, sampled)),
    ]
