"""What every launch table is tried on: a representative launch that looks up one of its entries, and what it must give.

Launchers are called directly. Before each launch its outputs hold NaN, so that none is judged by another's result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact
from benchmarks.on_gpu import angles
from benchmarks.on_gpu.case import draw, errors_of
from benchmarks.on_gpu.device import Gpu
from clex_kernels import RotaryTable, reference
from clex_kernels.attention_terms import Rule, Tables, Tokens
from clex_kernels.kernels import append, attention_bwd, attention_fwd, decode, qkv_rotary, rotary
from clex_kernels.kernels.launch_tables import ANY

DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
# D and rotated pairs of heads by the columns of their parts as padded.
HEADS = {64: (64, 32), 128: (128, 64), 192: (128, 16), 256: (256, 128), 512: (256, 32)}
MODEL_HEAD = (128, 64)


@dataclass(frozen=True)
class TuneSizes:
    """Lengths by kind of dtype, (H, G), slots of a cache, sequences of a short call, and C of a projection."""

    lengths: dict[str, int]
    heads: tuple[int, int]
    slots: int
    sequences: int
    columns: int
    rows_checked: int


TUNE = TuneSizes(
    {"half": 4096, "float32": 1024}, heads=(32, 8), slots=32 << 10, sequences=32, columns=4096, rows_checked=16
)


@dataclass(frozen=True)
class Subject:
    """A launch, the tensors it writes, and how far these are from what is true."""

    run: Callable[[], Any]
    outputs: tuple[Tensor, ...]
    errors: Callable[[Any], dict[str, float]]

    def spoil(self) -> None:
        for x in self.outputs:
            x.fill_(float("nan"))


class Angles:
    """CLEX's frequencies at t = 16, their factored tables as launchers take them, and the exact ones."""

    def __init__(self, gpu: Gpu, head: tuple[int, int], length: int, positions: Tensor | None = None):
        self.freq = angles.frequencies("clex", *head).to(gpu.device)
        where = {"length": length} if positions is None else {"positions": positions}
        table = RotaryTable.from_frequencies(self.freq, **where)
        in_order = torch.arange(length, dtype=torch.float64, device=gpu.device)
        self.positions = in_order if positions is None else positions
        self.tables = Tables(table.coarse[None], table.fine[None], None if positions is None else positions[None])

    def rotate(self, x: Tensor) -> Tensor:
        """In fp64, by the reference."""
        return reference.rotary(x.double(), *reference.tables(self.freq, self.positions))


