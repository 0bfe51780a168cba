"""Trains a tiny byte-level Llama with CLEX on text that ships with Python.

    python -m examples.train_tiny --seconds 30

What a training loop needs is here in full: sampled length factors and positions, one table for all layers, and a
parameter group of its own for the ODE. Positions up to max_factor * train_length multiply its gradient, so it gets its
own clip and a small learning rate: with a joint clip it would swamp every other gradient.
"""

import argparse
import ast
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clex_kernels import ClexAttention, ClexConfig, ClexRotaryEmbedding, RotaryTable

CONFIG = ClexConfig(head_dim=128, train_length=128, max_factor=16)
WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 3, 2, 1, 256
BATCH = 16
MODEL_LR, ODE_LR = 3e-3, 1e-5
MODEL_CLIP, ODE_CLIP = 1.0, 1.0
WARMUP_STEPS = 20


class Block(nn.Module):
    """One Llama layer: grouped-query attention and a SwiGLU MLP."""

    def __init__(self, config: ClexConfig, width: int, heads: int, kv_heads: int):
        super().__init__()
        hidden = 8 * width // 3 // 32 * 32
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = ClexAttention(config, width, heads, kv_heads)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, table: RotaryTable) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        x = x + self.attention(self.attention_norm(x), table)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * up)


class TinyLlama(nn.Module):
    """Bytes in, logits over bytes out; the embedding is tied. The caller brings the rotary table."""

    def __init__(
        self,
        config: ClexConfig,
        width: int = WIDTH,
        layers: int = LAYERS,
        heads: int = HEADS,
        kv_heads: int = KV_HEADS,
    ):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(config, width, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, table: RotaryTable) -> Tensor:
        """tokens [B, L] -> logits [B, L, 256]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, table)
        return F.linear(self.norm(x), self.embedding.weight)


def documents() -> Iterator[str]:
    """Every pydoc topic, then the docstrings of every module of the standard library."""
    yield from (topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "pydoc_data"} & set(path.parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
        text = "\n\n".join(docstring for docstring in docstrings if docstring)
        if text:
            yield text


def load_text() -> tuple[Tensor, Tensor]:
    """Bytes [N] for training and held-out bytes, split by whole documents."""
    train: list[str] = []
    held_out: list[str] = []
    for number, document in enumerate(documents()):
        (held_out if number % 10 == 3 else train).append(document.strip() + "\n\n\n")
    return as_bytes(train), as_bytes(held_out)


def as_bytes(texts: list[str]) -> Tensor:
    """All texts in a row as byte values [N]."""
    return torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).long()


def draw_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, length + 1] bytes from random places."""
    starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)]


def next_byte_loss(model: TinyLlama, tokens: Tensor, table: RotaryTable) -> Tensor:
    """Mean negative log likelihood in nats per byte; tokens [B, L + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1], table)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@dataclass
class Trainer:
    """Model, rotary embedding and an optimizer with one parameter group for each."""

    config: ClexConfig = CONFIG
    width: int = WIDTH
    layers: int = LAYERS
    model: TinyLlama = field(init=False)
    rope: ClexRotaryEmbedding = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self):
        self.model = TinyLlama(self.config, self.width, self.layers)
        self.rope = ClexRotaryEmbedding(self.config)
        groups = [
            {"params": list(self.model.parameters()), "lr": MODEL_LR, "peak_lr": MODEL_LR},
            {"params": list(self.rope.parameters()), "lr": ODE_LR, "peak_lr": ODE_LR, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.97))

    def sample_table(self, generator: torch.Generator) -> RotaryTable:
        """Draws t and positions. Contiguous runs and a share of plain steps train better than uniform positions."""
        return self.rope.sample(self.config.train_length, generator=generator, positions="runs", plain_share=0.25)

    def step(self, tokens: Tensor, table: RotaryTable, lr_scale: float = 1.0) -> float:
        """One update; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale
        loss = next_byte_loss(self.model, tokens, table)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MODEL_CLIP)
        nn.utils.clip_grad_norm_(self.rope.parameters(), ODE_CLIP)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, text: Tensor, length: int, windows: int) -> float:
        """Loss in nats per byte over contiguous windows of `length` bytes, at that length's frequencies."""
        starts = torch.linspace(0, len(text) - length - 1, windows).long()
        return next_byte_loss(self.model, text[starts[:, None] + torch.arange(length + 1)], self.rope(length)).item()


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves: losses per step, held-out losses per length, the learned ODE weights."""

    losses: list[float]
    factors: list[float]
    held_out: dict[int, float]
    seconds: float
    up: Tensor
    down: Tensor


def train(trainer: Trainer, seconds: float, seed: int = 0) -> TrainingRun:
    """Trains for about `seconds` of wall time; the learning rate falls linearly to a tenth by then."""
    text, held_out_text = load_text()
    generator = torch.Generator().manual_seed(seed)
    length = trainer.config.train_length
    losses: list[float] = []
    factors: list[float] = []
    start = time.perf_counter()
    with tqdm(
        total=seconds, unit="s", desc="training", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}"
    ) as bar:
        while (elapsed := time.perf_counter() - start) < seconds:
            warmup = min(1.0, (len(losses) + 1) / WARMUP_STEPS)
            table = trainer.sample_table(generator)
            tokens = draw_batch(text, BATCH, length, generator)
            losses.append(trainer.step(tokens, table, warmup * (1 - 0.9 * elapsed / seconds)))
            factors.append(float(table.t))
            bar.update(min(time.perf_counter() - start, seconds) - bar.n)
            bar.set_postfix_str(f"step {len(losses)}, loss {losses[-1]:.2f} nats/byte", refresh=False)
    elapsed = time.perf_counter() - start
    trainer.rope.eval()
    lengths = [length * factor for factor in (1, 2, 4, 8, 16)]
    held_out = {n: trainer.held_out_loss(held_out_text, n, windows=8192 // n) for n in lengths}
    ode = trainer.rope.proj_func
    return TrainingRun(losses, factors, held_out, elapsed, ode.ode_up_proj.detach(), ode.ode_down_proj.detach())


def main() -> None:
    """Trains and prints held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="wall time to train for")
    torch.manual_seed(0)
    run = train(Trainer(), parser.parse_args().seconds)
    for length, loss in run.held_out.items():
        print(f"held-out loss at {length:5d} bytes: {loss:.3f} nats/byte")


if __name__ == "__main__":
    main()
