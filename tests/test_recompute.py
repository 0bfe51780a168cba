"""What a cache remembers of its inputs: all that happens to a cache happens to them, and passes are made where due."""

import copy
from functools import wraps

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers_models import (
    CACHES,
    CLOSE,
    TRAIN_LENGTH,
    dynamic_cache,
    logits_of,
    one_pass,
    pad_left,
    random_tokens,
    raw_key_model,
    static_cache,
)

from clex_kernels.integrations.recompute import InputsLayer, find_inputs

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*")


def step(model: PreTrainedModel, rows: list[Tensor], cache: Cache, new: int = 0) -> Tensor:
    """Logits [B, V] of the last tokens of rows, of which all but `new` are cached already (0: none is)."""
    columns = int(cache.get_seq_length()) + new if new else max(len(row) for row in rows)
    tokens, _ = pad_left(rows)
    mask = torch.stack([torch.arange(columns) >= columns - len(row) for row in rows]).long()
    return logits_of(model, tokens[:, -(new or columns) :], attention_mask=mask, past_key_values=cache)[:, -1]


def one_pass_each(exact: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    return torch.cat([one_pass(exact, row, [len(row)]) for row in rows])


def followed(rows: list[Tensor], count: int, seed: int) -> list[Tensor]:
    """Rows with `count` more tokens each."""
    return [torch.cat((row, new)) for row, new in zip(rows, random_tokens(len(rows), count, seed), strict=True)]


# which rows are left, and in which order.
CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "copy": (lambda cache: setattr(cache, "layers", copy.deepcopy(cache.layers)), [0, 1, 2]),
}


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize(("change", "left"), CHANGES.values(), ids=CHANGES)
def test_inputs_follow_the_rows_of_a_cache(change, left, rope_type):
    model, exact = raw_key_model("llama", rope_type)
    rows = [random_tokens(1, length, length)[0] for length in (6, 8, 7)]
    cache = DynamicCache(config=model.config)
    step(model, rows, cache)
    for seed in range(4):
        # one row switches before places change, the others after that.
        if seed == 1:
            change(cache)
            rows = [rows[row] for row in left]
        rows = followed(rows, 1, seed)
        torch.testing.assert_close(step(model, rows, cache, 1), one_pass_each(exact, rows), **CLOSE)


def test_a_static_caches_inputs_are_reordered_too():
    model, exact = raw_key_model("llama", "longrope")
    rows, cache = list(random_tokens(3, 7)), static_cache(model)
    step(model, rows, cache)
    for seed in range(3):
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        rows = followed([rows[row] for row in (1, 2, 0)], 1, seed)
        torch.testing.assert_close(step(model, rows, cache, 1), one_pass_each(exact, rows), **CLOSE)


def test_copies_of_a_cache_go_separate_ways():
    model, exact = raw_key_model("llama", "longrope")
    prompt, cache = list(random_tokens(2, 7)), DynamicCache(config=model.config)
    step(model, prompt, cache)
    caches = [copy.deepcopy(cache) for _ in range(2)]
    for seed, each in enumerate(caches):
        rows = followed(prompt, 3, seed)
        torch.testing.assert_close(step(model, rows, each, 3), one_pass_each(exact, rows), **CLOSE)
    rows = followed(prompt, 1, 2)
    torch.testing.assert_close(step(model, rows, cache, 1), one_pass_each(exact, rows), **CLOSE)


EMBEDDED = {"all": [1, 1, 1], "first": [1, 0, 0], "later": [0, 1, 1], "in turn": [1, 0, 1], "last": [0, 0, 1]}


