"""The engine: requests in, tokens out as they come, one step of the whole batch after the other.

    engine = Engine(model, frequencies_of(model), Limits(pages=512))
    engine.submit(Request("a", prompt=[5, 17, 9], max_new_tokens=20))
    for request_id, token, is_last in engine.stream():
        ...

A request gives what it gives alone, up to the rounding of products over batches of other sizes: nothing about its
frequencies, its draws or what it sees depends on the others. What is cached stays as the frequencies of its time
computed it, as apply_clex and apply_raw_key_cache(model, recompute=False) have it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from clex_kernels.config import check_integer
from examples.serving.frequencies import Frequencies
from examples.serving.runner import Runner
from examples.serving.scheduler import Scheduler, Work
from examples.serving.sequences import Output, Request, Running, choose_tokens


@dataclass(frozen=True)
class Limits:
    """What an engine may use.

    pages, page_size: of the cache; page_size is a multiple of 16. chunk: tokens of one sequence in a step at most, best
    well below the budget, which is that of all together, so that long prompts leave room for others. most_running:
    sequences that have pages.
    """

    pages: int = 256
    page_size: int = 16
    chunk: int = 128
    budget: int = 256
    most_running: int = 32

    def __post_init__(self) -> None:
        for name in ("chunk", "budget", "most_running"):
            check_integer(name, getattr(self, name), least=1)


@dataclass
class Stats:
    """What steps have used so far; `page_steps` sums the pages in use over them."""

    steps: int = 0
    tokens: int = 0
    most_sequences: int = 0
    most_pages: int = 0
    page_steps: int = 0

    def count(self, works: list[Work], pages: int) -> None:
        """Adds a step with so many pages in use."""
        self.steps += 1
        self.tokens += sum(work.size for work in works)
        self.most_sequences = max(self.most_sequences, len(works))
        self.most_pages = max(self.most_pages, pages)
        self.page_steps += pages


class Engine:
    """Continuous batching: requests join and leave the batch from step to step.

    Args:
        model: a causal language model that `Runner` knows, in evaluation mode.
        frequencies: its RoPE, e.g. `frequencies_of(model)`.
        limits: sizes.

    Raises:
        TypeError, ValueError: the model is not one of those, or a size is out of range.
    """

    def __init__(self, model: PreTrainedModel, frequencies: Frequencies, limits: Limits | None = None):
        limits = Limits() if limits is None else limits
        self.runner = Runner(model, frequencies, limits.pages, limits.page_size)
        self.scheduler = Scheduler(self.runner.pool, limits.chunk, limits.budget, limits.most_running)
        self.stats = Stats()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, request: Request) -> None:
        """Queues a request; also while others run.

        Raises:
            ValueError: it could never fit in the cache, has tokens that the model lacks, or its id is in use.
        """
        pool, vocabulary = self.runner.pool, self.runner.base.config.vocab_size
        slots = pool.pages * pool.page_size
        if request.most_cached > slots:
            raise ValueError(
                f"prompt, max_new_tokens: expected at most the cache's {slots} tokens together, one more with the last,"
                f" got {len(request.prompt)} and {request.max_new_tokens}; give it more pages"
            )
        if max(request.prompt) >= vocabulary:
            raise ValueError(f"prompt: expected token ids below {vocabulary}, got {max(request.prompt)}")
        unfinished = (*self.scheduler.running, *self.scheduler.waiting)
        if any(sequence.request.id == request.id for sequence in unfinished):
            raise ValueError(f"id: expected one that no unfinished request has, got {request.id!r}")
        self.scheduler.waiting.append(Running.begin(request))

    def step(self) -> list[Output]:
        """Computes the next tokens of everybody whose turn it is; returns the new ones."""
        works = self.scheduler.plan()
        if not works:
            return []
        self.stats.count(works, self.runner.pool.pages - self.runner.pool.free)
        logits = self.runner.run(works)
        ready = [work.sequence for work in works if work.gives_token]
        for work in works:
            work.sequence.cached = work.end
        outputs = []
        for sequence, token in zip(ready, choose_tokens(logits, ready), strict=True):
            outputs.append(sequence.add(token))
            if outputs[-1].is_last:
                self.scheduler.finish(sequence)
        return outputs

    def stream(self) -> Iterator[Output]:
        """Tokens as they come, until no request is left; more may be submitted meanwhile."""
        while self.has_work:
            yield from self.step()
