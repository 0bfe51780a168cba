"""The serving example: requests get what they get alone, whoever else is there, and pages add up."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers_models import VOCABULARY, clex_model, random_tokens, scaled_model, stock_model

from clex_kernels import pack_qkv
from clex_kernels.integrations.transformers import apply_raw_key_cache
from examples.serving.engine import Engine, Limits
from examples.serving.frequencies import frequencies_of
from examples.serving.pages import PagePool
from examples.serving.scheduler import Work
from examples.serving.sequences import Output, Request

# with 8 tokens per unit of t, these reach t = 8.
MOST_PROMPT, MOST_NEW, MAX_FACTOR = 30, 34, 8
# 160 slots: two of the longest sequences and a half.
LIMITS = Limits(pages=10, page_size=16, chunk=20, budget=40, most_running=8)
# prompts of one size, of several chunks and of a chunk and one; and of one token.
SIZES = [(1, 30), (20, 25), (21, 12), (30, 34), (29, 1)]

POLICIES = ["integer", "continuous"]


def make_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return clex_model(family, max_factor=MAX_FACTOR, **changes)


def make_requests(count: int = 16, **options: Any) -> list[Request]:
    """Of lengths that differ, the first few chosen, the others at random."""
    generator = torch.Generator().manual_seed(1)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    sizes = SIZES + [(draw(MOST_PROMPT), draw(MOST_NEW)) for _ in range(count - len(SIZES))]
    return [
        Request(number, random_tokens(1, prompt, seed=number)[0].tolist(), new, **options)
        for number, (prompt, new) in enumerate(sizes[:count])
    ]


class Served:
    """An engine whose free pages hold NaN, and all that came of it: outputs by step, logits by request."""

    def __init__(self, model: PreTrainedModel, limits: Limits = LIMITS):
        self.engine = Engine(model, frequencies_of(model), limits)
        self.pool = self.engine.runner.pool
        self.logits: dict[Any, list[Tensor]] = defaultdict(list)
        self.works: list[list[Work]] = []
        self.outputs: list[Output] = []
        self._run, self._give_back = self.engine.runner.run, self.pool.give_back
        self.engine.runner.run, self.pool.give_back = self._look_and_run, self._poison
        self.pool.memory.fill_(torch.nan)

    def serve(self, requests: Sequence[Request], per_step: int = 2) -> "Served":
        """Submit so many requests before each step until none is left, and finish all."""
        arrivals = iter(requests)
        while batch := list(itertools.islice(arrivals, per_step)):
            for request in batch:
                self.engine.submit(request)
            self.outputs += self.engine.step()
        self.outputs += self.engine.stream()
        return self

    def tokens(self, name: Any) -> list[int]:
        return [output.token for output in self.outputs if output.id == name]

    def _look_and_run(self, works: list[Work]) -> Tensor:
        running = self.engine.scheduler.running
        assert {work.sequence for work in works} == set(running)
        sizes = [work.size for work in works]
        assert sizes == sorted(sizes)
        assert min(sizes) >= 1
        owned = [page for sequence in running for page in sequence.pages]
        assert len(set(owned)) == len(owned), "a page of two sequences"
        assert len(owned) + self.pool.free == self.pool.pages
        self.works.append([Work(*work) for work in works])
        logits = self._run(works)
        for row, work in zip(logits, [work for work in works if work.gives_token], strict=True):
            self.logits[work.sequence.request.id].append(row)
        return logits

    def _poison(self, pages: list[int]) -> None:
        self.pool.memory[:, :, pages] = torch.nan
        self._give_back(pages)


def alone_in_transformers(model: PreTrainedModel, request: Request) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens of a request by the model's own generate(), and their logits before it rounds them to fp32."""
    logits: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *values: logits.append(values[-1][0, -1]))
    options = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(torch.tensor([request.prompt]), **options)[0, len(request.prompt) :].tolist()
    hook.remove()
    return tokens, logits


