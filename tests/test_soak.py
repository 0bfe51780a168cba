"""Thousands of decode steps of a mixed batch, over every boundary of t: right at all times, in the same memory.

Sequences of different lengths grow by a token a step; one that is full makes room for a new one, whose slots or pages
held others before. Outputs are compared with attention over the whole sequence, computed anew in fp64 from keys and
values that are kept apart. The 20,000 steps are marked long; the rest is the same in short.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from ropes import make_rope, seeded, solved
from torch import Tensor
from transformers import DynamicCache
from transformers_models import TRAIN_LENGTH, clex_model, random_tokens, true_logits

from clex_kernels import ClexConfig, ClexRotaryEmbedding, append_kv, decode_attention

HEADS, GROUPS, DIMS, PAGE = 4, 2, 8, 16
FACTORS = 8
SLOTS = 16 * FACTORS
STARTS = (1, 17, 40, 90, 63)
LONG = pytest.mark.long


class Usage(ctypes.Structure):
    """glibc's mallinfo2."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated_bytes() -> int:
    """Bytes in use from malloc: what leaks, also too little to see in resident memory."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        pytest.skip("needs glibc 2.33")
    mallinfo.restype = Usage
    gc.collect()
    usage = mallinfo()
    return usage.uordblks + usage.hblkhd


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@dataclass
class Memory:
    """Readings after warm-up, as bytes allocated, blocks of Python's own and bytes resident."""

    readings: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # what is there already need not be looked through at every reading.
        gc.collect()
        gc.freeze()

    def read(self) -> None:
        self.readings.append((allocated_bytes(), sys.getallocatedblocks(), resident_bytes()))

    def growth(self) -> tuple[int, ...]:
        """From the first quarter's largest to the last one's smallest: what comes and goes does not count."""
        part = len(self.readings) // 4
        first, last = zip(*self.readings[:part], strict=True), zip(*self.readings[-part:], strict=True)
        return tuple(min(late) - max(early) for early, late in zip(first, last, strict=True))


def assert_steady(memory: Memory, steps: int) -> None:
    allocated, blocks, resident = memory.growth()
    # some 0.4 of the steps lie between; 40 bytes is a string that leaks. Caches of Python and of torch take the rest.
    assert allocated < 8 * 0.4 * steps + (40 << 10), memory.readings
    assert blocks < 0.02 * steps + 600, memory.readings
    assert resident < (2 << 20), memory.readings


