"""Layers that grow in place against transformers' own, through everything that a cache goes through."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers_models import clex_model, random_tokens

from clex_kernels.integrations.growing_cache import GrowingLayer, let_grow

SHAPE = (2, 3, 5)  # B, G, D


def new_tokens(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, length, 5, generator=generator) for _ in range(2))


def growing_cache() -> DynamicCache:
    cache = DynamicCache()
    let_grow(cache)
    return cache


def reordered(cache):
    cache.reorder_cache(torch.tensor([1, 1]))


OPERATIONS = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-3),
    "reorder": reordered,
    "crop, reorder": lambda cache: (cache.crop(-2), reordered(cache)),
    "repeat": lambda cache: (cache.batch_select_indices(torch.tensor([1])), cache.batch_repeat_interleave(2)),
    "copy": lambda cache: setattr(cache, "layers", copy.deepcopy(cache.layers)),
}


@torch.no_grad()
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_it_holds_what_a_dynamic_cache_holds(operation):
    ours, theirs = growing_cache(), DynamicCache()
    for seed, length in enumerate([7, 1, 1, 70, 1, 3, 1, 200, 1]):
        for cache in (ours, theirs):
            cache.update(*new_tokens(length, seed), 0)
            operation(cache)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])


@torch.no_grad()
def test_a_step_writes_in_place():
    cache = growing_cache()
    cache.update(*new_tokens(9), 0)
    cache.update(*new_tokens(1), 0)
    places = {cache.layers[0].keys.data_ptr()}
    for _ in range(60):
        cache.update(*new_tokens(1), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    assert cache.layers[0]._buffers[0].shape[2] == 10 + 64


@torch.no_grad()
def test_views_kept_from_before_are_not_written_over():
    cache = growing_cache()
    for seed in range(3):
        cache.update(*new_tokens(2, seed), 0)
    layer = cache.layers[0]
    kept = layer.keys, layer.values
    truth = [x.clone() for x in cache.update(*new_tokens(1, 7), 0)]
    first = layer.keys, layer.values
    layer.keys, layer.values = kept
    cache.update(*new_tokens(1, 8), 0)
    for x, expected in zip(first, truth, strict=True):
        assert torch.equal(x, expected)


def test_queries_alone_may_carry_gradients():
    cache, (k, v) = growing_cache(), new_tokens(1)
    q = torch.ones(2, 3, 1, 5, requires_grad=True)
    loss = 0.0
    for _ in range(4):
        keys, values = cache.update(k, v, 0)
        loss = loss + (q * keys).sum(dim=-1).sin().mul(values.sum(dim=-1)).sum()
    loss.backward()
    assert q.grad.isfinite().all()


def test_tensors_that_carry_gradients_are_never_written_to():
    cache, (k, v) = growing_cache(), new_tokens(4)
    k.requires_grad_()
    first, _ = cache.update(k, v, 0)
    second, _ = cache.update(k, v, 0)
    (first.square().sum() + second.square().sum()).backward()
    torch.testing.assert_close(k.grad, 6 * k.detach())


def test_what_inference_mode_made_is_not_written_to_outside():
    cache = growing_cache()
    with torch.inference_mode():
        for _ in range(3):
            cache.update(*new_tokens(2), 0)
    keys, _ = cache.update(*new_tokens(1, 5), 0)
    assert torch.equal(keys[:, :, -1:], new_tokens(1, 5)[0])
    assert not keys.is_inference()


def test_only_plain_dynamic_layers_are_exchanged():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(4)]
    let_grow(cache)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, DynamicSlidingWindowLayer]
    offloading = DynamicCache()
    offloading.offloading = True
    let_grow(offloading)
    assert offloading.layer_class_to_replicate is DynamicLayer


def test_a_model_fills_one():
    model = clex_model("llama")
    with torch.no_grad():
        cache = model(random_tokens(1, 9), use_cache=True).past_key_values
        model(random_tokens(1, 1), past_key_values=cache)
        place = cache.layers[1].keys.data_ptr()
        model(random_tokens(1, 1), past_key_values=cache)
    assert cache.layers[1].keys.data_ptr() == place
    assert cache.get_seq_length() == 11
