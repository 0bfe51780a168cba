"""The table cache: order, budget, growth, invalidation, pinning, threads, and the fingerprint of the weights."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from clex_kernels import _C, table_cache
from clex_kernels.tables import CacheStats, RotaryTable, TableCache, weights_fingerprint

KEEP = 10**9


def entry(floats: int, value: float = 0.0) -> tuple[Tensor, Tensor]:
    """A payload of 4 * floats bytes."""
    return torch.full((floats - 1,), value), torch.full((1,), value)


def keys_in(cache: TableCache, keys: str) -> str:
    return "".join(key for key in keys if cache.get(key, 1, 7) is not None)


def test_a_stored_entry_comes_back_as_the_same_memory():
    cache = TableCache(KEEP)
    coarse, fine = entry(10)
    cache.put("a", 64, 7, (coarse, fine))
    first, second = cache.get("a", 64, 7)
    assert first.data_ptr() == coarse.data_ptr()
    assert second.data_ptr() == fine.data_ptr()
    assert cache.stats() == CacheStats(hits=1, misses=0, evictions=0, bytes=40, entries=1, invalidations=0)


def test_an_entry_serves_shorter_lengths_and_a_longer_one_replaces_it():
    cache = TableCache(KEEP)
    cache.put("a", 64, 7, entry(10, 1.0))
    assert cache.get("a", 1, 7) is not None
    assert cache.get("a", 65, 7) is None
    cache.put("a", 128, 7, entry(20, 2.0))
    assert cache.get("a", 65, 7)[0][0] == 2.0
    assert cache.stats() == CacheStats(hits=2, misses=1, evictions=0, bytes=80, entries=1, invalidations=0)


def test_a_shorter_entry_never_replaces_a_longer_one():
    cache = TableCache(KEEP)
    cache.put("a", 128, 7, entry(20, 2.0))
    cache.put("a", 64, 7, entry(10, 1.0))
    assert cache.get("a", 100, 7)[0][0] == 2.0
    assert cache.stats().bytes == 80


def test_the_least_recently_used_entry_is_evicted_first():
    cache = TableCache(3 * 40)
    for key in "abc":
        cache.put(key, 64, 7, entry(10))
    cache.get("a", 64, 7)
    cache.put("d", 64, 7, entry(10))
    assert keys_in(cache, "abcd") == "acd"
    cache.put("e", 64, 7, entry(20))
    assert keys_in(cache, "abcde") == "de"
    stats = cache.stats()
    assert (stats.evictions, stats.bytes, stats.entries) == (3, 120, 2)


def test_an_entry_over_the_budget_stands_alone_until_the_next_one():
    cache = TableCache(100)
    cache.put("a", 64, 7, entry(10))
    cache.put("b", 64, 7, entry(100))
    assert keys_in(cache, "ab") == "b"
    assert cache.stats().bytes == 400
    cache.put("c", 64, 7, entry(10))
    assert keys_in(cache, "abc") == "c"
    assert cache.stats().bytes == 40


def test_another_fingerprint_drops_everything():
    for ask in (lambda cache: cache.get("a", 64, 8), lambda cache: cache.put("c", 64, 8, entry(10))):
        cache = TableCache(KEEP)
        cache.put("a", 64, 7, entry(10))
        cache.put("b", 64, 7, entry(10))
        ask(cache)
        assert keys_in(cache, "ab") == ""
        assert cache.stats().invalidations >= 1


def test_invalidate_drops_everything_and_frees_it():
    cache = TableCache(KEEP)
    tensors = entry(10)
    storage = StorageWeakRef(tensors[0].untyped_storage())
    cache.put("a", 64, 7, tensors)
    del tensors
    gc.collect()
    assert not storage.expired()
    cache.invalidate()
    assert storage.expired()
    assert cache.get("a", 64, 7) is None
    assert cache.stats() == CacheStats(hits=0, misses=1, evictions=0, bytes=0, entries=0, invalidations=1)


def test_pinned_entries_outlive_eviction_invalidation_and_growth():
    cache = TableCache(100)
    storages = []
    for key in "abc":
        tensors = entry(10)
        storages.append(StorageWeakRef(tensors[0].untyped_storage()))
        cache.put(key, 64, 7, tensors)
        cache.get(key, 64, 7, pin=True)
    del tensors
    cache.put("d", 64, 7, entry(10))
    # evicting pinned entries would free nothing, so they are still found.
    assert keys_in(cache, "abcd") == "abcd"
    cache.put("a", 128, 7, entry(20))
    cache.invalidate()
    assert keys_in(cache, "abcd") == ""
    gc.collect()
    assert not any(storage.expired() for storage in storages)
    assert cache.stats().bytes == 120
    del cache
    gc.collect()
    assert all(storage.expired() for storage in storages)


def test_a_dead_cache_frees_its_tables():
    cache = TableCache(KEEP)
    tensors = entry(10)
    storage = StorageWeakRef(tensors[0].untyped_storage())
    cache.put("a", 64, 7, tensors)
    handle = cache._handle
    del tensors, cache
    gc.collect()
    assert storage.expired()
    with pytest.raises(RuntimeError, match="does not exist"):
        torch.ops.clex.table_cache_stats(handle)


def test_a_cache_may_die_while_something_is_traced():
    cache, tensors = TableCache(KEEP), entry(10)
    storage = StorageWeakRef(tensors[0].untyped_storage())
    cache.put("a", 64, 7, tensors)
    with FakeTensorMode():
        del tensors, cache
        gc.collect()
    assert storage.expired()


def test_a_table_in_use_outlives_its_entry():
    cache = TableCache(KEEP)
    cache.put("a", 64, 7, entry(10, 3.0))
    held, _ = cache.get("a", 64, 7)
    cache.invalidate()
    assert torch.equal(held, torch.full((9,), 3.0))


def test_copies_and_pickles_are_empty_caches_of_their_own():
    cache = TableCache(123)
    cache.put("a", 64, 7, entry(10))
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.byte_budget == 123
        assert other.get("a", 64, 7) is None
    assert cache.get("a", 64, 7) is not None


def test_what_is_built_in_inference_mode_can_be_saved_by_autograd():
    cache = TableCache(KEEP)

    def build() -> tuple[Tensor, Tensor]:
        table = RotaryTable.from_frequencies(torch.ones(2, dtype=torch.float64), length=4)
        return table.coarse, table.fine

    with torch.inference_mode():
        cache.fetch("a", 4, 7, build)
    coarse, fine = cache.fetch("a", 4, 7, build)
    weight = torch.ones((), requires_grad=True)
    ((weight * coarse).sum() + (weight * fine).sum()).backward()
    assert weight.grad == coarse.sum() + fine.sum()
    assert cache.stats()[:2] == (1, 1)


def test_tables_stored_with_a_gradient_come_back_without():
    cache = TableCache(KEEP)
    cache.put("a", 64, 7, (torch.ones(3, requires_grad=True) * 2,))
    (tensor,) = cache.get("a", 64, 7)
    assert not tensor.requires_grad


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="byte_budget: expected an int, got float"):
        TableCache(1e9)
    with pytest.raises(ValueError, match="byte_budget: expected 0 or more, below 2\\^63, got -1"):
        TableCache(-1)
    with pytest.raises(ValueError, match="tensors: expected at least one"):
        TableCache(1).put("a", 1, 7, ())
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="tensors: expected tensors made outside inference mode"),
    ):
        TableCache(1).put("a", 1, 7, (torch.ones(1),))


def test_under_graph_capture_a_miss_is_an_error_and_a_hit_is_pinned(monkeypatch: pytest.MonkeyPatch):
    cache = TableCache(50)
    cache.put("a", 64, 7, entry(10))
    with monkeypatch.context() as patch:
        patch.setattr(table_cache, "_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="no cached table for 'a' and length 65"):
            cache.get("a", 65, 7)
        with pytest.raises(RuntimeError, match="can't be stored under CUDA graph capture"):
            cache.put("b", 64, 7, entry(10))
        captured, _ = cache.get("a", 64, 7)
    storage = StorageWeakRef(captured.untyped_storage())
    del captured
    cache.put("b", 64, 7, entry(10))
    cache.invalidate()
    gc.collect()
    assert not storage.expired()


def test_torch_compile_breaks_the_graph_and_asks_the_cache_every_time():
    cache = TableCache(KEEP)
    up, down = weights()

    def step(x: Tensor) -> Tensor:
        (row,) = cache.fetch("a", 4, weights_fingerprint(up, down), lambda: (up[0] * 2,))
        return x * row

    compiled = torch.compile(step, backend="aot_eager")
    x = torch.randn(24)
    for _ in range(2):
        for _ in range(3):
            assert torch.equal(compiled(x), x * (up[0] * 2))
        up.data.mul_(1.5)
    assert cache.stats()[:2] == (4, 2)


def test_off_the_cpu_the_fingerprint_follows_address_and_version():
    up, down = weights()
    before = table_cache._fingerprint_by_version([up, down])
    assert table_cache._fingerprint_by_version([up, down]) == before
    assert table_cache._fingerprint_by_version([up.clone(), down]) != before
    up.add_(1.0)
    assert table_cache._fingerprint_by_version([up, down]) != before
    with torch.inference_mode():
        assert isinstance(table_cache._fingerprint_by_version([torch.ones(2), down]), int)


def test_off_the_cpu_new_weights_in_freed_memory_have_another_fingerprint():
    memory, (_, down) = torch.ones(9), weights()
    # two tensors after each other at one address and one version, as an allocator hands them out.
    first, second = (table_cache._fingerprint_by_version([memory.view(3, 3).data, down]) for _ in range(2))
    assert first != second


def hammer(cache: TableCache, seed: int, errors: list[str]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for kind, key, length, fingerprint in torch.randint(0, 1000, (600, 4), generator=generator).tolist():
        name, length, fingerprint = f"k{key % 9}", 1 + length % 5, fingerprint % 50 // 49
        if kind % 100 == 0:
            cache.invalidate()
        elif kind % 2:
            # an entry says what it is.
            cache.put(name, length, fingerprint, (torch.tensor([key % 9, length, fingerprint]), torch.ones(length)))
        else:
            found = cache.get(name, length, fingerprint, pin=kind % 300 == 2)
            if found is not None and (
                found[0][0] != key % 9 or found[0][1] < length or found[0][2] != fingerprint or not found[1].all()
            ):
                errors.append(f"asked {name} {length} {fingerprint}, got {found}")


def test_eight_threads_never_get_a_wrong_entry():
    cache, errors = TableCache(200), []
    threads = [threading.Thread(target=hammer, args=(cache, seed, errors)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    stats = cache.stats()
    assert stats.hits > 0
    assert stats.evictions > 0
    assert stats.invalidations > 0


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 24, generator=generator), torch.randn(24, 12, generator=generator)


def test_the_fingerprint_sees_every_bit():
    up, down = weights()
    seen = {weights_fingerprint(up, down)}
    for weight in (up, down):
        bits = weight.data.view(torch.int32).view(-1)
        for at in range(0, bits.numel(), 7):
            for bit in (0, 13, 31):
                bits[at] ^= -(2**31) if bit == 31 else 1 << bit
                seen.add(weights_fingerprint(up, down))
                bits[at] ^= -(2**31) if bit == 31 else 1 << bit
    assert len(seen) == 1 + 2 * 42 * 3


def test_the_fingerprint_depends_on_order_shape_and_role():
    up, down = weights()
    zeros = torch.zeros(12, 24)
    values = [
        weights_fingerprint(up, down),
        weights_fingerprint(down, up),
        weights_fingerprint(up.roll(1), down),
        weights_fingerprint(up.flip(0), down),
        weights_fingerprint(up.view(24, 12), down),
        weights_fingerprint(zeros, zeros),
        weights_fingerprint(zeros[:11], zeros),
        weights_fingerprint(zeros, zeros[:11]),
        weights_fingerprint(zeros.half().repeat(1, 2), zeros),
    ]
    assert len(set(values)) == len(values)


def test_the_fingerprint_depends_on_contents_alone():
    up, down = weights()
    expected = weights_fingerprint(up, down)
    widest = ("baseline", "avx2", "avx512", "avx512_bf16").index(_C.isa())
    for level in range(widest + 1):
        _C.set_isa(level)
        assert weights_fingerprint(up.clone(), down.t().contiguous().t()) == expected
    _C.set_isa(widest)


def test_the_fingerprint_sees_writes_that_no_version_counter_sees():
    up, down = weights()
    up = torch.nn.Parameter(up)
    before = weights_fingerprint(up, down)
    version = up._version
    up.data.copy_(up.data * 2)
    assert up._version == version
    assert weights_fingerprint(up, down) != before
    with torch.inference_mode():
        inner = torch.ones(4, 4)
        first = weights_fingerprint(inner, inner)
        inner.mul_(2)
        assert weights_fingerprint(inner, inner) != first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_replays_after_its_entry_was_dropped():
    cache = TableCache(KEEP)
    cache.put("a", 64, 7, (torch.full((1024,), 3.0, device="cuda"),))
    out, graph = torch.zeros(1024, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(cache.get("a", 64, 7)[0])
    cache.invalidate()
    torch.full((1024,), 5.0, device="cuda")
    graph.replay()
    assert (out == 3.0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fingerprint_on_a_gpu_sees_optimizer_steps():
    up, down = (torch.nn.Parameter(weight.cuda()) for weight in weights())
    before = weights_fingerprint(up, down)
    assert weights_fingerprint(up, down) == before
    with torch.no_grad():
        up.add_(1.0)
    assert weights_fingerprint(up, down) != before
