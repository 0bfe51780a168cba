"""Many threads that share a module, and processes started after it was used.

Fork: torch's thread pools do not survive it. A child of a process that has computed on several threads may compute on
one only: torch.set_num_threads(1) comes first in it, as in DataLoader's workers; on several it waits forever, in any
operator of torch.
"""

import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import make_layer
from ropes import CONFIG, make_rope, seeded
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset
from transformers_models import clex_model, random_tokens

from clex_kernels import (
    ClexConfig,
    ClexRotaryEmbedding,
    RotaryTable,
    append_kv,
    apply_rotary,
    attention,
    decode_attention,
)
from clex_kernels.table_cache import TableCache

WORKERS, SECONDS = 8, 60
DIMS = CONFIG.head_dim


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def work(rope: ClexRotaryEmbedding, seed: int) -> list[Tensor]:
    """What a caller of its own does with a module, at lengths of its own."""
    length = 20 + 29 * seed
    q, k, v = (normal(seed, 2, length, heads, DIMS) for heads in (4, 2, 2))
    table, ends = rope(length), torch.tensor([length, 9 + seed])
    found = [*apply_rotary(q, k, table), attention(q, k, v, table, is_causal=True)]
    caches = torch.zeros(2, 2, length, 2, DIMS, dtype=torch.float64)
    append_kv(k, v, *caches, length)
    for tables in (rope.stack(), rope.at(ends)):
        found.append(decode_attention(q[:, -1:], *caches, tables, ends))
    q.requires_grad_()
    out = attention(q, k, v, table, is_causal=True, softcap=3.0)
    return [*found, *torch.autograd.grad(out.square().sum(), q), table.freq, table.coarse]


