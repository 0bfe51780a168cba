"""One decode step over two caches that alternate: inputs, truths, and the ways to attend over them.

The keys of one cache are the values of the other, and with the cache the query and t change. Before every call other
memory is read, more than the CPU's caches hold: a layer of a model finds its cache cold.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way, errors_over_largest, peak_memory
from benchmarks.shapes import DecodeShape
from benchmarks.weights import Weights
from clex_kernels import ClexRotaryEmbedding, RotaryTable, RotaryTableStack, apply_rotary, decode_attention, reference
from clex_kernels.tables import TILE

SETS = 2
# t of the two input sets, where the lengths don't say it.
TIMES = (16, 9)
OTHERS_BYTES = 96 << 20
OURS = "decode_attention over raw keys"
UNROTATED = "decode_attention over rotated keys, nothing to rotate"
# the slow ways run in one of so many rounds.
SLOW = 7

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
READERS = {
    "dot of K and V": formulations.read_by_dot,
    "sums of K and of V": formulations.read_by_sum,
    "maxima of K and of V": formulations.read_by_max,
}


def make_stack(weights: Weights) -> RotaryTableStack:
    rope = ClexRotaryEmbedding(weights.config)
    with torch.no_grad():
        rope.proj_func.ode_up_proj.copy_(weights.up)
        rope.proj_func.ode_down_proj.copy_(weights.down)
    return rope.eval().requires_grad_(False).stack()


@torch.no_grad()
def rotate_keys(k: Tensor, table: RotaryTable | RotaryTableStack) -> Tensor:
    """Rotated keys that lie in memory as k [B, S, G, D] does."""
    rotated = torch.empty_like(k)
    apply_rotary(k, None, table, out=(rotated, None))
    return rotated


class InputSet:
    """q [B, 1, H, D], caches [B, S, G, D] that are head-major in memory, and q and keys rotated beforehand."""

    def __init__(self, shape: DecodeShape, pool: Tensor, turn: int, freqs: Tensor, stack: RotaryTableStack | None):
        k, v = (x[: torch.Size(shape.cache).numel()].view(shape.cache) for x in (pool[turn], pool[1 - turn]))
        self.k, self.v = k.transpose(1, 2), v.transpose(1, 2)
        generator = torch.Generator().manual_seed(turn)
        self.q = torch.randn(shape.B, 1, shape.H, shape.D, generator=generator).to(k.dtype)
        lengths = shape.lengths or (shape.S,) * shape.B
        self.lengths = lengths[::-1] if turn else lengths
        self.kv_end = torch.tensor(self.lengths)
        self.table: RotaryTable | RotaryTableStack
        if stack is None:
            self.freqs = [freqs[TIMES[turn] - 1]] * shape.B
            self.table = table = RotaryTable.from_frequencies(self.freqs[0], length=shape.S)
        else:
            self.table, table = stack, stack.select(self.kv_end)
            self.freqs = [freqs[-(-length // stack.train_length) - 1] for length in self.lengths]
        self.rotated_k = rotate_keys(self.k, table)
        self.rotated_q = apply_rotary(self.q, None, table, position_ids=self.kv_end[:, None] - 1)[0]

    @functools.cached_property
    def truth(self) -> Tensor:
        """[B, 1, H, D] in fp64."""
        rows = zip(self.q, self.k, self.v, self.freqs, self.lengths, strict=True)
        return torch.stack([exact.decode(q[0], k[:end], v[:end], freq)[None] for q, k, v, freq, end in rows])

    def grouped(self, rotated: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, G, H/G, D], keys and values [B, G, S, D]."""
        q, k = (self.rotated_q, self.rotated_k) if rotated else (self.q, self.k)
        return q.unflatten(2, (k.shape[2], -1))[:, 0], k.transpose(1, 2), self.v.transpose(1, 2)


