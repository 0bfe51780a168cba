"""DTensors in the public functions: every case runs in 2 or 4 processes and is compared with plain tensors there."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from processes import run_processes
from ropes import make_rope, seeded
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from clex_kernels import RotaryTable, RotaryTableStack, append_kv, apply_rotary, attention, decode_attention, qkv_rotary
from clex_kernels.sharding import replicate_table

B, L, D, C = 4, 6, 16, 12
WHOLE, BATCH, HEADS = Replicate(), Shard(0), Shard(2)
TOLERANCE = 1e-10


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def frequencies(factors: int) -> Tensor:
    rope = make_rope().double()
    with torch.no_grad():
        return rope.stack().freq[:factors].clone()


def one_table(freq: Tensor) -> RotaryTable:
    return RotaryTable.from_frequencies(freq[0], length=64, dtype=torch.float64)


def sampled(freq: Tensor) -> RotaryTable:
    positions = torch.tensor([0, 3, 4, 9, 30, 41])
    return RotaryTable.from_frequencies(freq[0], positions=positions, dtype=torch.float64)


def stack_by(freq: Tensor, **settings: Any) -> RotaryTableStack:
    t = torch.arange(1.0, 1.0 + len(freq), dtype=torch.float64)
    return RotaryTableStack.from_frequencies(freq, t, length=64, dtype=torch.float64, **settings)


def scatter(x: Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    return distribute_tensor(x.detach(), mesh, placements, src_data_rank=None).requires_grad_(x.requires_grad)


def gather(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, each relative to the largest number of its tensor."""
    pairs = list(zip(actual, expected, strict=True))
    assert all(a.shape == e.shape for a, e in pairs)
    # an lse of nothing is -inf, which equals itself; max() passes over NaN that is not the first.
    errors = [torch.where(a == e, 0.0, a - e).abs().max() / e[e.isfinite()].abs().max() for a, e in pairs]
    return max(error.nan_to_num(nan=math.inf).item() for error in errors)


def run(
    call: Callable[..., tuple[Tensor, ...]], operands: list[Tensor], freq: Tensor, make_table: Callable[..., Any]
) -> Any:
    """Outputs and the gradients of operands and freq, of a sum in which every number counts differently."""
    freq = leaf(freq)
    outs = [gather(x) for x in call(*operands, make_table(freq))]
    loss = sum((x * randn(*x.shape, seed=90 + i)).sum() for i, x in enumerate(outs))
    loss.backward()
    return [x.detach() for x in outs], [x.grad for x in operands], freq.grad


def compare(
    mesh: DeviceMesh,
    call: Callable[..., tuple[Tensor, ...]],
    operands: list[Tensor],
    placements: list[tuple[Any, ...]],
    freq: Tensor,
    make_table: Callable[..., Any],
) -> float:
    outs, grads, dfreq = run(call, [leaf(x) for x in operands], freq, make_table)
    parts = [scatter(leaf(x), mesh, *where) for x, where in zip(operands, placements, strict=True)]
    outs_, grads_, dfreq_ = run(call, parts, freq, make_table)
    for grad, part in zip(grads_, parts, strict=True):
        # a gradient comes back as its tensor is placed, equal where that is.
        assert grad.placements == part.placements, (grad.placements, part.placements)
    return difference([*outs_, *map(gather, grads_), dfreq_], [*outs, *grads, dfreq])


def attends(
    mesh: DeviceMesh, where: Any, kv_where: Any = None, heads: tuple[int, int] = (4, 4), **options: Any
) -> float:
    make_table, factors = options.pop("make_table", one_table), options.pop("factors", 1)
    batch = options.pop("batch", B)
    operands = [randn(batch, L, n, D, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1]))]
    kv_where = where if kv_where is None else kv_where

    def call(q: Tensor, k: Tensor, v: Tensor, table: Any) -> tuple[Tensor, ...]:
        return attention(q, k, v, table, is_causal=True, return_lse=True, **options)

    return compare(mesh, call, operands, [where, kv_where, kv_where], frequencies(factors), make_table)