def assert_close_logits(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-11) -> None:
    assert_close(torch.stack(actual), torch.stack(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("family", "changes", "count"),
    [
        ("llama", {}, 16),
        ("llama", {"scale_policy": "continuous"}, 16),
        ("mistral", {"scale_policy": "continuous", "extras": {"sliding_window": 7}}, 8),
        ("qwen2", {"log_scale": True}, 8),
        ("qwen3", {}, 8),
    ],
    ids=["llama-integer", "llama-continuous", "mistral-window", "qwen2-log-scale", "qwen3"],
)
def test_requests_get_what_they_get_alone(family, changes, count):
    model, requests = make_model(family, **changes), make_requests(count)
    served = Served(model).serve(requests)
    assert served.engine.scheduler.evictions >= count // 8
    assert max(len(works) for works in served.works) > 3
    for request in requests:
        tokens, logits = alone_in_transformers(model, request)
        assert served.tokens(request.id) == tokens
        assert_close_logits(served.logits[request.id], logits)
    for request in requests[1::4]:
        alone = Served(model).serve([request])
        assert alone.engine.scheduler.evictions == 0
        assert alone.tokens(request.id) == served.tokens(request.id)
        assert_close_logits(alone.logits[request.id], served.logits[request.id])


def test_requests_differ_by_what_the_frequencies_do():
    """Else the tests above would say little."""
    request = make_requests()[3]
    tokens, logits = {}, {}
    for policy in POLICIES:
        tokens[policy], logits[policy] = alone_in_transformers(make_model(scale_policy=policy), request)
    assert tokens["integer"] != tokens["continuous"]
    assert len(set(tokens["integer"])) > 5


@pytest.mark.parametrize(("family", "rope_type"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")])
def test_models_are_served_by_their_own_rope(family, rope_type):
    model, requests = scaled_model(family, rope_type), make_requests(6)
    apply_raw_key_cache(model, recompute=False)
    if family == "phi3":
        # else its generate() drops the cache at the switch.
        model.config.original_max_position_embeddings = 1 << 20
    served = Served(model).serve(requests)
    assert served.engine.scheduler.evictions > 0
    for request in requests:
        tokens, logits = alone_in_transformers(model, request)
        assert served.tokens(request.id) == tokens
        assert_close_logits(served.logits[request.id], logits)


def test_packed_projections_give_the_same():
    model, request = make_model(), make_requests()[1]
    before = Served(model).serve([request])
    for layer in model.base_model.layers:
        pack_qkv(layer.self_attn)
    after = Served(model).serve([request])
    assert after.tokens(request.id) == before.tokens(request.id)
    assert_close_logits(after.logits[request.id], before.logits[request.id])


def test_models_that_are_not_patched_are_served_too():
    model, request = stock_model("llama"), make_requests()[1]
    served = Served(model).serve([request])
    tokens, logits = alone_in_transformers(model, request)
    assert served.tokens(request.id) == tokens
    # transformers computes angles in fp32.
    assert_close_logits(served.logits[request.id], logits, tolerance=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 64])
def test_chunks_of_any_size_give_the_same(policy, chunk):
    model, requests = make_model(scale_policy=policy), make_requests(6)
    expected = Served(model).serve(requests)
    served = Served(model, replace(LIMITS, chunk=chunk, budget=70)).serve(requests)
    assert max(work.size for works in served.works for work in works) == min(chunk, MOST_PROMPT)
    for request in requests:
        assert served.tokens(request.id) == expected.tokens(request.id)
        assert_close_logits(served.logits[request.id], expected.logits[request.id])


def steps_of(served: Served) -> dict[Any, list[int]]:
    """In which steps each request took part."""
    steps = defaultdict(list)
    for number, works in enumerate(served.works):
        for work in works:
            steps[work.sequence.request.id].append(number)
    return steps


def test_budget_bounds_a_step_and_prompts_do_not_hold_up_decoding():
    served = Served(make_model(), Limits(pages=40, chunk=4, budget=5, most_running=3)).serve(make_requests(8), 8)
    assert served.engine.scheduler.evictions == 0
    assert max(sum(work.size for work in works) for works in served.works) == 5
    assert any(works[0].size == 1 and works[-1].size > 1 for works in served.works)
    for name, steps in steps_of(served).items():
        decoding = steps[-len(served.tokens(name)) :]
        assert decoding == list(range(decoding[0], decoding[0] + len(decoding)))


def test_all_pages_are_free_in_the_end():
    served = Served(make_model()).serve(make_requests())
    assert served.engine.stats.most_pages == LIMITS.pages
    assert not served.engine.has_work
    assert sorted(served.pool.take(served.pool.free)) == list(range(LIMITS.pages))


def test_the_youngest_makes_room_and_comes_back_first():
    requests = [Request(name, [5] * 15, 40 if name in "abc" else 1) for name in "abcd"]
    served = Served(make_model(), Limits(pages=7, chunk=16, budget=64, most_running=3)).serve(requests, 4)
    assert served.engine.scheduler.evictions >= 1
    steps = steps_of(served)
    assert steps["a"] == list(range(40))
    back = next(step for before, step in itertools.pairwise(steps["c"]) if step > before + 1)
    assert back <= steps["d"][0]
    assert [len(served.tokens(name)) for name in "abcd"] == [40, 40, 40, 1]


def test_evicted_pages_come_back_as_they_were_elsewhere():
    pool = PagePool(6, 16, (2, 3, 4), torch.empty(0))
    pages = pool.take(4)
    pool.memory.normal_()
    before = pool.memory[:, :, pages[:2]].clone()
    saved = pool.save(pages[:2])
    pool.memory.fill_(torch.nan)
    pool.restore(others := pool.take(2), saved)
    assert not set(others) & set(pages)
    assert_close(pool.memory[:, :, others], before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="count: expected at most the 0 pages that are free, got 1"):
        pool.take(1)


def test_tokens_stream_in_order_and_requests_may_join_meanwhile():
    model, requests = make_model(), make_requests(6)
    served = Served(model)
    for request in requests[:3]:
        served.engine.submit(request)
    late, seen = list(requests[3:]), []
    for output in served.engine.stream():
        seen.append(output)
        if late:
            served.engine.submit(late.pop(0))
    expected = Served(model).serve(requests)
    for request in requests:
        own = [output for output in seen if output.id == request.id]
        assert [output.token for output in own] == expected.tokens(request.id)
        assert [output.is_last for output in own] == [False] * (request.max_new_tokens - 1) + [True]
    first_end = next(place for place, output in enumerate(seen) if output.is_last)
    assert len({output.id for output in seen[:first_end]}) > 1


def test_stop_tokens_end_a_request_and_are_given_out():
    model, request = make_model(), make_requests()[0]
    tokens = Served(model).serve([request]).tokens(0)
    stop = tokens[7]
    served = Served(model).serve([replace(request, stop_tokens={stop, VOCABULARY + 1})])
    assert served.tokens(0) == tokens[: tokens.index(stop) + 1]
    assert served.outputs[-1].is_last
    assert served.pool.free == LIMITS.pages


def test_draws_are_a_request_s_own():
    model, requests = make_model(), make_requests(8, temperature=1.5, seed=3)
    served = Served(model).serve(requests)
    assert served.engine.scheduler.evictions > 0
    for request in requests[:2]:
        assert Served(model).serve([request]).tokens(request.id) == served.tokens(request.id)
    first = replace(requests[0], max_new_tokens=10)
    greedy = Served(model).serve([replace(first, temperature=0.0)]).tokens(0)
    assert Served(model).serve([replace(first, temperature=1e-9)]).tokens(0) == greedy
    others = {tuple(Served(model).serve([replace(first, seed=seed)]).tokens(0)) for seed in range(3)}
    assert len(others) == 3


def test_draws_follow_the_softmax():
    model, request = make_model(), make_requests()[1]
    temperature, count = 20.0, 400
    requests = [replace(request, id=n, seed=n, temperature=temperature, max_new_tokens=1) for n in range(count)]
    served = Served(model, replace(LIMITS, pages=64, budget=400)).serve(requests, count)
    expected = (served.logits[0][0] / temperature).softmax(dim=-1)
    drawn = torch.tensor([output.token for output in served.outputs]).bincount(minlength=VOCABULARY) / count
    # five standard deviations.
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all()


def submit(request: Request) -> None:
    engine_of(make_model()).submit(request)


def engine_of(model: Any, limits: Limits = LIMITS) -> Engine:
    return Engine(model, frequencies_of(model) if isinstance(model, PreTrainedModel) else None, limits)


def model_without_values() -> PreTrainedModel:
    model = make_model()
    del model.base_model.layers[1].self_attn.v_proj
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Request("a", [], 1), "prompt: expected at least one token, got none"),
        (lambda: Request("a", [3, -1], 1), "prompt: expected at least 0, got -1"),
        (lambda: Request("a", [3], 0), "max_new_tokens: expected at least 1, got 0"),
        (lambda: Request("a", [3], 1, temperature=-1.0), "temperature: expected a finite number >= 0, got -1.0"),
        (lambda: submit(Request("a", [61], 1)), "prompt: expected token ids below 61, got 61"),
        (lambda: submit(Request("a", [3] * 100, 62)), "expected at most the cache's 160 tokens .* got 100 and 62"),
        (lambda: Limits(chunk=0), "chunk: expected at least 1, got 0"),
        (lambda: Limits(most_running=0), "most_running: expected at least 1, got 0"),
        (lambda: Limits(budget=0), "budget: expected at least 1, got 0"),
        (lambda: engine_of(make_model(), Limits(page_size=24)), "page_size: expected a multiple of 16, got 24"),
        (lambda: engine_of(make_model(), Limits(pages=0)), "pages: expected at least 1, got 0"),
        (lambda: engine_of(make_model("phi")), "model: expected a causal .* got PhiForCausalLM .*'phi'"),
        (lambda: engine_of(make_model().base_model), "model: expected a causal .* got LlamaModel"),
        (lambda: engine_of(model_without_values()), "or qkv_proj, .* got k_proj, o_proj, q_proj in layer 1"),
        (lambda: engine_of(make_model().train()), r"expected in evaluation mode, .* call model.eval\(\)"),
    ],
)
def test_what_can_not_be_served_says_why(call: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_models_and_fractions_of_tokens_say_why():
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        engine_of(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"max_new_tokens: expected an integer, got 2\.5"):
        Request("a", [3], 2.5)
    with pytest.raises(TypeError, match="temperature: expected a real, got str"):
        Request("a", [3], 2, temperature="1")
    with pytest.raises(TypeError, match="stop_tokens: expected a collection, got NoneType"):
        Request("a", [3], 2, stop_tokens=None)


def test_requests_that_just_fit_are_served_and_ids_may_come_again():
    served = Served(make_model(), replace(LIMITS, pages=3)).serve([Request("a", [3] * 38, 11)])
    assert len(served.tokens("a")) == 11
    assert (served.engine.stats.most_pages, served.engine.scheduler.evictions) == (3, 0)
    served.engine.submit(Request("a", [3], 1))
    with pytest.raises(ValueError, match="id: expected one that no unfinished request has, got 'a'"):
        served.engine.submit(Request("a", [4], 1))
    assert len(list(served.engine.stream())) == 1
