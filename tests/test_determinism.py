"""Equal bits from equal inputs: run to run, in another process, and at any number of CPU threads.

What the package computes by itself has them always. Attention on the CPU, and the gradients of projections, run torch's
products, whose bits may change with the number of threads; torch.use_deterministic_algorithms(True) fixes these too.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import make_layer
from ropes import CONFIG, make_rope, seeded
from torch import Tensor

from clex_kernels import apply_rotary, attention, decode_attention, qkv_rotary, solve_frequencies
from clex_kernels.deterministic import fixed_products

THREADS = (1, 2, 3, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DIMS = CONFIG.head_dim


def digest(*tensors: Tensor | None) -> str:
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def gradients(outs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    outs = outs if isinstance(outs, tuple) else (outs,)
    directions = [normal(9 + i, *out.shape, dtype=out.dtype) for i, out in enumerate(outs)]
    return (*outs, *torch.autograd.grad(outs, inputs, directions))


def rope_for(dtype: torch.dtype) -> Any:
    return make_rope().double() if dtype == torch.float64 else make_rope()


def frequencies(dtype: torch.dtype) -> tuple[Tensor, ...]:
    up, down = (weight.detach().requires_grad_() for weight in rope_for(dtype).parameters())
    times = torch.arange(1.0, 9.0, dtype=torch.float64)
    return gradients(solve_frequencies(up, down, times, CONFIG), up, down)


def tables(dtype: torch.dtype) -> tuple[Tensor, ...]:
    rope = rope_for(dtype)
    found = [rope(200), rope.stack(), rope.at(torch.tensor([40, 77, 256]))]
    found += [rope.sample(150, batch=count, generator=seeded(2)) for count in (None, 3)]
    return tuple(x for table in found for x in (table.freq, table.coarse, table.fine))


def rotary(dtype: torch.dtype) -> tuple[Tensor, ...]:
    rope = rope_for(dtype).train()
    table = rope.sample(333, batch=3, generator=seeded(3))
    q, k = (normal(seed, 3, 333, heads, DIMS, dtype=dtype).requires_grad_() for seed, heads in ((1, 8), (2, 2)))
    return gradients(apply_rotary(q, k, table), q, k, table.freq, *rope.parameters())


def decoding(dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, v = (normal(heads, 3, size, heads, DIMS, dtype=dtype) for size, heads in ((2, 8), (256, 4), (256, 4)))
    ends = torch.tensor([250, 31, 140])
    return decode_attention(q, k, v, rope_for(dtype).stack(), ends, window=200, return_lse=True)


def one_token(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, weight = normal(1, 2, 1, 96, dtype=dtype), normal(2, 12 * DIMS, 96, dtype=dtype)
    return qkv_rotary(x, weight, rope_for(dtype)(200), num_heads=8, num_kv_heads=2, offset=150)


OURS: dict[str, Callable[[torch.dtype], tuple[Tensor, ...]]] = {
    "frequencies": frequencies,
    "tables": tables,
    "rotary": rotary,
    "decoding": decoding,
    "one token": one_token,
}


def attending(batch: int, queries: int, keys: int, groups: int, **terms: Any) -> Callable[..., tuple[Tensor, ...]]:
    def attend(dtype: torch.dtype) -> tuple[Tensor, ...]:
        table = rope_for(dtype).train().sample(keys, generator=seeded(3))
        shapes = ((queries, 8), (keys, groups), (keys, groups))
        q, k, v = (normal(i, batch, *shape, DIMS, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))
        return gradients(attention(q, k, v, table, **terms), q, k, v, table.freq)

    return attend


def projecting(length: int) -> Callable[..., tuple[Tensor, ...]]:
    def project(dtype: torch.dtype) -> tuple[Tensor, ...]:
        table = rope_for(dtype).train().sample(length, generator=seeded(3))
        shapes = ((2, length, 256), (12 * DIMS, 256))
        x, weight = (normal(i, *shape, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))
        return gradients(qkv_rotary(x, weight, table, num_heads=8, num_kv_heads=2), x, weight, table.freq)

    return project


WITH_TORCH = {
    # keys of one head, which threads share out by query heads.
    "attention of one key head": attending(1, 130, 130, 1, is_causal=True),
    "attention of grouped heads": attending(2, 130, 130, 2, is_causal=True),
    # torch's buffers of a thread are then not aligned alike.
    "attention of one query": attending(1, 1, 1500, 2),
    "attention in blocks": attending(2, 130, 300, 2, is_causal=True, softcap=5.0, return_lse=True),
    "attention in a window": attending(1, 300, 300, 2, window=40),
    "projection of few": projecting(3),
    "projection of many": projecting(120),
}


def digests(calls: dict[str, Callable[..., tuple[Tensor, ...]]]) -> dict[str, str]:
    return {f"{name} {dtype}": digest(*call(dtype)) for name, call in calls.items() for dtype in DTYPES}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_own_operators_give_equal_bits_at_any_number_of_threads(threads: Callable[[int], None]) -> None:
    found = []
    for count in THREADS:
        threads(count)
        found += [digests(OURS), digests(OURS)]
    assert all(some == found[0] for some in found)


@pytest.mark.usefixtures("deterministic")
def test_under_deterministic_algorithms_attention_and_projections_do_too(threads: Callable[[int], None]) -> None:
    found = []
    for count in THREADS:
        threads(count)
        found += [digests(WITH_TORCH)]
        assert torch.get_num_threads() == count
    assert all(some == found[0] for some in found)


def test_without_them_equal_runs_of_as_many_threads_give_equal_bits(threads: Callable[[int], None]) -> None:
    for count in (2, 7):
        threads(count)
        assert digests(WITH_TORCH) == digests(WITH_TORCH)


def layer_digest() -> str:
    layer, x = make_layer(), normal(5, 2, 77, 24, dtype=torch.float32).requires_grad_()
    out = layer(x, make_rope().train().sample(77, generator=seeded(3)))
    return digest(*gradients(out, x, *layer.parameters()))


def everything() -> dict[str, str]:
    torch.use_deterministic_algorithms(True)
    return digests(OURS | WITH_TORCH) | {"layer": layer_digest()}


def test_fresh_processes_give_the_same_bits() -> None:
    command = [sys.executable, "-c", "import json, test_determinism as t; print(json.dumps(t.everything()))"]
    found = []
    # a layer ends with a plain nn.Linear, whose products are torch's affair: as many threads for both.
    for count in ("2", "2"):
        env = os.environ | {"OMP_NUM_THREADS": count}
        env.pop("PYTEST_XDIST_WORKER", None)
        done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]


@pytest.mark.usefixtures("deterministic")
def test_the_number_of_threads_comes_back_after_an_error(threads: Callable[[int], None]) -> None:
    threads(3)
    seen = []

    @fixed_products()
    def fail() -> None:
        seen.append(torch.get_num_threads())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [*seen, torch.get_num_threads()] == [1, 3]