def packs(mesh: DeviceMesh) -> float:
    operands = [randn(9, n, D, seed=i) for i, n in enumerate((4, 2, 2))]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call(q: Tensor, k: Tensor, v: Tensor, table: Any) -> tuple[Tensor, ...]:
        return attention(q, k, v, table, True, cu_seqlens_q=bounds, cu_seqlens_k=bounds, return_lse=True)

    make_table = partial(stack_by, index=torch.tensor([2, 0]))
    return compare(mesh, call, operands, [(Shard(1),)] * 3, frequencies(3), make_table)


def rotates(mesh: DeviceMesh, where: Any, k_where: Any, groups: int = 2, **options: Any) -> float:
    make_table, factors = options.pop("make_table", one_table), options.pop("factors", 1)
    operands = [randn(B, L, 4, D, seed=1), randn(B, L, groups, D, seed=2)]

    def call(q: Tensor, k: Tensor, table: Any) -> tuple[Tensor, ...]:
        return apply_rotary(q, k, table, **options)

    return compare(mesh, call, operands, [where, k_where], frequencies(factors), make_table)


def rotates_in_place(mesh: DeviceMesh) -> float:
    q, k, table = randn(B, L, 4, D, seed=1), randn(B, L, 2, D, seed=2), one_table(frequencies(1))
    expected = apply_rotary(q, k, table)
    parts = scatter(q, mesh, HEADS), scatter(k, mesh, HEADS)
    rotated = apply_rotary(*parts, table, inplace=True)
    assert all(y is part for y, part in zip(rotated, parts, strict=True))
    return difference([gather(x) for x in parts], list(expected))


def decodes(
    mesh: DeviceMesh, where: Any, cache_where: Any, heads: tuple[int, int], paged: bool = False, **options: Any
) -> float:
    """Appends two tokens to caches, then attends over them; all the caches are compared too."""
    q, k, v = (randn(B, 2, n, D, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1])))
    kv_end = torch.tensor([5, 30, 17, 2])
    slots = (8, 16) if paged else (B, 32)
    caches = [randn(*slots, heads[1], D, seed=7 + i) for i in range(2)]
    block_table = torch.tensor([[3, 6], [0, 2], [5, 1], [7, 4]]) if paged else None
    table = options.pop("make_table", one_table)(frequencies(options.pop("factors", 1)))

    def step(q: Tensor, k: Tensor, v: Tensor, *caches: Tensor) -> list[Tensor]:
        append_kv(k, v, *caches, kv_end, block_table)
        results = decode_attention(q, *caches, table, kv_end, block_table=block_table, return_lse=True, **options)
        return [gather(x) for x in (*results, *caches)]

    parts = [scatter(x, mesh, *where) for x in (q, k, v)]
    parts += [scatter(x, mesh, *cache_where) for x in caches]
    actual = step(*parts)
    return difference(actual, step(q, k, v, *caches))


