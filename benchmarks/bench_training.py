"""One optimizer step of the tiny Llama of examples/train_tiny.py: learned frequencies against frozen ones.

Each step's loss, before its update, is compared with a forward pass of the same weights in fp64 and exact frequencies.
"""

import copy

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import exact
from benchmarks.measure import Goal, Way, compare, record
from benchmarks.weights import Weights
from clex_kernels import RotaryTable, reference
from examples.train_tiny import BATCH, CONFIG, Trainer, draw_batch, load_text, next_byte_loss

CLEX = "CLEX: sampled t and positions, gradients to the ODE"
PLAIN = "plain RoPE: same model and kernels, one fixed table"
LENGTH = CONFIG.train_length


class PlainStep:
    """A trainer with its next step's inputs; frequencies are plain RoPE's and never change."""

    def __init__(self, text: Tensor):
        torch.manual_seed(0)
        self.text = text
        self.trainer = Trainer()
        self.plain = reference.plain_log_frequencies(CONFIG, torch.float64).exp()
        self.table = RotaryTable.from_frequencies(self.plain, length=LENGTH)

    def prepare(self, turn: int) -> None:
        self.turn = turn
        self.tokens = draw_batch(self.text, BATCH, LENGTH, torch.Generator().manual_seed(turn))
        with torch.no_grad():
            model = copy.deepcopy(self.trainer.model).double()
            self.exact_loss = next_byte_loss(model, self.tokens, self.exact_table()).item()

    def exact_table(self) -> RotaryTable:
        return RotaryTable.from_frequencies(self.plain, length=LENGTH, dtype=torch.float64)

    def run(self) -> float:
        return self.trainer.step(self.tokens, self.table)

    def errors(self, turn: int, loss: float) -> dict[str, float]:
        return {"loss": abs(loss / self.exact_loss - 1)}


class ClexStep(PlainStep):
    """The same with frequencies solved, sampled and learned in every step."""

    def __init__(self, text: Tensor, weights: Weights):
        super().__init__(text)
        ode = self.trainer.rope.proj_func
        with torch.no_grad():
            ode.ode_up_proj.copy_(weights.up)
            ode.ode_down_proj.copy_(weights.down)

    def draw(self) -> RotaryTable:
        return self.trainer.sample_table(torch.Generator().manual_seed(self.turn))

    def exact_table(self) -> RotaryTable:
        drawn, ode = self.draw(), self.trainer.rope.proj_func
        time = torch.tensor([float(drawn.t)], dtype=torch.float64)
        freq = exact.solve_exactly(ode.ode_up_proj, ode.ode_down_proj, time, CONFIG)[0]
        return RotaryTable.from_frequencies(freq, positions=drawn.positions, dtype=torch.float64)

    def run(self) -> float:
        return self.trainer.step(self.tokens, self.draw())


def bench_training_step(benchmark: BenchmarkFixture, best_weights: Weights) -> None:
    text = load_text()[0]
    clex, plain = ClexStep(text, best_weights), PlainStep(text)
    ours = Way(CLEX, clex.run, clex.prepare, clex.errors)
    fixed = Way(PLAIN, plain.run, plain.prepare, plain.errors)
    result = compare(benchmark, ours, [fixed], rounds=20)
    record(
        benchmark,
        section="training",
        row="whole training step of a tiny Llama",
        case=f"batch {BATCH}, {LENGTH} bytes, bf16 autocast",
        memory="torch's default allocator for both",
        weights=best_weights.kind,
        error_unit="loss over that of an fp64 forward pass, minus 1",
        comparison=result,
        ours=CLEX,
        overhead=(CLEX, PLAIN),
        goals=[Goal("time over plain RoPE by this package", result.ratio(CLEX, PLAIN), "at most", 1.03)],
    )
