"""Who computes how many tokens in the next step, and who has pages.

First come, first served: `running`, then `waiting`, is the order of arrival at any time. The youngest running sequence
makes room if an older one needs a page, and waits in front then.

Evicted sequences are copied to host memory and back, not computed anew. In a model of two or more layers, cached keys
and values above the first layer depend on the t at which their token was computed: a second prefill of everything, at
today's t, would go on with other numbers than the sequence has alone. Exact recomputation would have to follow the
prompt's t and then every generated token's, which under a continuous t is one step per token; a copy is exact whatever
the frequencies do. The price is host memory for what is evicted, and a transfer both ways.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from examples.serving.pages import PagePool
from examples.serving.sequences import Running


class Work(NamedTuple):
    """The next `size` tokens of a sequence, whose keys and values are computed in this step."""

    sequence: Running
    size: int

    @property
    def end(self) -> int:
        """Tokens in the cache afterwards."""
        return self.sequence.cached + self.size

    @property
    def gives_token(self) -> bool:
        """Whether the logits of the last one say how the sequence goes on."""
        return self.size == self.sequence.missing


@dataclass
class Scheduler:
    """Sequences that have pages and sequences that wait for some.

    chunk: tokens of one sequence in a step at most; budget: of all together; most_running: sequences that have pages.
    """

    pool: PagePool
    chunk: int
    budget: int
    most_running: int
    running: list[Running] = field(default_factory=list)
    waiting: deque[Running] = field(default_factory=deque)
    evictions: int = 0

    def plan(self) -> list[Work]:
        """The work of the next step, the smallest first, so that calls of one size stand side by side.

        Every running sequence takes part, and so decodes in every step from its first token on: what an older one
        takes of the budget never grows (chunks, then one token), and nobody is let in where nothing would be left.
        """
        self._grow()
        self._admit()
        works, left = [], self.budget
        for sequence in self.running:
            works.append(Work(sequence, min(self._wish(sequence), left)))
            left -= works[-1].size
        return sorted(works, key=lambda work: work.size)

    def finish(self, sequence: Running) -> None:
        """Forgets a sequence, whose pages become free."""
        self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages = []

    def _wish(self, sequence: Running) -> int:
        return min(sequence.missing, self.chunk)

    def _grow(self) -> None:
        """Gives running sequences pages for all their tokens, the oldest first."""
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            lacking = self.pool.count_for(len(sequence.tokens)) - len(sequence.pages)
            if lacking <= self.pool.free:
                sequence.pages += self.pool.take(lacking)
                place += 1
            else:
                # it may be the one that lacks pages.
                self._evict(self.running.pop())

    def _evict(self, sequence: Running) -> None:
        sequence.saved = self.pool.save(sequence.pages[: self.pool.count_for(sequence.cached)])
        self.pool.give_back(sequence.pages)
        sequence.pages = []
        self.waiting.appendleft(sequence)
        self.evictions += 1

    def _admit(self) -> None:
        """Lets waiting sequences in, as pages for all their tokens and the step's budget allow."""
        left = self.budget - sum(self._wish(sequence) for sequence in self.running)
        while self.waiting and left > 0 and len(self.running) < self.most_running:
            sequence = self.waiting[0]
            count = self.pool.count_for(len(sequence.tokens))
            if count > self.pool.free:
                return
            self.waiting.popleft()
            sequence.pages = self.pool.take(count)
            if sequence.saved is not None:
                self.pool.restore(sequence.pages[: sequence.saved.shape[2]], sequence.saved)
                sequence.saved = None
            self.running.append(sequence)
            left -= self._wish(sequence)