def projects(
    mesh: DeviceMesh,
    x_where: Any,
    weight_where: Any,
    kv_where: Any = None,
    groups: int = 2,
    bias: bool = True,
    **options: Any,
) -> float:
    """qkv_rotary, and attention on top of it, so that repeated heads count as they must."""
    heads = (4, groups, groups)
    weights = [randn(n * D, C, seed=10 + i) for i, n in enumerate(heads)]
    biases = [randn(n * D, seed=20 + i) for i, n in enumerate(heads)] if bias else []
    kv_where = weight_where if kv_where is None else kv_where
    places = [weight_where, kv_where, kv_where]

    def call(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, table = rest
        biases = tuple(weights[3:]) or None
        q, k, v = qkv_rotary(x, tuple(weights[:3]), table, 4, groups, biases, **options)
        return attention(q, k, v, table, is_causal=True, rotated="qk"), q

    operands = [randn(B, L, C, seed=3), *weights, *biases]
    return compare(mesh, call, operands, [x_where, *places, *(places if bias else [])], frequencies(1), one_table)


def projects_packed(mesh: DeviceMesh, x_where: Any, weight_where: Any) -> float:
    def call(x: Tensor, weight: Tensor, table: Any) -> tuple[Tensor, ...]:
        return qkv_rotary(x, weight, table, 4, 2, keys="both", position_ids=torch.arange(L).flip(0)[None])

    operands = [randn(B, L, C, seed=3), randn(8 * D, C, seed=4)]
    return compare(mesh, call, operands, [x_where, weight_where], frequencies(1), one_table)


def learns(mesh: DeviceMesh, per_layer: bool) -> float:
    """Gradients of the ODE's weights after three layers that share a sampled table, summed once or in each layer."""
    results = []
    for sharded in (False, True):
        rope = make_rope().double().train()
        table = rope.sample(L, generator=seeded(5))
        y = randn(B, L, 4, D, seed=1)
        if sharded:
            y = scatter(y, mesh, HEADS)
            table = table if per_layer else replicate_table(table, mesh)
        for _ in range(3):
            y = attention(y, y, y, table)
        (gather(y) * randn(B, L, 4, D, seed=2)).sum().backward()
        results.append([weight.grad for weight in rope.parameters()])
    return difference(results[1], results[0])


def counts_collectives(mesh: DeviceMesh) -> list[dict[str, int]]:
    """Collectives of the backward pass of three layers: table as it is, and replicated once."""
    from torch.distributed.tensor.debug import CommDebugMode

    counted = []
    for shared in (False, True):
        freq = leaf(frequencies(1))
        table = replicate_table(one_table(freq), mesh) if shared else one_table(freq)
        y = scatter(leaf(randn(B, L, 4, D, seed=1)), mesh, HEADS)
        with CommDebugMode() as mode:
            for _ in range(3):
                y = attention(y, y, y, table)
            y.to_local().sum().backward()
        counted.append({str(op): count for op, count in mode.get_comm_counts().items()})
    return counted


def compiles(mesh: DeviceMesh) -> float:
    """What one compiled graph gives, output and gradients, beside the same call uncompiled."""
    results = []
    for wrap in (lambda f: f, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        freq, y = leaf(frequencies(1)), scatter(leaf(randn(B, L, 4, D, seed=1)), mesh, HEADS)
        table = replicate_table(one_table(freq), mesh)
        out = wrap(lambda y, table: attention(y, y, y, table, is_causal=True))(y, table)
        out.to_local().square().sum().backward()
        results.append([out.detach().to_local(), y.grad.to_local(), freq.grad])
    return difference(*results)


def refuses(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(mesh: DeviceMesh) -> list[list[str]]:
    """How each message begins, and what was raised."""
    table = one_table(frequencies(1))

    def q(heads: int, *where: Any) -> DTensor:
        return scatter(randn(B, 2, heads, D, seed=0), mesh, *(where or (HEADS,)))

    def cache(heads: int, *where: Any) -> DTensor:
        return scatter(randn(B, 32, heads, D, seed=0), mesh, *(where or (HEADS,)))

    plain, other = randn(B, 2, 4, D, seed=0), init_device_mesh("cpu", (mesh.size(), 1))
    elsewhere = scatter(plain, other, WHOLE, WHOLE)
    weights = [scatter(randn(n * D, C, seed=n), mesh, Shard(0)) for n in (4, 2, 2)]
    x = scatter(randn(B, L, C, seed=0), mesh, WHOLE)
    wants = leaf(frequencies(1))
    calls = [
        ("ValueError: q: expected heads in a multiple of the 2 ranks", lambda: attention(q(3), q(1), q(1), table)),
        (
            "ValueError: q: expected H to be split over a divisor or a multiple of G=3 ranks, got 2",
            lambda: attention(q(12), q(3, WHOLE), q(3, WHOLE), table),
        ),
        ("TypeError: k: expected a DTensor", lambda: attention(q(4), plain, plain, table)),
        ("ValueError: k: expected on one mesh", lambda: attention(q(4), elsewhere, q(4), table)),
        ("ValueError: table: expected on one mesh", lambda: attention(*[q(4)] * 3, replicate_table(table, other))),
        ("ValueError: kv_end: expected B=4 rows", lambda: attention(*[q(4)] * 3, table, kv_end=torch.tensor([1, 1]))),
        ("ValueError: table: a stack of T=2 needs", lambda: attention(*[q(4, BATCH)] * 3, stack_by(frequencies(2)))),
        ("ValueError: q: expected heads in a multiple", lambda: apply_rotary(q(3), None, table)),
        ("ValueError: out: expected None", lambda: apply_rotary(q(4), None, table, out=(q(4), None))),
        ("ValueError: q: expected Shard(0), Shard(2)", lambda: apply_rotary(q(4, Shard(1)), None, table, inplace=True)),
        ("ValueError: inplace: expected False", lambda: apply_rotary(q(4), None, one_table(wants), inplace=True)),
        ("ValueError: k_cache: expected place", lambda: decode_attention(q(4), *[cache(4, BATCH)] * 2, table, 9)),
        ("ValueError: k_cache: expected placements among", lambda: append_kv(q(4), q(4), *[cache(4, Shard(1))] * 2, 9)),
        ("ValueError: v_cache: expected placements", lambda: append_kv(q(4), q(4), cache(4), cache(4, WHOLE), 9)),
        ("ValueError: k_cache: expected heads in a multiple", lambda: append_kv(q(1), q(1), cache(1), cache(1), 9)),
        ("TypeError: weight: expected a DTensor", lambda: qkv_rotary(x, plain[0, 0], table, 4, 2)),
        ("ValueError: num_heads: expected heads in", lambda: qkv_rotary(x, tuple(weights), table, 3, 1)),
    ]
    return [[expected, refuses(call)] for expected, call in calls]


def partial_sum(mesh: DeviceMesh) -> float:
    x, table = randn(B, L, 4, D, seed=1), one_table(frequencies(1))
    part = DTensor.from_local(x / mesh.size(), mesh, [Partial()])
    return difference([gather(attention(part, part, part, table))], [attention(x, x, x, table)])


AT, STARTS, ENDS = (torch.tensor(x) for x in ([0, 7, 1, 40], [0, 2, 1, 0], [6, 5, 6, 3]))
ROWS = {"kv_start": STARTS, "kv_end": ENDS, "q_offset": AT, "k_offset": AT}


def attention_cases(mesh: DeviceMesh) -> dict[str, Callable[[], float]]:
    picked, by_length = partial(stack_by, index=torch.tensor([2, 0, 0, 1])), partial(stack_by, train_length=2)
    cut = {"kv_start": STARTS, "kv_end": ENDS}
    return {
        "attention heads": lambda: attends(mesh, (HEADS,), heads=(8, 4)),
        "attention one kv head": lambda: attends(mesh, (HEADS,), (WHOLE,), (4, 1)),
        "attention tokens": lambda: attends(mesh, (Shard(1),)),
        "attention batch": lambda: attends(mesh, (BATCH,), heads=(4, 2), **ROWS),
        "attention batch index": lambda: attends(mesh, (BATCH,), factors=3, make_table=picked),
        "attention batch own tables": lambda: attends(mesh, (BATCH,), factors=4, make_table=stack_by),
        "attention batch by length": lambda: attends(mesh, (BATCH,), factors=3, make_table=by_length, **cut),
        "attention keys elsewhere": lambda: attends(mesh, (HEADS,), (BATCH,)),
        "ODE once": lambda: learns(mesh, per_layer=False),
        "ODE per layer": lambda: learns(mesh, per_layer=True),
    }


def other_cases(mesh: DeviceMesh) -> dict[str, Callable[[], float]]:
    of_each = {"factors": 4, "make_table": stack_by, "position_ids": torch.randint(64, (B, L), generator=seeded(4))}
    by_length = {"factors": 8, "make_table": partial(stack_by, train_length=4)}
    return {
        "rotary heads": lambda: rotates(mesh, (HEADS,), (HEADS,), 4),
        "rotary whole k": lambda: rotates(mesh, (HEADS,), (WHOLE,), 1, make_table=sampled),
        "rotary batch": lambda: rotates(mesh, (BATCH,), (BATCH,), **of_each),
        "decode heads": lambda: decodes(mesh, (HEADS,), (HEADS,), (8, 4)),
        "decode batch": lambda: decodes(mesh, (BATCH,), (BATCH,), (4, 2), **by_length),
        "decode one kv head": lambda: decodes(mesh, (HEADS,), (WHOLE,), (4, 1)),
        "decode pages": lambda: decodes(mesh, (HEADS,), (HEADS,), (8, 4), paged=True),
        "decode pages batch": lambda: decodes(mesh, (BATCH,), (WHOLE,), (4, 2), paged=True),
        "projection heads": lambda: projects(mesh, (WHOLE,), (Shard(0),), groups=4),
        "projection one kv head": lambda: projects(mesh, (WHOLE,), (Shard(0),), (WHOLE,), groups=1),
        "projection tokens": lambda: projects(mesh, (Shard(1),), (Shard(0),), groups=4, bias=False),
        "projection batch": lambda: projects(mesh, (BATCH,), (WHOLE,)),
        "projection packed": lambda: projects_packed(mesh, (BATCH,), (Shard(0),)),
    }


def cases_of_two(mesh: DeviceMesh) -> dict[str, Callable[[], Any]]:
    return {
        "attention uneven batch": lambda: attends(mesh, (BATCH,), batch=3),
        "packed sequences": lambda: packs(mesh),
        "rotary in place": lambda: rotates_in_place(mesh),
        "attention partial": lambda: partial_sum(mesh),
        "compiled": lambda: compiles(mesh),
        "refusals": lambda: refusals(mesh),
        "collectives": lambda: counts_collectives(mesh),
    }


def cases_of_four(mesh: DeviceMesh) -> dict[str, Callable[[], float]]:
    square = init_device_mesh("cpu", (2, 2))
    return {
        "attention two kv heads": lambda: attends(mesh, (HEADS,), heads=(8, 2)),
        "attention mesh": lambda: attends(square, (BATCH, HEADS), heads=(4, 2), **ROWS),
        "attention mesh one kv head": lambda: attends(square, (BATCH, HEADS), (BATCH, WHOLE), heads=(4, 1)),
        "attention mesh of heads": lambda: attends(square, (HEADS, HEADS), heads=(8, 2)),
        "attention mesh whole": lambda: attends(square, (WHOLE, HEADS), heads=(4, 2)),
        "decode mesh": lambda: decodes(square, (BATCH, HEADS), (BATCH, HEADS), (4, 2)),
        "decode two kv heads": lambda: decodes(mesh, (HEADS,), (WHOLE,), (8, 2)),
        "projection two kv heads": lambda: projects(mesh, (WHOLE,), (Shard(0),), (WHOLE,), groups=2),
        "projection mesh": lambda: projects(square, (BATCH, WHOLE), (WHOLE, Shard(0))),
    }


def work(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    cases = attention_cases(mesh) | other_cases(mesh) | (cases_of_two if world == 2 else cases_of_four)(mesh)
    return {name: case() for name, case in cases.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(work, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(work, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_every_case_equals_plain_tensors_on_every_rank(ranks, request):
    results = request.getfixturevalue(ranks)
    differences = [(name, value) for rank in results for name, value in rank.items() if isinstance(value, float)]
    assert len(differences) >= 28 * len(results)
    assert [(name, value) for name, value in differences if not value < TOLERANCE] == []


def test_what_is_not_supported_is_refused_by_name(two):
    assert len(two[0]["refusals"]) == 17
    assert [pair for pair in two[0]["refusals"] if not pair[1].startswith(pair[0])] == []


def test_layers_share_one_all_reduce_of_dfreq_once_the_table_is_replicated(two):
    assert [sum(counts.values()) for counts in two[0]["collectives"]] == [3, 1]
