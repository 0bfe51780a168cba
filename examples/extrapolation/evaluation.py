"""Perplexity at lengths up to many times the one a model was trained at.

Every length reads the same segments of text, max_factor * train_length bytes each: at length n a segment is cut into
windows of n bytes. So the whole-window perplexities are over the same bytes at all lengths, and so are those of the
last train_length bytes of each segment, which end a window at any length.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clex_kernels import RotaryTable
from examples.extrapolation.corpus import cut_segments, load_corpus
from examples.extrapolation.settings import Reading
from examples.train_tiny import TinyLlama

BATCH_BYTES = 8192


class Score(NamedTuple):
    """Perplexity per byte at one length: over whole windows, and over the last train_length bytes of a segment."""

    whole: float
    last: float


def evaluate(
    model: TinyLlama, table_of: Callable[[int], RotaryTable], reading: Reading, train_length: int
) -> dict[int, Score]:
    """Scores by length factor; `table_of` takes a length in tokens."""
    text = load_corpus().test if reading.split == "test" else load_corpus().validation
    segments = cut_segments(text, reading.segments, max(reading.factors) * train_length)
    scores = {}
    for factor in reading.factors:
        length = factor * train_length
        table = table_of(length)
        losses = window_losses(model, table, cut_windows(segments, length)).view(len(segments), -1)
        scores[factor] = Score(perplexity(losses), perplexity(losses[:, -train_length:]))
    return scores


def cut_windows(segments: Tensor, length: int) -> Tensor:
    """Segments [S, N + 1] as windows [S N / length, length + 1], each with the byte after it."""
    return segments.unfold(1, length + 1, length).flatten(0, 1)


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss, per byte."""
    return math.exp(losses.double().mean())


@torch.no_grad()
def window_losses(model: TinyLlama, table: RotaryTable, windows: Tensor) -> Tensor:
    """Negative log likelihoods in nats, [W, length], of windows [W, length + 1], each read from its own start."""
    losses = []
    for part in windows.split(max(1, BATCH_BYTES // windows.shape[1])):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(part[:, :-1], table)
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(losses)
