"""What 128K and 1M tokens take per device on 8 GPUs: memory, arithmetic and traffic, for docs/scaling.md.

    python -m benchmarks.scaling        # prints the tables; a test holds that the document has them

Nothing here is measured. Sizes follow from the model's shapes; bytes that kernels move are those counted in
gpu_static.json; times are modelled: operations over the tensor cores' rate and bytes over the memory's speed, both at
their data sheets' values, so that no step can be faster.

Counted per device, with n devices, L tokens and a model of N parameters, for one optimizer step:

    states      16 N / n bytes: parameters, gradients and Adam's two averages in fp32, sharded by FSDP or by heads
    kept        layers * tokens * C * 2 bytes: inputs of the layers, which activation checkpointing keeps
    one layer   what a layer saves while its backward pass runs, and the gradients of that
    operations  4 passes over the weights (forward, again, and two in backward), 2 N tokens each, and causal attention:
                2 products over L^2 / 2 pairs in forward and in the pass again, 7 in backward
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.compiled.document import KEPT
from benchmarks.compiled.hardware import HARDWARE

DEVICES = 8
LENGTHS = {"128K": 128 * 1024, "1M": 1024 * 1024}
GPU = HARDWARE["sm_90"]
# of parameters, gradients and Adam's averages in fp32.
STATE_BYTES = 16
HALF, SINGLE, DOUBLE = 2, 4, 8
# forward, the same again under activation checkpointing, and backward to inputs and to weights.
WEIGHT_PASSES = 4
# forward and again two products each; backward seven, since dq and dk with dv are made by passes of their own.
ATTENTION_PRODUCTS = 2 + 2 + 7
# of [tokens, C] by transformers' plan, for each layer: what attention and MLP give in forward, attention's again (the
# pass ends where nothing more is saved, before the MLP's), and the gradients of what q, k, v, gate and up take.
LAYER_REDUCTIONS = 2 + 1 + 5
# and of the embedding's rows and of what the head takes.
OUTER_REDUCTIONS = 1 + 1


@dataclass(frozen=True)
class Model:
    """Shapes of a Llama, in the README's letters, and the width of its MLP."""

    name: str
    layers: int
    columns: int
    heads: int
    key_heads: int
    dims: int
    mlp: int
    vocabulary: int

    @property
    def projections(self) -> int:
        """Parameters of the layers."""
        attention = self.columns * self.dims * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.columns * self.mlp)

    @property
    def parameters(self) -> int:
        return self.projections + 2 * self.vocabulary * self.columns + (2 * self.layers + 1) * self.columns

    @property
    def pairs(self) -> int:
        return self.dims // 2


