"""apply_raw_key_cache: logits over a live cache are those of one pass over the same tokens, in fp64 and fp32."""

import copy
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers_models import (
    CACHES,
    CLOSE,
    ROPES,
    TRAIN_LENGTH,
    dynamic_cache,
    exact_model,
    exact_rope,
    in_steps,
    logits_of,
    one_pass,
    pad_left,
    random_tokens,
    raw_key_model,
    scaled_model,
)

from clex_kernels.integrations.families import FAMILIES, WITHOUT_CLEX
from clex_kernels.integrations.transformers import apply_raw_key_cache, remove_raw_key_cache

WINDOW = 5

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*")


# four prompts, of which no two pass TRAIN_LENGTH in the same step, and steps of one and of two tokens after them.
PROMPTS, STEPS = [5, 7, 3, 6], [1, 1, 1, 1, 2, 1, 1]


def padded_rows(prompts: list[int], steps: list[int]) -> tuple[list[Tensor], Tensor, Tensor, list[int]]:
    """Rows of a prompt and what follows, as a batch with its mask, and the sizes of its forwards."""
    rows = [random_tokens(1, length + sum(steps), seed)[0] for seed, length in enumerate(prompts)]
    return rows, *pad_left(rows), [max(prompts), *steps]


@torch.no_grad()
def assert_each_step_is_one_pass(exact: PreTrainedModel, rows: list[Tensor], logits: Tensor, sizes: list[int]) -> None:
    """Logits [B, L, V] of forwards over `sizes` tokens: each forward's are of one pass over a row up to there."""
    longest = logits.shape[1]
    for size, last in zip(sizes, accumulate(sizes), strict=True):
        for row, tokens in enumerate(rows):
            end = last - (longest - len(tokens))
            new = min(size, end)
            truth = exact(tokens[None, :end], use_cache=False).logits[0, -new:]
            torch.testing.assert_close(logits[row, last - new : last], truth, **CLOSE)


KEPT = pytest.mark.parametrize(("layers", "recompute"), [(1, False), (2, True)], ids=["one layer", "recomputed"])


@CACHES
@KEPT
@pytest.mark.parametrize("rope_type", ROPES)
def test_rows_of_a_padded_batch_switch_each_at_its_own_step(rope_type, layers, recompute, make_cache):
    model, exact = raw_key_model("llama", rope_type, layers, recompute)
    rows, tokens, mask, sizes = padded_rows(PROMPTS, STEPS)
    logits = in_steps(model, tokens, sizes, make_cache(model), mask)
    assert_each_step_is_one_pass(exact, rows, logits, sizes)


ALL = [(family, "longrope") for family in FAMILIES if family != "llama"]
ALL += [("phi", "dynamic"), ("phi", "yarn"), ("gpt_neox", "dynamic"), ("gpt_neox", "llama3"), ("phi3", "default")]


@pytest.mark.parametrize(("family", "rope_type"), ALL, ids=[" ".join(pair) for pair in ALL])
def test_every_family_gives_the_logits_of_one_pass(family, rope_type):
    model, exact = raw_key_model(family, rope_type)
    rows, tokens, mask, sizes = padded_rows([6, 4], [1, 1, 3, 1])
    logits = in_steps(model, tokens, sizes, dynamic_cache(model), mask)
    assert_each_step_is_one_pass(exact, rows, logits, sizes)