class Batch:
    """Sequences in slots of a contiguous or paged cache, with a copy of their keys and values."""

    def __init__(self, is_paged: bool):
        count, size = len(STARTS), (GROUPS, DIMS)
        self.generator = seeded(1)
        self.lengths = [0] * count
        self.history = torch.zeros(2, count, SLOTS, *size, dtype=torch.float64)
        self.pages = None
        shape = (count, SLOTS, *size)
        if is_paged:
            # a page more than sequences need: their pages move, as one that ends leaves its own last in the queue.
            shape = (count * SLOTS // PAGE + 1, PAGE, *size)
            self.free = torch.randperm(shape[0], generator=self.generator).tolist()
            self.held: list[list[int]] = [[] for _ in STARTS]
            self.pages = torch.full((count, SLOTS // PAGE), -1, dtype=torch.int32)
        # what nobody wrote must not matter.
        self.caches = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def append(self, new: int, sequences: list[int]) -> None:
        """`new` tokens to each of the sequences, the others get none."""
        ends = torch.zeros(len(self.lengths), dtype=torch.int64)
        k, v = self.normal(2, len(self.lengths), new, GROUPS, DIMS)
        for b in sequences:
            begin, self.lengths[b] = self.lengths[b], self.lengths[b] + new
            self.history[0, b, begin : self.lengths[b]], self.history[1, b, begin : self.lengths[b]] = k[b], v[b]
            ends[b] = self.lengths[b]
            while self.pages is not None and len(self.held[b]) * PAGE < self.lengths[b]:
                self.held[b].append(self.free.pop(0))
                self.pages[b, len(self.held[b]) - 1] = self.held[b][-1]
        append_kv(k, v, *self.caches, ends, self.pages)

    def replace_full(self) -> None:
        for b, length in enumerate(self.lengths):
            if length in (0, SLOTS):
                self.lengths[b] = 0
                if self.pages is not None:
                    self.free += self.held[b]
                    self.held[b], self.pages[b] = [], -1
                # starts move on, so that sequences meet boundaries at ever other times.
                self.append((STARTS[b] + int(self.normal(1).abs() * 9)) % (SLOTS - 2) + 1, [b])


def recomputed(q: Tensor, keys: Tensor, values: Tensor, freq: Tensor) -> Tensor:
    """Attention [H, D] of one query [H, D], the last of the sequence of keys and values [S, G, D]."""
    angles = torch.arange(len(keys), dtype=torch.float64)[:, None] * freq

    def turn(x: Tensor, angles: Tensor) -> Tensor:
        x0, x1 = x.chunk(2, dim=-1)
        return torch.cat((x0 * angles.cos() - x1 * angles.sin(), x1 * angles.cos() + x0 * angles.sin()), dim=-1)

    q, keys = turn(q, angles[-1]), turn(keys, angles[:, None])
    keys, values = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (keys, values))
    weights = torch.einsum("hd,shd->hs", q, keys).div(DIMS**0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


def factor(rope: ClexRotaryEmbedding, length: int) -> float:
    return rope.config.length_factor(length)


def decode(batch: Batch, rope: ClexRotaryEmbedding) -> tuple[Tensor, Tensor]:
    """A step of all sequences: q and out [B, 1, H, D]."""
    batch.append(1, list(range(len(batch.lengths))))
    q, ends = batch.normal(len(batch.lengths), 1, HEADS, DIMS), torch.tensor(batch.lengths)
    table = rope.stack() if rope.config.scale_policy == "integer" else rope.at(ends)
    return q, decode_attention(q, *batch.caches, table, ends, block_table=batch.pages)


def largest_error(batch: Batch, rope: ClexRotaryEmbedding, q: Tensor, out: Tensor) -> float:
    errors = []
    for b, length in enumerate(batch.lengths):
        (freq,) = solved(rope, factor(rope, length))
        expected = recomputed(q[b, 0], *batch.history[:, b, :length], freq)
        errors.append((out[b, 0] - expected).abs().max().item())
    return max(errors)


def run(steps: int, policy: str, is_paged: bool) -> Iterator[float]:
    """Errors at intervals; ends with the checks of memory, of the table cache and of the boundaries."""
    config = ClexConfig(head_dim=DIMS, train_length=SLOTS // FACTORS, max_factor=FACTORS, scale_policy=policy)
    rope = make_rope(config).double()
    batch, memory, crossed, crossings, caches = Batch(is_paged), Memory(), set(), 0, set()
    for step in range(steps):
        batch.replace_full()
        before = [factor(rope, length) for length in batch.lengths]
        q, out = decode(batch, rope)
        after = [factor(rope, length) for length in batch.lengths]
        met = [(int(t), int(u)) for t, u in zip(before, after, strict=True) if int(t) < int(u)]
        crossed, crossings = crossed | set(met), crossings + len(met)
        # an odd number, so that all lengths have their turn.
        if step % 149 == 0:
            yield largest_error(batch, rope, q, out)
        if step >= steps // 5 and step % (steps // 20) == 0:
            memory.read()
            caches.add(rope.cache_stats()[2:])
    assert crossed == {(t, t + 1) for t in range(1, FACTORS)}
    assert_steady(memory, steps)
    # evictions, bytes, entries and invalidations stay as they are.
    assert len(caches) == 1
    print(f"\n{steps} steps, {policy}, paged {is_paged}, {crossings} boundaries, growth {memory.growth()}", end="")


@pytest.mark.parametrize("steps", [1500, pytest.param(20_000, marks=LONG)])
@pytest.mark.parametrize(("policy", "is_paged"), [("integer", False), ("integer", True), ("continuous", False)])
def test_decoding_stays_right_and_in_its_memory(steps: int, policy: str, is_paged: bool) -> None:
    errors = list(run(steps, policy, is_paged))
    print(f", largest error {max(errors):.1e} of {len(errors)} comparisons")
    assert max(errors) < 1e-10


def test_looking_up_tables_leaks_nothing() -> None:
    rope, lengths = make_rope(), torch.tensor([40, 200])

    def look_up(times: int) -> int:
        for _ in range(times):
            rope(40), rope.stack(), rope.at(lengths)
        return allocated_bytes()

    look_up(200)
    before = look_up(200)
    # torch's stable ABI loses every string that an operator takes: 40 bytes for each of these calls.
    assert look_up(1000) - before < 10 * 1000


@pytest.mark.parametrize("steps", [200, pytest.param(4000, marks=LONG)])
def test_a_transformers_model_decodes_one_sequence_after_another_in_constant_memory(steps: int) -> None:
    # keys of a deeper layer would carry the t of their time.
    model = clex_model("llama", layers=1).double().eval()
    limit = TRAIN_LENGTH * model.base_model.clex_layer.config.max_factor
    memory, errors, step, sequence = Memory(), [], 0, 0
    while step < steps:
        tokens, cache = random_tokens(1, limit, seed=sequence), DynamicCache()
        start = 1 + 5 * sequence % (limit // 2)
        for begin, end in ((0, start), *((n, n + 1) for n in range(start, limit))):
            with torch.no_grad():
                logits = model(tokens[:, begin:end], past_key_values=cache).logits[:, -1]
            step += 1
            if step % 31 == 0:
                errors.append((logits - true_logits(model, tokens[:, :end])[:, -1]).abs().max().item())
            if step >= steps // 5 and step % (steps // 20) == 0:
                memory.read()
        sequence += 1
    assert max(errors) < 1e-10
    assert_steady(memory, steps)
    print(f"\n{step} steps: growth {memory.growth()}, largest error {max(errors):.1e} of {len(errors)}")