LLAMA = Model("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256)


class Training(NamedTuple):
    """One way to train, per device: bytes kept, operations, and bytes sent."""

    name: str
    states: float
    kept: float
    layer: float
    logits: float
    operations: float
    sent: float

    @property
    def memory(self) -> float:
        """Without the logits, which a loss in chunks never has at once."""
        return self.states + self.kept + self.layer

    @property
    def seconds(self) -> float:
        return self.operations / (GPU.tensor_tflops * 1e12)


class Decoding(NamedTuple):
    """One way to decode, per device and new token: bytes held, read, and sent."""

    name: str
    held: float
    read: float
    sent: float

    @property
    def milliseconds(self) -> float:
        return self.read / (GPU.memory_gb_per_s * 1e9) * 1e3


def saved_per_token(model: Model, share: int) -> int:
    """Bytes that a layer saves for a token, with 1 / share of its heads and of its MLP: q', k', v, out; gate, up, x."""
    heads = (2 * model.heads + 2 * model.key_heads) * model.dims
    return HALF * (heads + 3 * model.mlp) // share + HALF * 2 * model.columns


def operations(model: Model, length: int) -> float:
    """Of one sequence."""
    weights = 2 * WEIGHT_PASSES * length * (model.projections + model.vocabulary * model.columns)
    pairs = length * length / 2
    return weights + 2 * ATTENTION_PRODUCTS * pairs * model.heads * model.dims * model.layers


def ring_bytes(model: Model, length: int, devices: int) -> float:
    """Sent by a device: k and v n - 1 times in forward, again and backward, dk and dv in fp32 n times."""
    shard = 2 * length // devices * model.key_heads * model.dims
    return model.layers * shard * (3 * HALF * (devices - 1) + SINGLE * devices)


def sharding_bytes(model: Model, devices: int) -> float:
    """Sent by a device under FSDP: two gathers of bf16 weights and one scatter of fp32 gradients."""
    return (2 * HALF + SINGLE) * model.parameters * (devices - 1) / devices


def all_reduce_bytes(size: float, devices: int) -> float:
    """Sent by a device, round a ring."""
    return 2 * size * (devices - 1) / devices


def heads_bytes(model: Model, length: int, devices: int) -> float:
    """Sent by a device whose heads, MLP and vocabulary are split by transformers' plan: all-reduces, and logits."""
    reductions = LAYER_REDUCTIONS * model.layers + OUTER_REDUCTIONS
    logits = HALF * length * model.vocabulary * (devices - 1) / devices
    return all_reduce_bytes(reductions * length * HALF * model.columns, devices) + logits


def training(model: Model, length: int, devices: int) -> list[Training]:
    states = STATE_BYTES * model.parameters / devices
    shard = length // devices
    layer_input = HALF * model.columns

    def of(name: str, tokens: int, share: int, work: float, sent: float) -> Training:
        layer = 2 * tokens * saved_per_token(model, share)
        # by transformers' plan every rank gathers those of the whole vocabulary.
        logits = SINGLE * tokens * model.vocabulary
        return Training(name, states, model.layers * tokens * layer_input, layer, logits, work, sent)

    whole = operations(model, length)
    return [
        of("fsdp, a sequence each", length, 1, whole, sharding_bytes(model, devices)),
        of("tp", length, devices, whole / devices, heads_bytes(model, length, devices)),
        of(
            *("cp, with fsdp over the same devices", shard, 1, whole / devices),
            ring_bytes(model, length, devices) + sharding_bytes(model, devices),
        ),
    ]


def decoding(model: Model, length: int, devices: int) -> list[Decoding]:
    """One sequence; with a split cache, LSEs are gathered and weighted outputs added up, in fp32."""
    weights = HALF * model.parameters
    cache = HALF * 2 * length * model.key_heads * model.dims * model.layers
    # attention, MLP and the embedding; then logits are gathered.
    reduced = all_reduce_bytes((2 * model.layers + 1) * HALF * model.columns, devices)
    reduced += HALF * model.vocabulary * (devices - 1) / devices
    lses, outs = (devices - 1) * model.heads * SINGLE, all_reduce_bytes(model.heads * model.dims * SINGLE, devices)
    merged = model.layers * (lses + outs)
    return [
        Decoding("one device", weights + cache, weights + cache, 0),
        Decoding("tp: heads", (weights + cache) / devices, (weights + cache) / devices, reduced),
        Decoding("cache split over devices", weights + cache / devices, weights + cache / devices, merged),
    ]


def counted(name: str) -> tuple[float, float]:
    """The least bytes per unit of a figure in gpu_static.json, and those counted."""
    figures = {figure["name"]: figure for figure in json.loads(KEPT.read_text())["traffic"]}
    figure = figures[name]
    return figure["floor"], sum(memory for _, memory in figure["parts"].values())


def added(model: Model, length: int, devices: int) -> list[tuple[str, str, str]]:
    """What CLEX adds to plain RoPE of fixed frequencies: where, how much per device, and its share."""
    tokens = length // devices
    (way,) = (way for way in training(model, length, devices) if way.name.startswith("cp"))
    elements = tokens * (model.heads + model.key_heads) * model.dims * model.layers
    plain, _ = counted("rotary-bfloat16-D128-R64")
    _, sampled = counted("rotary-bfloat16-D128-R64-positions")
    _, plain_bwd = counted("rotary-float32-D128-R64")
    _, backward = counted("rotary_bwd-float32-D128-R64")
    # plain RoPE's backward pass moves what its forward pass does. A ring sums dq' and dk' in fp32, to which q' and k'
    # are brought for dfreq.
    moved = elements * (3 * (sampled - plain) + backward - plain_bwd + HALF + SINGLE)
    table = 2 * SINGLE * model.pairs * length
    reduced = all_reduce_bytes(model.layers * model.pairs * DOUBLE, devices)
    weights = 2 * model.pairs * model.dims
    _, decode = counted("decode-bfloat16-D128-R64")
    (rotated,) = (row for row in json.loads(KEPT.read_text())["traffic"] if row["name"] == "decode-bfloat16-D128-R64")
    seconds = moved / (GPU.memory_gb_per_s * 1e9)
    return [
        ("parameters of the ODE (M = D)", f"{weights:,}", f"{weights / model.parameters:.4%} of all"),
        ("table of sampled positions, all layers together", size(table), f"{table / way.memory:.2%} of the memory"),
        (
            "bytes of memory for dfreq and rows of that table (counted)",
            size(moved),
            f"{seconds / way.seconds:.2%} of the modelled step",
        ),
        ("dfreq, sent", size(reduced), f"{reduced / way.sent:.6%} of the traffic"),
        (
            "decoding: bytes of the tables for each key (counted)",
            f"{rotated['parts']['table'][1]:.2f} of {decode:.1f}",
            f"{rotated['parts']['table'][1] / decode:.2%}",
        ),
    ]


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "KB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def table(header: str, rows: list[tuple[str, ...]]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|" + "---|" * columns, *("| " + " | ".join(row) + " |" for row in rows)])


def tables(model: Model = LLAMA, devices: int = DEVICES) -> list[str]:
    """All tables of docs/scaling.md, in its order."""
    ways = [(name, way) for name, length in LENGTHS.items() for way in training(model, length, devices)]
    steps = [(name, way) for name, length in LENGTHS.items() for way in decoding(model, length, devices)]
    return [
        table(
            "| tokens | way | states | layer inputs | one layer | together | logits | PFLOP | at least | sent |",
            [
                (
                    *(name, way.name, size(way.states), size(way.kept), size(way.layer), size(way.memory)),
                    *(size(way.logits), f"{way.operations / 1e15:,.0f}", f"{way.seconds:,.1f} s", size(way.sent)),
                )
                for name, way in ways
            ],
        ),
        table(
            "| tokens | way | held | read | at least | sent |",
            [
                (name, way.name, size(way.held), size(way.read), f"{way.milliseconds:.1f} ms", size(way.sent))
                for name, way in steps
            ],
        ),
        *(
            table(f"| {name} tokens, cp | per device | share |", added(model, length, devices))
            for name, length in LENGTHS.items()
        ),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
