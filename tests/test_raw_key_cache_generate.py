"""generate() over raw keys that are computed anew: what transformers gives without a cache, by exact frequencies."""

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers_models import (
    CLOSE,
    TRAIN_LENGTH,
    in_steps,
    logits_of,
    pad_left,
    random_tokens,
    raw_key_model,
)

NEW = 9

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*")


# a prompt that is past the switch from the start, one that gets there soon, one later.
PROMPTS = pad_left([random_tokens(1, length, length)[0] for length in (10, 7, 4)])


def generated(model: PreTrainedModel, **options: object) -> Tensor:
    """Tokens [B, L + NEW] for PROMPTS."""
    tokens, mask = PROMPTS
    torch.manual_seed(5)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, **{"do_sample": False, **options})


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beams, several kept": {"num_beams": 4, "num_return_sequences": 2},
    "sampling with beams": {"do_sample": True, "num_beams": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "prompt in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
def test_a_padded_batch_gets_what_it_gets_without_a_cache(options, rope_type):
    model, exact = raw_key_model("llama", rope_type)
    uncached = {name: value for name, value in options.items() if name.startswith(("do_", "num_"))}
    assert torch.equal(generated(model, **options), generated(exact, use_cache=False, **uncached))


@pytest.mark.parametrize("family", ["phi3", "phimoe", "mistral", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_other_families_get_it_too(family, options):
    """Phi-3 drops its cache at the switch, by the longest row of the batch."""
    model, exact = raw_key_model(family, "longrope")
    assert torch.equal(generated(model, **options), generated(exact, use_cache=False, **options))


def test_a_static_cache_is_taken_for_the_next_prompt():
    model, exact = raw_key_model("llama", "longrope")
    for length in (3, 10, 7):
        prompt = random_tokens(2, length, length)
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 14 - length, "do_sample": False}
        out = model.generate(prompt, cache_implementation="static", **options)
        assert torch.equal(out, exact.generate(prompt, use_cache=False, **options))


def test_a_conversation_goes_on_over_its_cache():
    model, exact = raw_key_model("llama", "longrope")
    cache, tokens = DynamicCache(config=model.config), random_tokens(1, 3)
    for seed in range(3):
        tokens = torch.cat((tokens, random_tokens(1, 2, seed)), dim=1)
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 2, "do_sample": False}
        expected = exact.generate(tokens, use_cache=False, **options)
        tokens = model.generate(tokens, past_key_values=cache, **options)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_prompts_of_embeddings_are_followed_by_token_numbers(family):
    model, exact = raw_key_model(family, "longrope")
    tokens, mask = PROMPTS
    vectors = model.get_input_embeddings()(tokens).detach()
    out = model.generate(inputs_embeds=vectors, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(out, generated(exact, use_cache=False)[:, tokens.shape[1] :])


def test_kept_values_generate_by_the_logits_of_their_steps():
    model, _ = raw_key_model("llama", "dynamic", recompute=False)
    tokens, mask = PROMPTS
    out, prompt = generated(model), tokens.shape[1]
    mask = torch.cat((mask, mask.new_ones(3, NEW)), dim=1)[:, :-1]
    logits = in_steps(model, out[:, :-1], [prompt] + [1] * (NEW - 1), DynamicCache(config=model.config), mask)
    assert torch.equal(logits[:, prompt - 1 :].argmax(-1), out[:, prompt:])


class Witness:
    """Compares the logits of every forward of a model with one pass over all tokens so far."""

    def __init__(self, model: PreTrainedModel, exact: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
        self.exact, self.forward = exact, model.forward
        self.tokens = torch.empty(1, 0, dtype=torch.int64)
        # sequence lengths after each forward, and where it began.
        self.spans: list[tuple[int, int]] = []
        monkeypatch.setattr(model, "forward", self.watched)

    def watched(self, input_ids: Tensor, logits_to_keep: int = 0, **options: object) -> object:
        cache = next((value for value in options.values() if isinstance(value, Cache)), None)
        past = 0 if cache is None else cache.get_seq_length()
        self.tokens = torch.cat((self.tokens[:, :past], input_ids), dim=1)
        assert self.tokens.shape[1] == past + input_ids.shape[1]
        out = self.forward(input_ids, logits_to_keep=logits_to_keep, **options)
        truth = logits_of(self.exact, self.tokens, use_cache=False)
        torch.testing.assert_close(out.logits, truth[:, -out.logits.shape[1] :], **CLOSE)
        self.spans.append((past, past + input_ids.shape[1]))
        return out

    @property
    def returns(self) -> int:
        """How often rejected tokens brought the sequence back over the switch."""
        return sum(
            before[1] > TRAIN_LENGTH >= after[1] for before, after in zip(self.spans, self.spans[1:], strict=False)
        )


# prompts for which candidates end past the switch, are rejected, and fewer follow.
ASSISTED = {
    "assistant, dynamic": ("assistant", "dynamic", 10),
    "assistant, longrope": ("assistant", "longrope", 1),
    "prompt lookup, dynamic": ("prompt lookup", "dynamic", 1),
    "prompt lookup, longrope": ("prompt lookup", "longrope", 1),
}


@pytest.mark.parametrize(("way", "rope_type", "seed"), ASSISTED.values(), ids=ASSISTED)
def test_rejected_tokens_take_frequencies_back(way, rope_type, seed, monkeypatch):
    """Candidates share the frequencies of the last of them, so greedy decoding may go on otherwise at the switch."""
    model, exact = raw_key_model("llama", rope_type)
    witness, helper = Witness(model, exact, monkeypatch), {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 1}
    # of tokens that repeat, so that there is something to look up.
    prompt = random_tokens(1, 3, seed).repeat(1, 2)
    if way == "assistant":
        assistant, truth = raw_key_model("llama", rope_type, layers=1)
        settings = {"num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
        assistant.generation_config.update(**settings, assistant_confidence_threshold=0.35)
        Witness(assistant, truth, monkeypatch)
        helper = {"assistant_model": assistant}
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "do_sample": False}
    assert model.generate(prompt, **options, **helper).shape == (1, 15)
    assert witness.returns > 0


@pytest.mark.parametrize("seed", [1, 4])
def test_looked_up_tokens_are_greedys_away_from_the_switch(seed):
    model, exact = raw_key_model("phi3", "longrope")
    prompt = random_tokens(1, 4, seed).repeat(1, 3)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    out = model.generate(prompt, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(out, exact.generate(prompt, use_cache=False, **options))