@CACHES
@pytest.mark.parametrize("embedded", EMBEDDED.values(), ids=EMBEDDED)
def test_embeddings_and_token_numbers_mix(embedded, make_cache):
    model, exact = raw_key_model("llama", "longrope")
    parts = [random_tokens(2, size, size) for size in (5, 2, 3)]
    generator = torch.Generator().manual_seed(1)
    cache, inputs = make_cache(model), []
    for tokens, is_embedded in zip(parts, embedded, strict=True):
        vectors = model.get_input_embeddings()(tokens).detach()
        if is_embedded:
            # of no token.
            vectors = vectors + torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)
        inputs.append(vectors)
        given = {"inputs_embeds": vectors} if is_embedded else {}
        logits = logits_of(model, None if is_embedded else tokens, past_key_values=cache, use_cache=True, **given)
        truth = logits_of(exact, None, inputs_embeds=torch.cat(inputs, dim=1), use_cache=False)
        torch.testing.assert_close(logits, truth[:, -tokens.shape[1] :], **CLOSE)
    assert find_inputs(cache).keys.is_floating_point() == any(embedded)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Batch and tokens of every pass through the base model so far."""
    sizes, forward = [], LlamaModel.forward

    @wraps(forward)
    def counted(self: LlamaModel, *args: object, **options: object) -> object:
        sizes.append(tuple(options["input_ids"].shape))
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return sizes


def test_passes_are_made_only_where_frequencies_change(passes):
    model, _ = raw_key_model("llama", "longrope")
    rows, cache = [random_tokens(1, length, length)[0] for length in (5, 7)], DynamicCache(config=model.config)
    step(model, rows, cache)
    for seed in range(6):
        rows = followed(rows, 1, seed)
        step(model, rows, cache, 1)
    # lengths of 9 come at columns 9 and 11, the new tokens after what was cached before.
    assert passes == [(2, 7), (2, 1), (2, 8), (2, 1), (2, 1), (2, 10), (2, 1), (2, 1), (2, 1)]


def test_dynamic_frequencies_change_with_every_token_past_training(passes):
    model, _ = raw_key_model("llama", "dynamic")
    cache = DynamicCache(config=model.config)
    for tokens in random_tokens(1, TRAIN_LENGTH + 2).T:
        logits_of(model, tokens[None], past_key_values=cache)
    assert passes == [(1, 1)] * TRAIN_LENGTH + [(1, TRAIN_LENGTH), (1, 1), (1, TRAIN_LENGTH + 1), (1, 1)]


@pytest.mark.parametrize(("rope_type", "recompute"), [("yarn", True), ("default", True), ("longrope", False)])
def test_nothing_is_remembered_where_nothing_is_computed_anew(passes, rope_type, recompute):
    model, _ = raw_key_model("llama", rope_type, recompute=recompute)
    cache = DynamicCache(config=model.config)
    for tokens in random_tokens(1, 10).T:
        logits_of(model, tokens[None], past_key_values=cache)
    assert passes == [(1, 1)] * 10
    assert find_inputs(cache) is None
    assert len(cache.layers) == 2


def test_a_cache_remembers_all_its_tokens_once():
    model, _ = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(2, 12), DynamicCache(config=model.config)
    for first, last in ((0, 7), (7, 8), (8, 11), (11, 12)):
        logits_of(model, tokens[:, first:last], past_key_values=cache)
    assert [type(layer) for layer in cache.layers].count(InputsLayer) == 1
    assert torch.equal(find_inputs(cache).keys[:, 0, :, 0], tokens)
    assert find_inputs(cache).state.tolist() == [1, 1]
    cache.reset()
    assert find_inputs(cache) is None
    logits_of(model, tokens[:, :3], past_key_values=cache)
    assert torch.equal(find_inputs(cache).keys[:, 0, :, 0], tokens[:, :3])


def test_hidden_states_of_a_step_are_its_own():
    model, exact = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(2, 9), DynamicCache(config=model.config)
    logits_of(model, tokens[:, :8], past_key_values=cache)
    with torch.no_grad():
        states = model(tokens[:, 8:], past_key_values=cache, output_hidden_states=True).hidden_states
        expected = exact(tokens, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == len(expected)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, 8:], **CLOSE)


def test_tuples_are_outputs_too():
    model, exact = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(2, 9), DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :8], past_key_values=cache, return_dict=False)
        logits = model(tokens[:, 8:], past_key_values=cache, return_dict=False)[0]
    torch.testing.assert_close(logits, logits_of(exact, tokens)[:, 8:], **CLOSE)


def test_what_inference_mode_cached_is_computed_anew_outside():
    model, exact = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(2, 12), DynamicCache(config=model.config)
    with torch.inference_mode():
        for first, last in ((0, 6), (6, 7), (7, 8)):
            model(tokens[:, first:last], past_key_values=cache)
    logits = [logits_of(model, tokens[:, at : at + 1], past_key_values=cache) for at in range(8, 12)]
    truth = torch.stack([one_pass(exact, row, [9, 10, 11, 12]) for row in tokens])
    torch.testing.assert_close(torch.cat(logits, dim=1), truth, **CLOSE)


def test_a_cache_without_inputs_is_refused():
    kept, _ = raw_key_model("llama", "longrope", recompute=False)
    model, _ = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(1, 9), DynamicCache(config=kept.config)
    logits_of(kept, tokens[:, :7], past_key_values=cache)
    with pytest.raises(ValueError, match=r"filled under recompute, .*got one without those of 7 of its 7 tokens"):
        model(tokens[:, 7:], past_key_values=cache)
    assert logits_of(kept, tokens[:, 7:], past_key_values=cache).isfinite().all()


def test_a_cache_that_was_filled_on_without_inputs_is_refused():
    model, _ = raw_key_model("llama", "longrope")
    kept, _ = raw_key_model("llama", "longrope", recompute=False)
    tokens, cache = random_tokens(1, 9), DynamicCache(config=model.config)
    logits_of(model, tokens[:, :5], past_key_values=cache)
    logits_of(kept, tokens[:, 5:8], past_key_values=cache)
    with pytest.raises(ValueError, match=r"filled under recompute, .*got one without those of 3 of its 8 tokens"):
        model(tokens[:, 8:], past_key_values=cache)


@CACHES
def test_a_cache_that_a_failure_left_in_parts_is_refused(make_cache, monkeypatch):
    model, exact = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(1, TRAIN_LENGTH + 2), make_cache(model)
    logits_of(model, tokens[:, :TRAIN_LENGTH], past_key_values=cache)
    after = tokens[:, TRAIN_LENGTH : TRAIN_LENGTH + 1]

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.base_model.layers[1].self_attn, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(after, past_key_values=cache)
    with pytest.raises(ValueError, match="cache: expected a whole one, got one of which a forward that failed"):
        model(after, past_key_values=cache)
    cache.reset()
    logits = logits_of(model, tokens, past_key_values=cache)[:, -1]
    torch.testing.assert_close(logits, one_pass(exact, tokens[0], [TRAIN_LENGTH + 2]), **CLOSE)


def test_an_offloaded_cache_is_refused():
    model, _ = raw_key_model("llama", "longrope")
    cache = dynamic_cache(model)
    cache.offloading = True
    with pytest.raises(ValueError, match=r"cache: expected one that is not offloaded, .*recompute=False"):
        model(random_tokens(1, 3), past_key_values=cache)