class Attention:
    """Raw q, k and v and the keys rotated; causal, with everything that either pass takes."""

    def __init__(self, gpu: Gpu, kind: str, head: tuple[int, int], sizes: TuneSizes):
        length, (heads, groups), rows = sizes.lengths[kind], sizes.heads, sizes.rows_checked
        # wide heads get fewer, for the same work.
        heads, groups = max(groups, heads * 64 // head[0]), groups
        shapes = [(1, length, count, head[0]) for count in (heads, groups, groups)]
        dtype = DTYPES[kind]
        self.q, self.k, self.v, dout = draw(gpu, 1, *shapes, (1, rows, heads, head[0]), dtype=dtype)
        self.rows = torch.linspace(0, length - 1, rows, device=gpu.device).long()
        self.dout = torch.zeros_like(self.q)
        self.dout[:, self.rows] = dout
        self.angles = Angles(gpu, head, length)
        self.q_rotated, self.k_rotated = (self.angles.rotate(x).to(dtype) for x in (self.q, self.k))
        self.terms = (self.angles.tables, Tokens(), Rule(head[0] ** -0.5, is_causal=True))
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(1, heads, length, dtype=torch.float32, device=gpu.device)

    def forward(self) -> None:
        attention_fwd.launch_attention_fwd(self.q, self.k_rotated, self.v, *self.terms, True, self.out, self.lse, None)

    def exact(self, trains: bool) -> dict[str, Tensor]:
        inputs = (self.q, self.k, self.v, self.angles.freq)
        leaves = [x.to(torch.float64, copy=True).requires_grad_(trains) for x in inputs]
        out = exact.attention(*leaves, self.angles.positions, self.rows)
        if not trains:
            return {"out": out}
        gradients = torch.autograd.grad(out, leaves, self.dout[:, self.rows].double())
        return dict(zip(("dq", "dk", "dv", "dfreq"), gradients, strict=True))


def forward(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    call = Attention(gpu, kind, HEADS[size], sizes)
    truth = call.exact(trains=False)
    return Subject(call.forward, (call.out,), lambda _: errors_of({"out": call.out[:, call.rows]}, truth))


def backward(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    """Both passes and the small kernels around them."""
    head = MODEL_HEAD if size == ANY else HEADS[size]
    call = Attention(gpu, kind, head, sizes)
    truth = call.exact(trains=True)
    call.forward()
    gradients = tuple(torch.empty_like(x) for x in (call.q, call.k, call.v))

    def run() -> Tensor:
        saved = (call.dout, None, call.q_rotated, call.k_rotated, call.v, call.out, call.lse)
        return attention_bwd.launch_attention_bwd(*saved, *call.terms, (True, True), True, *gradients)

    def errors(dfreq: Tensor) -> dict[str, float]:
        return errors_of(dict(zip(truth, (*gradients, dfreq.sum(0)), strict=True)), truth)

    return Subject(run, gradients, errors)


def keys(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    head, length = MODEL_HEAD, sizes.lengths[kind]
    (k,) = draw(gpu, 2, (1, length, sizes.heads[1], head[0]), dtype=DTYPES[kind])
    turned, given = torch.empty_like(k), Angles(gpu, head, length)
    truth = {"k": given.rotate(k)}
    run = partial(attention_fwd.launch_attention_fwd_keys, k, turned, given.tables, Tokens(), length)
    return Subject(run, (turned,), lambda _: errors_of({"k": turned}, truth))


def decoding(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    head = MODEL_HEAD if size == ANY else HEADS[size]
    # the merge's entry is fp32's, whatever is decoded.
    dtype = torch.bfloat16 if size == ANY else DTYPES[kind]
    (heads, groups), slots = sizes.heads, sizes.slots
    shapes = [(1, rows, count, head[0]) for rows, count in ((1, heads), (slots, groups), (slots, groups))]
    q, k, v = draw(gpu, 3, *shapes, dtype=dtype)
    given, out = Angles(gpu, head, slots), torch.empty_like(q)
    lse = torch.empty(1, heads, 1, dtype=torch.float32, device=gpu.device)
    ends = torch.full((1,), slots, dtype=torch.int64, device=gpu.device)
    with torch.device(gpu.device):
        truth = {"out": exact.decode(q[0, 0], k[0], v[0], given.freq)[None, None]}
    rule = Rule(head[0] ** -0.5, is_causal=True)
    terms = (given.tables, Tokens(kv_end=ends), None, None, rule, (True, True))
    run = partial(decode.launch_decode, q, k, v, *terms, out, lse)
    return Subject(run, (out,), lambda _: errors_of({"out": out}, truth))


def projection(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    dims, pairs = MODEL_HEAD
    rows = 2 * sizes.lengths[kind] if size == ANY else size
    counts = (sizes.heads[0], sizes.heads[1], sizes.heads[1])
    shapes = [(count * dims, sizes.columns) for count in counts]
    x, *weights = draw(gpu, 4, (1, rows, sizes.columns), *shapes, dtype=DTYPES[kind])
    outs = tuple(x.new_empty(1, rows, count, dims) for count in counts)
    given = Angles(gpu, (dims, pairs), rows)
    at = torch.linspace(0, rows - 1, min(rows, sizes.rows_checked), device=gpu.device).long()
    cos, sin = reference.tables(given.freq, at.double())
    exactly = [F.linear(x[:, at].double(), weight.double()).unflatten(-1, (-1, dims)) for weight in weights]
    turned = [reference.rotary(y, cos, sin) for y in exactly[:2]]
    truth = dict(zip(("q", "k", "v"), (*turned, exactly[2]), strict=True))
    run = partial(
        qkv_rotary.launch_qkv_rotary, x, tuple(weights), None, outs, None, given.tables, None, 0, (True, True)
    )
    return Subject(run, outs, lambda _: errors_of({name: y[:, at] for name, y in zip(truth, outs, strict=True)}, truth))


def pairs_of(gpu: Gpu, kind: str, size: int, sizes: TuneSizes, seed: int) -> list[Tensor]:
    """q and k: a token of many sequences, or a long sequence."""
    shape = (sizes.sequences, 1) if size != ANY else (1, sizes.lengths[kind])
    return draw(gpu, seed, *((*shape, count, MODEL_HEAD[0]) for count in sizes.heads), dtype=DTYPES[kind])


def rotating(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    q, k = pairs_of(gpu, kind, size, sizes, 5)
    given, turned = Angles(gpu, MODEL_HEAD, q.shape[1]), (torch.empty_like(q), torch.empty_like(k))
    truth = {"q": given.rotate(q), "k": given.rotate(k)}
    coarse, fine = given.tables[:2]
    run = partial(rotary.launch_rotary, q, k, *turned, coarse, fine, None, None, 0, False)
    return Subject(run, turned, lambda _: errors_of(dict(zip(truth, turned, strict=True)), truth))


def rotating_back(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    """At sampled positions, with the gradient to the frequencies."""
    raw, douts = (pairs_of(gpu, kind, size, sizes, seed) for seed in (6, 7))
    positions = 3.0 * torch.arange(raw[0].shape[1], dtype=torch.float64, device=gpu.device) + 2.0
    given = Angles(gpu, MODEL_HEAD, 0, positions)
    rotated = [given.rotate(x).to(x.dtype) for x in raw]
    leaves = [x.double().requires_grad_() for x in raw]
    freq = given.freq.clone().requires_grad_()
    tables = reference.tables(freq, positions)
    turned = [reference.rotary(x, *tables) for x in leaves]
    exactly = torch.autograd.grad(turned, (*leaves, freq), [dy.double() for dy in douts])
    truth = dict(zip(("dq", "dk", "dfreq"), exactly, strict=True))
    gradients = tuple(map(torch.empty_like, raw))
    coarse, fine, rows = given.tables[:3]
    run = partial(rotary.launch_rotary_bwd, *douts, *rotated, *gradients, coarse, fine, rows, None, None, 0)

    def errors(dfreq: Tensor) -> dict[str, float]:
        return errors_of(dict(zip(truth, (*gradients, dfreq.sum(0)), strict=True)), truth)

    return Subject(run, gradients, errors)


def appending(gpu: Gpu, kind: str, size: int, sizes: TuneSizes) -> Subject:
    batch, length = (sizes.sequences, 1) if size != ANY else (1, sizes.lengths[kind])
    new = (batch, length, sizes.heads[1], MODEL_HEAD[0])
    k, v = draw(gpu, 8, new, new, dtype=DTYPES[kind])
    slots = 2 * length
    caches = tuple(x.new_zeros(batch, slots, *x.shape[2:]) for x in (k, v))
    ends = torch.full((batch,), slots, dtype=torch.int64, device=gpu.device)
    run = partial(append.launch_append, k, v, *caches, ends, None)
    truth = {"k": k.double(), "v": v.double()}

    def errors(_: Any) -> dict[str, float]:
        return errors_of(dict(zip(truth, (x[:, length:] for x in caches), strict=True)), truth)

    return Subject(run, caches, errors)


SUBJECTS: dict[str, Callable[[Gpu, str, int, TuneSizes], Subject]] = {
    "attention_fwd": forward,
    "attention_bwd_dq": backward,
    "attention_bwd_dkv": backward,
    "decode": decoding,
    "qkv_rotary": projection,
    "rotary": rotating,
    "rotary_bwd": rotating_back,
    "append": appending,
    "attention_fwd_keys": keys,
    "attention_bwd_delta": backward,
    "attention_bwd_dfreq": backward,
    "decode_combine": decoding,
}
