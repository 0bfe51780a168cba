"""Ways to read a text byte by byte over a live cache, and the truth: one pass over all that was read, without a cache.

n bytes read give logits for the byte after them; n goes from `prompt`, which is one call, to the length of the text.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from clex_kernels.integrations.raw_keys import cache_name
from clex_kernels.integrations.transformers import apply_raw_key_cache
from examples.live_cache.models import LONG, Setting

STOCK, GENERATE = "transformers", "transformers, generate()"
KEPT, RECOMPUTED = "raw keys, values kept", "raw keys, recompute"
CACHE = cache_name(LlamaForCausalLM)


class Reading(NamedTuple):
    """What a way gave for n = prompt .. length: logits [B, N, V] and seconds of every call."""

    logits: Tensor
    seconds: list[float]


class Scores(NamedTuple):
    """Against the truth, past the length of training; and the median milliseconds of a call up to, at, and past it."""

    error: float
    divergence: float
    agreement: float
    perplexity: float
    before_ms: float
    switch_ms: float
    after_ms: float


Way = Callable[[PreTrainedModel, Tensor, int], Reading]


@torch.no_grad()
def read_live(model: PreTrainedModel, text: Tensor, prompt: int) -> Reading:
    """Plain forward calls over one dynamic cache; text [B, length + 1], whose last byte is not read."""
    cache = DynamicCache(config=model.config)
    logits, seconds = [], []
    bounds = [0, *range(prompt, text.shape[1])]
    for start, end in pairwise(bounds):
        began = time.perf_counter()
        out = model(text[:, start:end], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - began)
        logits.append(out.logits)
    return Reading(torch.cat(logits, 1), seconds)


def read_kept(model: PreTrainedModel, text: Tensor, prompt: int) -> Reading:
    """As `read_live`, over raw keys; cached values stay as they are."""
    apply_raw_key_cache(model, recompute=False)
    return read_live(model, text, prompt)


def read_recomputed(model: PreTrainedModel, text: Tensor, prompt: int) -> Reading:
    """As `read_live`, over raw keys; a step by other frequencies first computes all cached tokens anew."""
    apply_raw_key_cache(model, recompute=True)
    return read_live(model, text, prompt)


@torch.no_grad()
def read_uncached(model: PreTrainedModel, text: Tensor, prompt: int) -> Reading:
    """The truth: a stock model reads all n bytes in one pass, for every n.

    It gets a fresh rotary embedding every time, since that of dynamic NTK keeps what it grew to. Frequencies are
    transformers' own, in fp32.
    """
    logits, seconds = [], []
    for end in range(prompt, text.shape[1]):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        began = time.perf_counter()
        out = model(text[:, :end], use_cache=False, logits_to_keep=1)
        seconds.append(time.perf_counter() - began)
        logits.append(out.logits)
    return Reading(torch.cat(logits, 1), seconds)


class _Forced(LogitsProcessor):
    """Makes generate() say the text, and notes when it asked."""

    def __init__(self, text: Tensor):
        self.text = text
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.full_like(scores, -torch.inf).scatter(1, self.text[:, input_ids.shape[1], None], 0.0)


def read_by_generate(model: PreTrainedModel, text: Tensor, prompt: int) -> Reading:
    """transformers' generate(), which for Phi-3 drops its cache at the switch and reads everything again."""
    forced = _Forced(text)
    out = model.generate(
        text[:, :prompt],
        max_new_tokens=text.shape[1] - prompt,
        do_sample=False,
        logits_processor=LogitsProcessorList([forced]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = [after - before for before, after in pairwise(forced.times)]
    return Reading(torch.stack(out.logits, 1), seconds)


def ways_of(title: str) -> dict[str, Way]:
    """By name; generate() of a Llama is what plain calls are."""
    generate = {GENERATE: read_by_generate} if title == LONG else {}
    return {STOCK: read_live, **generate, KEPT: read_kept, RECOMPUTED: read_recomputed}


def score(found: Reading, truth: Reading, text: Tensor, setting: Setting) -> Scores:
    """Of one way; text [B, length + 1]."""
    switch = setting.train_length - setting.prompt + 1
    logits, true, target = found.logits[:, switch:], truth.logits[:, switch:], text[:, setting.train_length + 1 :]
    ours, theirs = logits.double().log_softmax(-1), true.double().log_softmax(-1)
    milliseconds = 1e3 * torch.tensor(found.seconds, dtype=torch.float64)
    return Scores(
        error=(logits - true).abs().max().item(),
        divergence=F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item(),
        agreement=(logits.argmax(-1) == true.argmax(-1)).double().mean().item(),
        perplexity=F.nll_loss(ours.flatten(0, 1), target.flatten()).exp().item(),
        # the first call is the prompt's.
        before_ms=milliseconds[1:switch].median().item(),
        switch_ms=milliseconds[switch].item(),
        after_ms=milliseconds[switch + 1 :].median().item(),
    )


def relative_errors(found: Reading, truth: Reading) -> list[float]:
    """For every n, the largest error of a logit over the largest logit, of all texts."""
    error, largest = (x.abs().amax((0, 2)) for x in (found.logits - truth.logits, truth.logits))
    return (error / largest).tolist()
