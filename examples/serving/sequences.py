"""What a caller asks for, what the engine keeps of it, and how the next token is chosen."""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from clex_kernels.config import check_integer


@dataclass(frozen=True)
class Request:
    """A prompt to go on from.

    Args:
        id: names the request in the output.
        prompt: token ids, at least one.
        max_new_tokens: where the output ends at the latest, at least 1.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        seed: of this request's own draws, which are the same whatever else is in the batch.
        stop_tokens: the output ends with the first of these, which is still given out.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    id: Hashable
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: Collection[int] = ()

    def __post_init__(self) -> None:
        if len(self.prompt) == 0:
            raise ValueError("prompt: expected at least one token, got none")
        for token in self.prompt:
            check_integer("prompt", token)
        check_integer("max_new_tokens", self.max_new_tokens, least=1)
        for name, kind in (("temperature", Real), ("stop_tokens", Collection)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__.lower()}, got {type(value).__name__}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")

    @property
    def most_cached(self) -> int:
        """Tokens that the cache holds at the end; the last one is given out only."""
        return len(self.prompt) + self.max_new_tokens - 1


class Output(NamedTuple):
    """One new token of a request."""

    id: Hashable
    token: int
    is_last: bool


@dataclass(eq=False)
class Running:
    """A request under way. `tokens`, prompt and output, lie in the cache up to `cached`, in `pages` or in `saved`."""

    request: Request
    tokens: list[int]
    generator: torch.Generator
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    saved: Tensor | None = None

    @classmethod
    def begin(cls, request: Request) -> "Running":
        """A request of which nothing has been computed yet."""
        return cls(request, list(request.prompt), torch.Generator().manual_seed(request.seed))

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed: one while decoding."""
        return len(self.tokens) - self.cached

    def add(self, token: int) -> Output:
        """Takes a new token into the sequence."""
        self.tokens.append(token)
        is_full = len(self.tokens) == len(self.request.prompt) + self.request.max_new_tokens
        return Output(self.request.id, token, is_full or token in self.request.stop_tokens)


def choose_tokens(logits: Tensor, sequences: Sequence[Running]) -> list[int]:
    """The next token of each sequence, from logits [B, V], as its request wants it."""
    tokens = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        if sequence.request.temperature > 0.0:
            # on the host, so that a seed means the same everywhere; the largest logit is 0, however cold it is.
            scores = logits[row].double().cpu()
            weights = ((scores - scores.max()) / sequence.request.temperature).softmax(dim=-1)
            tokens[row] = int(torch.multinomial(weights, 1, generator=sequence.generator))
    return tokens
