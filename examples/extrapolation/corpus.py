"""The text: bytes for training, and documents apart from it to choose by (validation) and to report (test)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from examples.train_tiny import as_bytes, documents

SPLIT_EVERY, VALIDATION, TEST = 12, 3, 9


class Corpus(NamedTuple):
    """Bytes [N] int64 of each part, documents in a row."""

    train: Tensor
    validation: Tensor
    test: Tensor


@functools.cache
def load_corpus() -> Corpus:
    """The text that ships with Python: of 12 documents, 1 for validation, 1 for testing, 10 for training."""
    train: list[str] = []
    validation: list[str] = []
    test: list[str] = []
    for number, document in enumerate(documents()):
        part = {VALIDATION: validation, TEST: test}.get(number % SPLIT_EVERY, train)
        part.append(document.strip() + "\n\n\n")
    return Corpus(as_bytes(train), as_bytes(validation), as_bytes(test))


def cut_segments(text: Tensor, count: int, length: int) -> Tensor:
    """[count, length + 1] bytes: segments spread evenly over the text, each with the byte after it."""
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    return text[starts[:, None] + torch.arange(length + 1)]