class Case:
    """Both input sets; every way reads `now`, the one in turn."""

    def __init__(self, shape: DecodeShape, pool: Tensor, weights: Weights):
        self.shape, self.weights = shape, weights.kind
        times = torch.arange(1, weights.config.max_factor + 1, dtype=torch.float64)
        self.freqs = exact.solve_exactly(*weights.sets[0], times, weights.config)
        stack = None if shape.lengths is None else make_stack(weights)
        self.sets = [InputSet(shape, pool, turn, self.freqs, stack) for turn in range(SETS)]
        self.now = self.sets[0]
        self.others = pool.view(-1)[-OTHERS_BYTES // pool.element_size() :].view(torch.float32)
        self.allocated: int | None = None

    @property
    def factors(self) -> str:
        if self.shape.lengths is not None:
            return "each sequence's t by its length, lengths change places every round"
        return " and ".join(f"t = {t}" for t in TIMES) + " alternate"

    @property
    def tokens(self) -> int:
        return sum(self.now.lengths)

    @property
    def bytes_moved(self) -> int:
        """Keys and values, and the rows of the tables as if each sequence read its own."""
        keys = 2 * self.tokens * self.shape.G * self.shape.D * self.now.q.element_size()
        return keys + sum(table_bytes(length, self.shape.D) for length in self.now.lengths)

    def load(self, turn: int) -> None:
        self.now = self.sets[turn % SETS]
        self.others.sum()

    def errors(self, turn: int, out: Tensor) -> dict[str, float]:
        truth = self.sets[turn % SETS].truth
        return errors_over_largest({"out": out.reshape(truth.shape)}, {"out": truth})

    def follow(self, way: Way) -> Tensor:
        """A way's first call; `allocated` are then the bytes that ours holds beside its output."""
        if way.name != OURS:
            return way.run()
        out, peak = peak_memory(way.run, torch.device("cpu"))
        self.allocated = peak - out.numel() * out.element_size()
        return out

    def way(self, name: str, run: Callable[[InputSet], Tensor], every: int = 1) -> Way:
        return Way(name, lambda: run(self.now), self.load, self.errors, every)

    def ours(self) -> Way:
        return self.way(OURS, lambda now: decode_attention(now.q, now.k, now.v, now.table, now.kv_end))

    def unrotated(self) -> Way:
        def run(now: InputSet) -> Tensor:
            return decode_attention(now.rotated_q, now.rotated_k, now.v, now.table, now.kv_end, rotated="qk")

        return self.way(UNROTATED, run)

    def token_major(self) -> Way:
        caches = {id(drawn): (drawn.k.contiguous(), drawn.v.contiguous()) for drawn in self.sets}
        return self.way(
            "decode_attention over raw keys, token-major cache",
            lambda now: decode_attention(now.q, *caches[id(now)], now.table, now.kv_end),
        )

    def rivals(self) -> list[Way]:
        """Attention over keys and queries that were rotated beforehand, at no cost."""

        def way(name: str, attend: Attend) -> Way:
            return self.way(name, lambda now: attend(*now.grouped()))

        ways = [
            way("SDPA, q viewed per key head", formulations.decode_sdpa),
            way("softmax(q k^T) v", formulations.decode_softmax),
            way("split-KV SDPA and its merge", formulations.decode_split),
        ]
        compiled = formulations.attend(formulations.decode_softmax, compiled=True)
        return ways if self.shape.B > 1 else [*ways, way("torch.compile softmax(q k^T) v", compiled)]

    def mixed_rivals(self) -> list[Way]:
        """The same over sequences of several lengths, one by one or all at once under a mask."""

        def one_by_one(name: str, attend: Attend) -> Way:
            def run(now: InputSet) -> Tensor:
                rows = zip(*now.grouped(), now.lengths, strict=True)
                return torch.stack([attend(q[None], k[None, :, :end], v[None, :, :end])[0] for q, k, v, end in rows])

            return self.way(name, run)

        masks = {id(drawn): (torch.arange(self.shape.S) < drawn.kv_end[:, None])[:, None, None] for drawn in self.sets}
        return [
            one_by_one("SDPA, sequence by sequence", formulations.decode_sdpa),
            one_by_one("softmax(q k^T) v, sequence by sequence", formulations.decode_softmax),
            self.way("SDPA under a mask", lambda now: formulations.decode_sdpa(*now.grouped(), masks[id(now)])),
        ]

    def rotating_ways(self) -> list[Way]:
        """The whole raw cache rotated at every step; cos and sin are made beforehand, in the cache's dtype."""
        positions = torch.arange(self.shape.S, dtype=torch.float64)
        tables = {
            id(drawn): [x.to(drawn.q.dtype) for x in reference.tables(drawn.freqs[0], positions)] for drawn in self.sets
        }
        compiled = formulations.attend(formulations.rotate_and_attend, compiled=True)
        return [
            self.way(name, lambda now, attend=attend: attend(*now.grouped(rotated=False), *tables[id(now)]), SLOW)
            for name, attend in {
                "eager: rotate all keys, repeat them, attend (the authors)": formulations.rotate_and_attend_repeated,
                "torch.compile: rotate all keys, attend": compiled,
            }.items()
        ]

    def floors(self) -> list[Way]:
        """Results go unchecked: fp32 is no type to sum so many numbers in. That every byte counts has a test."""
        ways = [
            self.way(f"floor: {name}", lambda now, read=read: read(now.k.transpose(1, 2), now.v.transpose(1, 2)))
            for name, read in READERS.items()
        ]
        return [replace(way, errors=lambda turn, result: {}) for way in ways]


def on_threads(way: Way, threads: int, name: str) -> Way:
    """The way under another name, on so many threads from there on."""

    def prepare(turn: int) -> None:
        way.prepare(turn)
        torch.set_num_threads(threads)

    return replace(way, name=name, prepare=prepare)


def table_bytes(keys: int, dims: int) -> int:
    """fp32 cos and sin: the rows of the fine table, and one of the coarse table per tile of keys."""
    return (TILE + -(-keys // TILE)) * dims * 4
