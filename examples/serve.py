"""Serves requests of random lengths that arrive over time, by continuous batching over the paged cache.

    python -m examples.serve                              # a small random model with CLEX; under 20 s on 2 cores
    python -m examples.serve --model DIR --dtype bfloat16 --device cuda --pages 4096 --requests 200 --rate 20

Prompts are random tokens: what is shown is the loop, in examples/serving, which is there to be copied. Read engine.py
first, then scheduler.py (who has pages, who is evicted), runner.py (one step of a model) and pages.py. MODEL is a
directory or a name on the hub, of type Llama, Mistral, Phi-3, Qwen2 or Qwen3, with CLEX or any
RoPE that RopeFrequencies has.
"""

import argparse
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from clex_kernels import ClexConfig
from clex_kernels.integrations.transformers import apply_clex
from examples.serving.engine import Engine, Limits
from examples.serving.frequencies import frequencies_of
from examples.serving.sequences import Output, Request

# of the model without --model; requests of the default lengths reach t = 4.
TRAIN_LENGTH, MAX_FACTOR = 128, 8
WIDTH = 100


@dataclass
class Visit:
    """When a request arrived, and when each of its tokens came, in seconds from the start."""

    request: Request
    arrival: float
    times: list[float] = field(default_factory=list)

    @property
    def wait(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Times between one token and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def small_model() -> PreTrainedModel:
    """A random Llama in fp32 whose frequencies are NTK-aware, as those of CLEX before any training."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
    settings = LlamaConfig(vocab_size=2048, num_key_value_heads=2, max_position_embeddings=TRAIN_LENGTH, **sizes)
    model = LlamaForCausalLM(settings).eval()
    apply_clex(model, ClexConfig(head_dim=32, train_length=TRAIN_LENGTH, max_factor=MAX_FACTOR))
    return model


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model of --model, with CLEX if its RoPE is of that type."""
    parameters = getattr(AutoConfig.from_pretrained(arguments.model), "rope_parameters", None) or {}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device).eval()
    if parameters.get("rope_type") == "clex":
        apply_clex(model)
    return model


def draw_visits(arguments: argparse.Namespace, vocabulary: int) -> deque[Visit]:
    """Requests in order of arrival, which is a Poisson process."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def between(bounds: list[int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (1,), generator=generator))

    gaps = torch.empty(arguments.requests).exponential_(arguments.rate, generator=generator)
    visits: deque[Visit] = deque()
    for number, arrival in enumerate(gaps.cumsum(0).tolist()):
        prompt = torch.randint(vocabulary, (between(arguments.prompt),), generator=generator).tolist()
        request = Request(number, prompt, between(arguments.new), arguments.temperature, seed=number)
        visits.append(Visit(request, arrival))
    return visits


def serve(engine: Engine, arrivals: deque[Visit]) -> tuple[list[Visit], float]:
    """Serves all visits, printing tokens as they come; returns the visits, complete, and how many seconds it took."""
    visits = {visit.request.id: visit for visit in arrivals}
    start = time.perf_counter()
    while arrivals or engine.has_work:
        now = time.perf_counter() - start
        while arrivals and arrivals[0].arrival <= now:
            engine.submit(arrivals.popleft().request)
        if not engine.has_work:
            time.sleep(arrivals[0].arrival - now)
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            visits[output.id].times.append(now)
        if outputs:
            print(line(now, outputs), flush=True)
    return list(visits.values()), time.perf_counter() - start


def line(now: float, outputs: list[Output]) -> str:
    """One step's tokens as "request:token", with a full stop after a request's last."""
    text = f"{now:6.2f} s " + " ".join(f"{o.id}:{o.token}{'.' * o.is_last}" for o in outputs)
    return text if len(text) <= WIDTH else text[: WIDTH - 4] + " ..."


def summary(engine: Engine, visits: list[Visit], seconds: float) -> str:
    """What it took, and how long requests waited."""
    stats, pool = engine.stats, engine.runner.pool
    new = sum(len(visit.times) for visit in visits)
    waits = [1e3 * visit.wait for visit in visits]
    gaps = [1e3 * gap for visit in visits for gap in visit.gaps] or [0.0]
    return "\n".join(
        [
            f"{len(visits)} requests in {seconds:.1f} s: {new / seconds:.0f} new tokens/s,"
            f" {stats.tokens / seconds:.0f} with those of prompts",
            f"{stats.steps} steps of {stats.most_sequences} sequences at most, {engine.scheduler.evictions} evictions",
            f"pages in use: {stats.page_steps / stats.steps / pool.pages:.0%} on average,"
            f" {stats.most_pages} of {pool.pages} at most, {pool.pages - pool.free} now",
            f"time to the first token: median {median(waits):.0f} ms, worst {max(waits):.0f} ms",
            f"time from token to token: median {median(gaps):.0f} ms, worst {max(gaps):.0f} ms",
        ]
    )


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = Limits(pages=128)
    parser.add_argument("--model", help="directory or name on the hub; without it a small random model")
    parser.add_argument("--dtype", default="auto", help="of --model; auto: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=24, metavar="N")
    parser.add_argument("--rate", type=float, default=20.0, help="requests that arrive per second")
    parser.add_argument("--prompt", type=int, nargs=2, default=[8, 400], metavar=("LEAST", "MOST"), help="tokens")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 96], metavar=("LEAST", "MOST"), help="tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--pages", type=int, default=limits.pages, help="of the cache")
    parser.add_argument("--page-size", type=int, default=limits.page_size, help="tokens, a multiple of 16")
    parser.add_argument("--chunk", type=int, default=limits.chunk, help="tokens of a prompt in one step at most")
    parser.add_argument("--budget", type=int, default=limits.budget, help="tokens of a step")
    parser.add_argument("--most-running", type=int, default=limits.most_running, help="sequences that have pages")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals")
    arguments = parser.parse_args(words)
    if arguments.requests < 1:
        parser.error(f"--requests: expected at least 1, got {arguments.requests}")
    if not 0 < arguments.rate < float("inf"):
        parser.error(f"--rate: expected a finite number > 0, got {arguments.rate:g}")
    for name in ("prompt", "new"):
        least, most = getattr(arguments, name)
        if not 1 <= least <= most:
            parser.error(f"--{name}: expected 1 <= LEAST <= MOST, got {least} {most}")
    slots = arguments.pages * arguments.page_size
    longest = arguments.prompt[1] + arguments.new[1] - 1
    if longest > slots:
        parser.error(f"--pages: expected room for a longest request of {longest} tokens, got {slots}")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Serves and prints."""
    arguments = read_arguments(words)
    if arguments.model is None:
        print("no --model: a small random model with CLEX, whose tokens mean nothing")
    try:
        model = small_model().to(arguments.device) if arguments.model is None else load_model(arguments)
        limits = Limits(**{item.name: getattr(arguments, item.name) for item in fields(Limits)})
        engine = Engine(model, frequencies_of(model), limits)
        arrivals = draw_visits(arguments, model.config.vocab_size)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    visits, seconds = serve(engine, arrivals)
    print(summary(engine, visits, seconds))


if __name__ == "__main__":
    main()