def at_once(call: Callable[[int], Any], rounds: int = 3) -> dict[int, list[Any]]:
    """What `call` of 0 .. 7 returns in as many threads that start together, round after round."""
    found: dict[int, list[Any]] = {n: [] for n in range(WORKERS)}
    gate = threading.Barrier(WORKERS, timeout=SECONDS)

    def serve(n: int) -> None:
        for _ in range(rounds):
            gate.wait()
            found[n].append(call(n))

    threads = [threading.Thread(target=serve, args=(n,), daemon=True) for n in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread hangs"
    assert all(len(results) == rounds for results in found.values()), "a thread failed"
    return found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("cache_bytes", [256 << 20, 20_000], ids=["all-kept", "evicting"])
def test_threads_that_share_a_module_get_what_one_gets(cache_bytes: int) -> None:
    rope = make_rope().double()
    expected = [work(rope, n) for n in range(WORKERS)]
    # with a small budget threads drop each other's tables all the time.
    rope._cache = TableCache(cache_bytes)
    found = at_once(lambda n: work(rope, n))
    assert all(equal(results, expected[n]) for n, rounds in found.items() for results in rounds)


def test_threads_survive_an_invalidation_at_any_time() -> None:
    rope = make_rope().double()
    expected = [work(rope, n) for n in range(WORKERS)]

    def call(n: int) -> list[Tensor]:
        rope.invalidate()
        return work(rope, n)

    assert all(equal(results, expected[n]) for n, rounds in at_once(call).items() for results in rounds)


def test_threads_that_share_a_layer_and_a_model_get_what_one_gets() -> None:
    layer, rope, model = make_layer().double().eval(), make_rope().double(), clex_model("llama").double().eval()

    @torch.no_grad()
    def call(n: int) -> list[Tensor]:
        length = 5 + 3 * n
        x, tokens = normal(n, 2, length, 24), random_tokens(1, length, seed=n)
        step = model(tokens, use_cache=True)
        following = model(tokens[:, :1], past_key_values=step.past_key_values).logits
        return [layer(x, rope(length)), step.logits, following]

    expected = [call(n) for n in range(WORKERS)]
    # products of a thread may be aligned otherwise.
    for n, rounds in at_once(call).items():
        for results in rounds:
            for actual, right in zip(results, expected[n], strict=True):
                torch.testing.assert_close(actual, right, rtol=0.0, atol=1e-12)


def forked(call: Callable[[], bool]) -> int:
    """Exit status of a forked child: 0 if the call is true there; a child that hangs is ended by an alarm."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(SECONDS)
            status = 0 if call() else 2
        finally:
            # no handlers of the parent's run.
            os._exit(status)
    return os.waitpid(child, 0)[1]


# fork is of a process with several threads here, which Python 3.12 warns of.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_goes_on_with_what_its_parent_used(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rope = make_rope().double()
        expected = [work(rope, n) for n in (0, 4, 7)]

        def in_child() -> bool:
            torch.set_num_threads(1)
            same = all(equal(work(rope, n), right) for n, right in zip((0, 4, 7), expected, strict=True))
            # tables that the parent does not have, and weights of the child's own.
            with torch.no_grad():
                rope.proj_func.ode_down_proj.mul_(2.0)
            return same and not torch.equal(rope(250).freq, expected[2][-2])

        assert forked(in_child) == 0
        # the child's writes are its own.
        assert equal(work(rope, 7), expected[2])
    finally:
        torch.set_num_threads(before)


def serve(requests: Any, answers: Any) -> None:
    """A spawned process: what comes is used as it came."""
    torch.set_num_threads(1)
    rope, table, stack, config = requests.get(timeout=SECONDS)
    q, k = normal(1, 2, 30, 4, DIMS), normal(2, 2, 30, 2, DIMS)
    rotated = apply_rotary(q, k, table)
    chosen = decode_attention(q[:, -1:], k, k, stack, torch.tensor([30, 4]))
    answers.put([*rotated, chosen, *work(rope, 3), ClexRotaryEmbedding(config).eval()(40).freq, rope(77)])
    # memory of what was sent is this process's until it is received.
    requests.get(timeout=SECONDS)


def test_modules_tables_and_configs_travel_to_a_spawned_process_and_back() -> None:
    context = multiprocessing.get_context("spawn")
    requests, answers = context.Queue(), context.Queue()
    process = context.Process(target=serve, args=(requests, answers), daemon=True)
    process.start()
    try:
        rope = make_rope().double()
        # parameters that require grad travel, results of theirs do not.
        table, stack = rope(30), rope.stack()
        requests.put((rope, table, stack, CONFIG))
        *found, far = answers.get(timeout=2 * SECONDS)
        q, k = normal(1, 2, 30, 4, DIMS), normal(2, 2, 30, 2, DIMS)
        expected = [*apply_rotary(q, k, table), decode_attention(q[:, -1:], k, k, stack, torch.tensor([30, 4]))]
        assert equal(found, [*expected, *work(rope, 3), ClexRotaryEmbedding(CONFIG).eval()(40).freq])
        assert isinstance(far, RotaryTable)
        assert torch.equal(far.coarse, rope(77).coarse)
        requests.put(None)
        process.join(SECONDS)
        assert process.exitcode == 0
    except queue.Empty:
        pytest.fail(f"the process gave no answer, exit code {process.exitcode}")
    finally:
        process.kill()


class Rotated(Dataset):
    """Rotates in the worker."""

    def __init__(self, rope: ClexRotaryEmbedding):
        self.rope = rope

    def __len__(self) -> int:
        return 12

    def __getitem__(self, n: int) -> Tensor:
        return apply_rotary(normal(n, 1, 40, 2, DIMS), None, self.rope(40 + 15 * n))[0][0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_dataset_may_rotate_in_the_workers_of_a_loader() -> None:
    data = Rotated(make_rope(ClexConfig(head_dim=DIMS, train_length=32, max_factor=8)).double())
    expected = [data[n] for n in range(len(data))]
    loader = DataLoader(data, batch_size=4, num_workers=2, timeout=SECONDS, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), torch.stack(expected))