@CACHES
@pytest.mark.parametrize("sizes", [[12], [4, 3, 5, 1], [1] * 12], ids=["at once", "chunks", "one by one"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_prompts_without_padding_give_the_logits_of_one_pass(rope_type, sizes, make_cache):
    model, exact = raw_key_model("qwen3", rope_type)
    tokens = random_tokens(2, sum(sizes))
    logits = in_steps(model, tokens, sizes, make_cache(model))
    assert_each_step_is_one_pass(exact, list(tokens), logits, sizes)


SLIDING = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "phimoe": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "qwen2": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen2_moe": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@CACHES
@pytest.mark.parametrize("family", SLIDING)
def test_windows_slide_over_what_is_computed_anew(family, make_cache):
    model, exact = raw_key_model(family, "longrope", **SLIDING[family])
    rows, tokens, mask, sizes = padded_rows([7, 4], [1, 1, 3, 1, 1])
    logits = in_steps(model, tokens, sizes, make_cache(model), mask)
    assert_each_step_is_one_pass(exact, rows, logits, sizes)


@CACHES
def test_windows_slide_while_every_step_has_new_frequencies(make_cache):
    model, exact = raw_key_model("mistral", "dynamic", **SLIDING["mistral"])
    rows, tokens, mask, sizes = padded_rows([7, 4], [1, 1, 3, 1, 1])
    logits = in_steps(model, tokens, sizes, make_cache(model), mask)
    assert_each_step_is_one_pass(exact, rows, logits, sizes)


@CACHES
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_cropping_takes_frequencies_back_and_forth(rope_type, make_cache):
    model, exact = raw_key_model("llama", rope_type)
    rows, tokens, mask, _ = padded_rows([10, 9], [2])
    cache, length = make_cache(model), 0
    # the first row passes TRAIN_LENGTH at column 9, the second one at column 10, in both directions.
    for end in (7, 9, 10, 11, 8, 9, 12, 6, 9, 8, 10):
        if end <= length:
            cache.crop(end - 1 - length)
            length = end - 1
        step = model(
            tokens[:, length:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
        ).logits.detach()
        for row, skipped in enumerate([0, 1]):
            truth = one_pass(exact, rows[row], [end - skipped])
            torch.testing.assert_close(step[row, -1:], truth, **CLOSE)
        length = end


def test_a_cache_cropped_to_nothing_starts_anew():
    model, exact = raw_key_model("llama", "longrope")
    tokens, cache = random_tokens(2, 11), dynamic_cache(model)
    logits_of(model, tokens, past_key_values=cache)
    cache.crop(-11)
    assert_each_step_is_one_pass(exact, list(tokens), in_steps(model, tokens, [8, 1, 2], cache), [8, 1, 2])


REPLAY = "replay"


class Identity(nn.Module):
    """Cosines of 1 and sines of 0, so that raw keys enter stock caches."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        ones = x.new_ones((*position_ids.shape, self.channels))
        return ones, 0 * ones


def rotated(x: Tensor, positions: Tensor, freq: Tensor, amplitude: float) -> Tensor:
    """x [H, L, D] at positions [L], the channels past 2R left alone."""
    pairs = len(freq)
    cos, sin = (amplitude * side for side in ((positions[:, None] * freq).cos(), (positions[:, None] * freq).sin()))
    x0, x1, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin, rest), dim=-1)


def replayed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    ropes: list[tuple[Tensor, float]],
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Every row rotates all its raw keys by the frequencies of this step."""
    out, columns = [], torch.arange(key.shape[2])
    group = query.shape[1] // key.shape[1]
    for q, k, v, mask, rope in zip(query, key, value, attention_mask.bool(), ropes, strict=True):
        new = columns[-q.shape[1] :, None]
        q, k = rotated(q, columns[-q.shape[1] :], *rope), rotated(k, columns, *rope)
        seen = mask & (columns <= new) & (columns > new - (sliding_window or len(columns)))
        weights = (q @ k.repeat_interleave(group, 0).mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append((weights.nan_to_num(0) @ v.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.stack(out), None


AttentionInterface.register(REPLAY, replayed_attention)
AttentionMaskInterface.register(REPLAY, lambda attention_mask=None, **_: attention_mask)


@torch.no_grad()
def replay(model: PreTrainedModel, tokens: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """Logits [B, L, V] of a stock model in plain torch whose cached values stay what their own step made them."""
    model.base_model.rotary_emb = Identity(2 * len(exact_rope(model.config, 1)[0]))
    model.set_attn_implementation(REPLAY)
    cache, logits, first = DynamicCache(), [], 0
    for size in sizes:
        last = first + size
        seen = mask[:, :last]
        ropes = [exact_rope(model.config, int(length)) for length in seen.sum(1)]
        step = model(tokens[:, first:last], attention_mask=seen, past_key_values=cache, use_cache=True, ropes=ropes)
        logits.append(step.logits)
        first = last
    return torch.cat(logits, dim=1)


REPLAYED = {
    "dynamic": ("llama", "dynamic", {}),
    "longrope": ("llama", "longrope", {}),
    "partial, amplitude": ("gpt_neox", "longrope", {}),
    "window": ("mistral", "dynamic", SLIDING["mistral"]),
    "amplitude per set": ("phimoe", "longrope", {}),
}


@CACHES
@pytest.mark.parametrize(("family", "rope_type", "extras"), REPLAYED.values(), ids=REPLAYED)
def test_kept_values_are_those_of_their_own_step(family, rope_type, extras, make_cache):
    model = scaled_model(family, rope_type, **extras)
    stock = copy.deepcopy(model)
    apply_raw_key_cache(model, recompute=False)
    _, tokens, mask, sizes = padded_rows(PROMPTS, STEPS)
    logits = in_steps(model, tokens, sizes, make_cache(model), mask)
    expected = replay(stock, tokens, mask, sizes)
    used = mask.bool()
    torch.testing.assert_close(logits[used], expected[used], **CLOSE)


def test_recomputing_is_the_default_of_longrope_alone():
    for rope_type in ROPES:
        model = scaled_model("llama", rope_type)
        given = [copy.deepcopy(model) for _ in range(2)]
        apply_raw_key_cache(model)
        for other, recompute in zip(given, (True, False), strict=True):
            apply_raw_key_cache(other, recompute)
        tokens, sizes = random_tokens(1, 12), [7, 1, 1, 1, 1, 1]
        logits, anew, kept = (in_steps(each, tokens, sizes, dynamic_cache(each)) for each in (model, *given))
        assert torch.equal(logits, anew if rope_type == "longrope" else kept)
        assert torch.equal(anew, kept) == (rope_type not in ("dynamic", "longrope"))


# lengths at which tokens are cached, one after the other; falling ones crop. Five times the sets of longrope change.
WALK = [6, 7, 8, 9, 10, 8, 9, 7, 9, 10, 8, 11, 12, 13]


@torch.no_grad()
def logits_of_walk(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[n, V] of the last token at every length of WALK."""
    cache, cached, logits = DynamicCache(), 0, []
    for length in WALK:
        if length <= cached:
            cache.crop(length - 1 - cached)
        cached = cache.get_seq_length()
        logits.append(model(tokens[:, cached:length], past_key_values=cache, use_cache=True).logits[:, -1])
        cached = length
    return torch.cat(logits)


FP32 = [("llama", rope_type) for rope_type in ROPES] + [("phi3", "longrope"), ("gpt_neox", "dynamic")]


@pytest.mark.parametrize(("family", "rope_type"), FP32, ids=[" ".join(pair) for pair in FP32])
def test_fp32_logits_are_within_a_ten_thousandth_of_one_pass(family, rope_type):
    exact = scaled_model(family, rope_type)
    stock, model = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    exact = exact_model(exact)
    apply_raw_key_cache(model, recompute=True)
    tokens = random_tokens(1, max(WALK))
    truth = one_pass(exact, tokens[0], WALK)
    # fresh ones, since transformers' dynamic frequencies never shrink back to these lengths.
    at_once = torch.cat([one_pass(copy.deepcopy(stock), tokens[0], [length]) for length in WALK])
    ours, theirs = logits_of_walk(model, tokens), logits_of_walk(stock, tokens)
    uncached = one_pass(model, tokens[0], WALK)
    error, stock_error = ((each - truth).abs().max().item() for each in (ours, theirs))
    print(
        f"\n{family}, {rope_type}: error of logits up to {truth.abs().max():.1f} over a live cache: {error:.1e} here,"
        f" {stock_error:.1e} in transformers"
    )
    assert error <= 1e-4
    assert (ours - uncached).abs().max() <= 1e-4
    assert (at_once - truth).abs().max() <= 1e-4
    if rope_type in ("dynamic", "longrope"):
        assert stock_error > 100 * error
    else:
        assert stock_error <= 1e-4


STOCK = [(family, "dynamic") for family in FAMILIES if family not in WITHOUT_CLEX] + [
    (family, "longrope") for family in FAMILIES if family != "phimoe"
]


@pytest.mark.parametrize(("family", "rope_type"), STOCK, ids=[" ".join(pair) for pair in STOCK])
def test_one_pass_is_that_of_transformers_own_rotary(family, rope_type):
    model = scaled_model(family, rope_type)
    for length in (TRAIN_LENGTH - 1, 3 * TRAIN_LENGTH):
        tokens = random_tokens(2, length)
        stock = logits_of(model, tokens, use_cache=False)
        apply_raw_key_cache(model)
        # transformers' angles are in fp32.
        torch.testing.assert_close(logits_of(model, tokens, use_cache=False), stock, rtol=0.0, atol=5e-4)
        remove_raw_key_cache(model)
