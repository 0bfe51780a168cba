"""From weights to frequencies, with and without gradients, and from frequencies to tables."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchdiffeq import odeint

from benchmarks import exact
from benchmarks.measure import Way
from benchmarks.on_gpu import angles
from benchmarks.on_gpu.case import ERROR, Aim, Bench, Case, error_of
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost, size_of
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.shapes import CONFIG, MAX_FACTOR
from clex_kernels import ClexConfig, RotaryTable, reference, solve_frequencies

INTEGERS = torch.arange(1, MAX_FACTOR + 1, dtype=torch.float64)
# the authors' way takes thousands of launches.
SLOW = 10
# of positions that are compared with fp64.
CHECKED = 2048
# fp32 angles are a tenth off at position 1M without being wrong by their own lights.
FP32_ANGLES = {"cos, sin": 0.5}

Solve = Callable[[Tensor, Tensor, Tensor, ClexConfig], Tensor]


def dopri5(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """torchdiffeq's, in fp32."""
    grid = times if times[0] == 1 else torch.cat((times.new_ones(1), times))
    grid = grid.to(up)
    start = reference.plain_log_frequencies(config, up.dtype, up.device)
    z = odeint(
        lambda t, z: reference.log_frequency_slope(t, z, up, down, config),
        start,
        grid,
        method="dopri5",
        rtol=1e-6,
        atol=1e-6,
    )
    return z[-len(times) :].exp()


class Solving:
    """Weight sets behind one pair of tensors on the device; t = 1..16 forward, t = 16 with gradients to the weights."""

    def __init__(self, gpu: Gpu, trains: bool):
        weights = angles.weights_of(CONFIG.head_dim, CONFIG.pairs)
        self.config, self.trains = weights.config, trains
        self.times = (INTEGERS[-1:] if trains else INTEGERS).to(gpu.device)
        self.sets = [tuple(x.to(gpu.device) for x in pair) for pair in weights.sets]
        self.up, self.down = (x.clone().requires_grad_(trains) for x in self.sets[0])
        # divided by the frequency, so that every pair's ln freq gets a gradient of the same size.
        plain = reference.plain_log_frequencies(self.config, torch.float64).exp()
        self.dfreq = (1.0 / plain)[None].to(gpu.device)
        self.truths = [tuple(x.to(gpu.device) for x in self.exact(*pair)) for pair in weights.sets]

    def exact(self, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        times = self.times.cpu()
        if self.trains:
            return exact.weight_gradients(up, down, times, self.dfreq.cpu(), self.config)
        return (exact.solve_exactly(up, down, times, self.config),)

    def load(self, turn: int) -> None:
        with torch.no_grad():
            for into, x in zip((self.up, self.down), self.sets[turn % len(self.sets)], strict=True):
                into.copy_(x)

    def errors(self, turn: int, results: tuple[Tensor, ...]) -> dict[str, float]:
        true = self.truths[turn % len(self.sets)]
        if not self.trains:
            return {"freq": (results[0] / true[0] - 1).abs().max().item()}
        return {name: error_of(x, y) for name, x, y in zip(("dup", "ddown"), results, true, strict=True)}

    def way(self, name: str, solve: Solve, every: int = 1) -> Way:
        def run() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(self.trains):
                freq = solve(self.up, self.down, self.times, self.config)
            if not self.trains:
                return (freq,)
            return torch.autograd.grad(freq, (self.up, self.down), self.dfreq.to(freq))

        return Way(name, run, self.load, self.errors, every)


def frequencies(trains: bool, gpu: Gpu) -> Bench:
    case = Solving(gpu, trains)
    slow = {
        "torchdiffeq dopri5, rtol 1e-6, fp32": dopri5,
        "authors: torchdiffeq rk4, step 0.01, fp32": reference.frequencies,
    }
    return Bench(
        ours=ready(case.way("solve_frequencies", solve_frequencies)),
        rivals=[Rival(name, partial(case.way, name, solve, SLOW)) for name, solve in slow.items()],
        cost=Cost(size_of(case.up, case.down)),
        aims=[] if trains else [Aim(ERROR, 1e-10, "relative error")],
        notes=["a latency, not a throughput: the floor is only that of reading the weights once"],
    )


class Tables:
    """Frequencies that change before every call, and positions that are compared with fp64."""

    def __init__(self, gpu: Gpu, length: int):
        self.gpu, self.length = gpu, length
        clex, plain = (angles.frequencies(kind, CONFIG.head_dim, CONFIG.pairs) for kind in ("clex", "plain"))
        self.sets = [clex.to(gpu.device), plain.to(gpu.device)]
        self.freq = self.sets[0].clone()
        generator = torch.Generator().manual_seed(3)
        checked = torch.randint(length, (CHECKED,), generator=generator)
        self.positions = torch.cat((checked, torch.tensor([0, length - 1]))).to(gpu.device)
        self.rows = torch.arange(length, dtype=torch.float32, device=gpu.device)

    def load(self, turn: int) -> None:
        self.freq.copy_(self.sets[turn % len(self.sets)])

    def way(self, name: str, run: Callable[[], object], rows: Callable[[object], tuple[Tensor, Tensor]]) -> Way:
        def errors(turn: int, result: object) -> dict[str, float]:
            true = exact.cos_sin(self.positions, self.sets[turn % len(self.sets)])
            pairs = zip(rows(result), true, strict=True)
            return {"cos, sin": max((x.double() - y).abs().max().item() for x, y in pairs)}

        return Way(name, run, self.load, errors)

    def look_up(self, table: RotaryTable) -> tuple[Tensor, Tensor]:
        """As the kernels form them: the fp32 complex product of a coarse and a fine row."""
        coarse, fine = table.coarse[self.positions // table.tile], table.fine[self.positions % table.tile]
        cos = coarse[:, 0] * fine[:, 0] - coarse[:, 1] * fine[:, 1]
        return cos, coarse[:, 0] * fine[:, 1] + coarse[:, 1] * fine[:, 0]

    def full(self) -> tuple[Tensor, Tensor]:
        angle = torch.outer(self.rows, self.freq.float())
        return angle.cos(), angle.sin()


def tables(length: int, gpu: Gpu) -> Bench:
    case = Tables(gpu, length)
    ours = case.way("factored tables", lambda: RotaryTable.from_frequencies(case.freq, length=length), case.look_up)
    table = ours.run()

    def rival(name: str, compiled: bool) -> Rival:
        def make() -> Way:
            run = torch.compile(case.full, dynamic=False) if compiled else case.full
            return case.way(name, run, lambda pair: tuple(x[case.positions] for x in pair))

        return Rival(name, make)

    return Bench(
        ours=ready(ours),
        rivals=[
            rival("torch.compile full fp32 tables", compiled=True),
            rival("torch outer, cos, sin: full fp32 tables", compiled=False),
        ],
        cost=Cost(size_of(table.coarse, table.fine)),
        aims=[Aim(ERROR, 3e-7, "largest error of cos and sin")],
        wrong=FP32_ANGLES,
        notes=["error: of cos and sin, absolute; fp32 angles are far off at great positions"],
    )


def table_cases(sizes: Sizes) -> list[Case]:
    return [
        Case("tables", "tables", f"{sizes.tables:,} positions", partial(tables, sizes.tables)),
        Case(
            "frequencies", "frequencies for t = 1..16, no gradient", f"D {CONFIG.head_dim}", partial(frequencies, False)
        ),
        Case(
            "frequencies",
            "frequencies forward and backward, t = 16",
            f"D {CONFIG.head_dim}",
            partial(frequencies, True),
        ),
    ]
