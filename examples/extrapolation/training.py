"""Training from scratch at one length, and fine-tuning from there under a rotary method."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clex_kernels import ClexConfig, RotaryTable, RotaryTableStack
from examples.extrapolation.corpus import load_corpus
from examples.extrapolation.methods import Method, Rotary, plain_table
from examples.extrapolation.settings import Base, Tuning
from examples.train_tiny import TinyLlama, draw_batch, next_byte_loss

MODEL_CLIP, ODE_CLIP = 1.0, 1.0
WEIGHT_DECAY = 0.1
WARMUP_SHARE, LAST_LR_SHARE = 0.03, 0.05
BETAS = (0.9, 0.97)
# fine-tuning draws other text than training from scratch with the same seed.
TUNING_SEED = 1000

Table = RotaryTable | RotaryTableStack
Progress = Callable[[int], None]


def no_progress(steps: int) -> None:
    """Takes the place of a progress bar."""


def new_model(base: Base) -> TinyLlama:
    """The model as it starts, from the seed."""
    torch.manual_seed(base.seed)
    config = ClexConfig(head_dim=base.head_dim, train_length=base.train_length)
    return TinyLlama(config, base.width, base.layers, base.heads, base.kv_heads)


def lr_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine."""
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_SHARE * steps))
    return warmup * (LAST_LR_SHARE + (1 - LAST_LR_SHARE) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))


def run_steps(
    model: TinyLlama,
    groups: list[dict[str, Any]],
    clips: list[tuple[list[nn.Parameter], float]],
    draw: Callable[[], tuple[Tensor, Table]],
    steps: int,
    progress: Progress,
) -> list[float]:
    """Optimizes the groups, each with its own peak `lr`, and clips the listed parameters apart; losses per step."""
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_share(step, steps)
        tokens, table = draw()
        loss = next_byte_loss(model, tokens, table)
        optimizer.zero_grad()
        loss.backward()
        for parameters, most in clips:
            nn.utils.clip_grad_norm_(parameters, most)
        optimizer.step()
        losses.append(loss.item())
        progress(1)
    return losses


def model_groups(model: TinyLlama, lr: float) -> list[dict[str, Any]]:
    """Optimizer groups of a model: matrices decay, vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [
        {"params": matrices, "lr": lr, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]


def train_base(base: Base, progress: Progress = no_progress) -> TinyLlama:
    """A model trained from scratch with plain RoPE."""
    model = new_model(base)
    generator = torch.Generator().manual_seed(base.seed)
    text = load_corpus().train
    table = plain_table(Tuning(base).config(), base.train_length)

    def draw() -> tuple[Tensor, Table]:
        return draw_batch(text, base.batch, base.train_length, generator), table

    clips = [(list(model.parameters()), MODEL_CLIP)]
    run_steps(model, model_groups(model, base.lr), clips, draw, base.steps, progress)
    return model


def fine_tune(model: TinyLlama, tuning: Tuning, method: Method, progress: Progress = no_progress) -> Rotary:
    """Trains a model further under a method, in place; returns the method's tables, with what the ODE learned."""
    torch.manual_seed(tuning.seed)
    rotary = Rotary(tuning, method)
    # text and places apart: methods that draw no places still see the same text.
    texts = torch.Generator().manual_seed(TUNING_SEED + tuning.seed)
    places = torch.Generator().manual_seed(TUNING_SEED + tuning.seed)
    text = load_corpus().train

    def draw() -> tuple[Tensor, Table]:
        tokens = draw_batch(text, tuning.batch, tuning.base.train_length, texts)
        return tokens, rotary.sample(tuning.batch, places)

    groups, clips = model_groups(model, tuning.lr), [(list(model.parameters()), MODEL_CLIP)]
    steps = tuning.steps
    if method.learns:
        # positions up to thousands multiply the ODE's gradient: in a joint clip it would swamp the model's.
        weights = list(rotary.parameters())
        head_start = tuning.ode.head_start
        if head_start:
            model.requires_grad_(False)
            group, clip = ode_group(weights, tuning.ode.head_start_lr), (weights, ODE_CLIP)
            run_steps(model, [group], [clip], draw, head_start, progress)
            model.requires_grad_(True)
            steps -= head_start
        groups.append(ode_group(weights, tuning.ode.lr))
        clips.append((weights, ODE_CLIP))
    run_steps(model, groups, clips, draw, steps, progress)
    return rotary.eval()


def ode_group(weights: list[nn.Parameter], lr: float) -> dict[str, Any]:
    """The optimizer group of the ODE's weights."""
    return {"params": weights, "lr": lr, "weight_decay": 0.0}
