"""One decode step over a cache of raw keys, or a pool of pages of them, beside attention over rotated keys.

Keys and queries of the rivals were rotated beforehand, at no cost to them; those that rotate a raw cache in the step
stand beside them. Two caches alternate, the keys of one being the values of the other.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import exact, formulations
from benchmarks.measure import Way
from benchmarks.on_gpu import angles, rivals
from benchmarks.on_gpu.case import OVER_FLOOR, OVER_RIVAL, SETS, Aim, Bench, Case, draw, errors_of
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.shapes import ROTARY_DTYPES, DecodeShape
from clex_kernels import RotaryTable, apply_rotary, decode_attention

OURS = "decode_attention over raw keys"
UNROTATED = "decode_attention over rotated keys"
ROUND_TRIP = "torch.compile: rotate all raw keys, attend"
# the slow ways run in one of so many rounds.
SLOW = 5

Run = Callable[["InputSet"], Tensor]


class InputSet:
    """q [B, 1, H, D] and caches [B, S, G, D], raw; q and keys by each kind of angles come from `rotated`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.q, self.k, self.v = q, k, v
        self.rotated_q, self.rotated_k = q, k
        self.truths: dict[str, Tensor] = {}

    def rotate(self, table: RotaryTable) -> None:
        """Makes rotated_q and rotated_k; q stands at the last slot."""
        self.rotated_k = apply_rotary(self.k, None, table)[0]
        self.rotated_q = apply_rotary(self.q, None, table, offset=self.k.shape[1] - 1)[0]

    def grouped(self, rotated: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, G, H/G, D], keys and values [B, G, S, D]."""
        q, k = (self.rotated_q, self.rotated_k) if rotated else (self.q, self.k)
        return q.unflatten(2, (k.shape[2], -1))[:, 0], k.transpose(1, 2), self.v.transpose(1, 2)


class Decode:
    """Both input sets; every way reads `now`, the one in turn."""

    def __init__(self, gpu: Gpu, shape: DecodeShape):
        self.gpu, self.shape, self.dtype = gpu, shape, ROTARY_DTYPES[shape.dtype]
        cache = (shape.B, shape.S, shape.G, shape.D)
        query = (shape.B, 1, shape.H, shape.D)
        k, v, *queries = draw(gpu, 3, cache, cache, *[query] * SETS, dtype=self.dtype)
        self.sets = [InputSet(q, *pair) for q, pair in zip(queries, ((k, v), (v, k)), strict=True)]
        self.now = self.sets[0]
        self.ends = torch.full((shape.B,), shape.S, dtype=torch.int64, device=gpu.device)
        self.freqs = {
            kind: angles.frequencies(kind, shape.D, shape.D // 2).to(gpu.device) for kind in ("clex", "plain")
        }
        self.table = RotaryTable.from_frequencies(self.freqs["clex"], length=shape.S)
        with torch.no_grad():
            for each in self.sets:
                each.rotate(self.table)

    @property
    def cost(self) -> Cost:
        """Keys and values, each once; two products of one query head with every key of its own."""
        tokens = self.shape.B * self.shape.S
        size = 2 * tokens * self.shape.G * self.shape.D * self.dtype.itemsize
        return Cost(size, 4 * tokens * self.shape.H * self.shape.D)

    def load(self, turn: int) -> None:
        self.now = self.sets[turn % SETS]

    def errors(self, kind: str, turn: int, out: Tensor) -> dict[str, float]:
        drawn = self.sets[turn % SETS]
        if kind not in drawn.truths:
            with torch.device(self.gpu.device):
                rows = [
                    exact.decode(q[0], k, v, self.freqs[kind])
                    for q, k, v in zip(drawn.q, drawn.k, drawn.v, strict=True)
                ]
            drawn.truths[kind] = torch.stack(rows)[:, None]
        truth = drawn.truths[kind]
        return errors_of({"out": out.reshape(truth.shape)}, {"out": truth})

    def way(self, name: str, run: Run, kind: str = "clex", every: int = 1) -> Way:
        @torch.no_grad()
        def timed() -> Tensor:
            return run(self.now)

        return Way(name, timed, self.load, partial(self.errors, kind), every)

    def rival(self, name: str, needs: tuple[str, ...], make: Callable[[], Run], kind: str = "clex") -> Rival:
        return Rival(name, lambda: self.way(name, make(), kind), needs)

    def ours(self) -> Way:
        return self.way(OURS, lambda now: decode_attention(now.q, now.k, now.v, self.table, self.ends))

    def unrotated(self) -> Way:
        def run(now: InputSet) -> Tensor:
            return decode_attention(now.rotated_q, now.rotated_k, now.v, self.table, self.ends, rotated="qk")

        return self.way(UNROTATED, run)

    def over_rotated(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        """By a function of q [B, 1, H, D] and caches as they are."""
        return lambda now: attend(now.rotated_q, now.rotated_k, now.v)

    def rivals(self) -> list[Rival]:
        def sdpa(name: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rival:
            return self.rival(name, (), lambda: lambda now: attend(*now.grouped()))

        packages = [
            self.rival(
                f"{name} flash_attn_with_kvcache",
                (module,),
                lambda module=module: self.over_rotated(rivals.flash_decode(module, self.ends)),
            )
            for name, module in rivals.FLASH_ATTENTION.items()
        ]
        return [
            *packages,
            *([self.flashinfer("FlashInfer single_decode")] if self.shape.B == 1 else [self.flashinfer_batch()]),
            *(
                sdpa(f"SDPA by {name}, q viewed per key head", rivals.sdpa_decode_by(backend))
                for name, backend in rivals.SDPA_BACKENDS.items()
            ),
            sdpa("SDPA, q viewed per key head", formulations.decode_sdpa),
            sdpa("softmax(q k^T) v", formulations.decode_softmax),
        ]

    def flashinfer(self, name: str) -> Rival:
        return self.rival(name, ("flashinfer",), lambda: self.over_rotated(rivals.flashinfer_decode()))

    def flashinfer_batch(self) -> Rival:
        """Every sequence is one page after another of its cache."""
        page = 16
        pages = self.shape.S // page
        numbers = torch.arange(self.shape.B * pages, device=self.gpu.device).view(self.shape.B, pages)

        def make() -> Run:
            heads = (self.shape.H, self.shape.G, self.shape.D)
            attend = rivals.flashinfer_paged_decode(heads, page, self.ends, numbers, self.dtype)

            def run(now: InputSet) -> Tensor:
                k, v = (x.view(-1, page, *x.shape[2:]) for x in (now.rotated_k, now.v))
                return attend(now.rotated_q, k, v)

            return run

        return self.rival("FlashInfer batch decode", ("flashinfer",), make)

    def rotating(self) -> list[Rival]:
        """What rotates a raw cache in the step: all of it anew, or by plain RoPE on the way."""

        def make() -> Way:
            positions = torch.arange(self.shape.S, device=self.gpu.device)
            tables = angles.doubled_tables(self.freqs["clex"], positions, self.dtype)
            attend = formulations.attend(formulations.rotate_and_attend, compiled=True)
            return self.way(ROUND_TRIP, lambda now: attend(*now.grouped(rotated=False), *tables), every=SLOW)

        def on_the_way() -> Run:
            attend = rivals.flashinfer_decode(rotates=True)
            return lambda now: attend(now.q, now.k, now.v)

        name = "FlashInfer single_decode over raw keys, plain RoPE of base 10000"
        plain = [self.rival(name, ("flashinfer",), on_the_way, "plain")] if self.shape.B == 1 else []
        return [Rival(ROUND_TRIP, make), *plain]


def layout(shape: DecodeShape) -> str:
    """As it lies in memory here: token by token."""
    return f"q {[shape.B, 1, shape.H, shape.D]}, caches {[shape.B, shape.S, shape.G, shape.D]} in memory"


def contiguous(shape: DecodeShape, gpu: Gpu) -> Bench:
    case = Decode(gpu, shape)
    return Bench(
        ours=ready(case.ours()),
        rivals=case.rivals(),
        own=[ready(case.unrotated())],
        besides=case.rotating(),
        without=UNROTATED,
        cost=case.cost,
        aims=[
            Aim(UNROTATED, 1.25, "time over the same kernel without rotation"),
            Aim(OVER_FLOOR, 1.5, "time over reading K and V once (the measured floor)"),
            Aim(OVER_RIVAL, 1.0, "time over the fastest rival"),
        ],
        notes=[layout(shape), "rivals' keys and queries were rotated beforehand", "t = 16"],
    )


class Paged(Decode):
    """The same caches cut into pages, which lie in the pool in any order."""

    def __init__(self, gpu: Gpu, shape: DecodeShape, page: int):
        super().__init__(gpu, shape)
        self.page = page
        pages = shape.S // page
        order = torch.randperm(shape.B * pages, generator=torch.Generator().manual_seed(1))
        self.block_table = order.view(shape.B, pages).to(gpu.device)
        self.pools = {id(each): self.to_pages(each) for each in self.sets}

    def to_pages(self, drawn: InputSet) -> tuple[Tensor, Tensor, Tensor]:
        """Raw keys, values and rotated keys [pages, P, G, D]."""
        pools = []
        for x in (drawn.k, drawn.v, drawn.rotated_k):
            pool = torch.empty_like(x).view(-1, self.page, *x.shape[2:])
            pool[self.block_table.flatten()] = x.view(pool.shape)
            pools.append(pool)
        return tuple(pools)

    def step(self, name: str, rotated: bool) -> Way:
        options = {"block_table": self.block_table, **({"rotated": "qk"} if rotated else {})}

        def run(now: InputSet) -> Tensor:
            k, v, rotated_k = self.pools[id(now)]
            q, k = (now.rotated_q, rotated_k) if rotated else (now.q, k)
            return decode_attention(q, k, v, self.table, self.ends, **options)

        return self.way(name, run)

    def rivals(self) -> list[Rival]:
        def over_pages(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
            def run(now: InputSet) -> Tensor:
                _, v, rotated_k = self.pools[id(now)]
                return attend(now.rotated_q, rotated_k, v)

            return run

        def flashinfer() -> Run:
            heads = (self.shape.H, self.shape.G, self.shape.D)
            attend = rivals.flashinfer_paged_decode(heads, self.page, self.ends, self.block_table, self.dtype)
            return over_pages(attend)

        return [
            self.rival("FlashInfer batch decode", ("flashinfer",), flashinfer),
            *(
                self.rival(
                    f"{name} flash_attn_with_kvcache",
                    (module,),
                    lambda module=module: over_pages(rivals.flash_decode(module, self.ends, self.block_table)),
                )
                for name, module in rivals.FLASH_ATTENTION.items()
            ),
        ]


def paged(shape: DecodeShape, page: int, gpu: Gpu) -> Bench:
    case = Paged(gpu, shape, page)
    contiguous_way = case.ours()
    return Bench(
        ours=ready(case.step(f"{OURS}, paged", rotated=False)),
        rivals=case.rivals(),
        own=[ready(case.step(f"{UNROTATED}, paged", rotated=True)), ready(contiguous_way)],
        without=f"{UNROTATED}, paged",
        cost=case.cost,
        notes=[layout(shape), f"pages of {page} slots in random order"],
    )


def decode_cases(sizes: Sizes) -> list[Case]:
    steps = [Case("decode", "decode step", shape.name, partial(contiguous, shape)) for shape in sizes.decode]
    pages = [
        Case(
            "decode",
            "decode step over pages",
            f"{sizes.paged.name}, pages of {page}",
            partial(paged, sizes.paged, page),
        )
        for page in sizes.pages
    ]
    return [*steps, *pages]
