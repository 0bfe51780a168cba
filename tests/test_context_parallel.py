"""ring_attention and the zigzag order on 2 and 4 processes, against attention() over the whole sequence in one."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from attention_calls import Call, Given, Table, expected, make, make_table, options_of, outputs_and_gradients, weights
from processes import run_processes
from ropes import CONFIG, make_rope
from tolerance import assert_within_rule
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from clex_kernels.attention import attention
from clex_kernels.distributed import ring_attention, zigzag_positions, zigzag_shard, zigzag_unshard
from clex_kernels.frequencies import solve_frequencies
from clex_kernels.tables import RotaryTable, RotaryTableStack

# 4 chunks of 8 tokens on two ranks, 8 of 4 on four.
L = 32
WORLDS = [2, 4]


def call_of(**more: Any) -> Call:
    return Call(queries=L, keys=L, **more)


ROWS = torch.arange(40.0).double() * torch.linspace(1.5, 2, 2, dtype=torch.float64)[:, None] + 20
CALLS = {
    "causal": call_of(),
    "full": call_of(options={"is_causal": False}),
    "scale, one key head": call_of(h=6, g=1, options={"scale": 0.4}),
    "window shorter than a chunk": call_of(options={"window": 3}),
    "window over chunks": call_of(options={"window": 11}),
    "window that just reaches a chunk": call_of(options={"window": 10}),
    "window that just misses a pair": call_of(options={"window": 15}),
    "window of one chunk, without is_causal": call_of(options={"window": 8, "is_causal": False}),
    "partial rotary, softcap": call_of(d=24, r=4, settings={"amplitude": 1.3}, options={"softcap": 2.0}),
    "left padding": call_of(b=3, options={"kv_start": [3, 0, 31]}),
    "left padding over whole shards": call_of(options={"kv_start": [17, 29], "window": 6}),
    "left padding, without order": call_of(options={"kv_start": [3, 20], "is_causal": False}),
    "nothing but padding": call_of(options={"kv_start": [32, 4]}),
    "t by length": call_of(tables=4),
    "t by length after padding": call_of(b=3, tables=4, options={"kv_start": [5, 0, 17]}),
    "t by given lengths": call_of(b=3, tables=4, options={"lengths": [64, 3, 20], "softcap": 3.0}),
    "log-n": call_of(tables=4, settings={"log_scale": True}, options={"kv_start": [3, 20]}),
    "log-n clamped, by lengths": call_of(settings={"log_scale": "clamped"}, options={"lengths": [5, 900]}),
    "sampled": call_of(settings={"positions": ROWS[:1, :L]}),
    "sampled by each sequence": call_of(tables=2, settings={"positions": ROWS[:, :L]}, options={"window": 9}),
    "offset": call_of(options={"offset": 100}),
    "offset in sampled rows": call_of(tables=2, settings={"positions": ROWS}, options={"offset": 7}),
}
LOW_PRECISION = {
    f"{name}, {dtype}": (CALLS[name], dtype)
    for name, dtype in (("partial rotary, softcap", torch.float32), ("causal", torch.bfloat16))
}
FAR, KINDS = 1_000_000, ("plain", "sampled")


def whole(q: Tensor, k: Tensor, v: Tensor, table: Table, offset: int = 0, **options: Any) -> Tensor:
    options = {"is_causal": True, **options}
    return attention(q, k, v, table, **options, q_offset=offset, k_offset=offset)


def given_of(call: Call, dtype: torch.dtype = torch.float64) -> Given:
    """Random inputs, with NaN in the keys and values of padding."""
    given = make(call, dtype)
    if "kv_start" in call.options:
        is_padding = torch.arange(L) < torch.tensor(call.options["kv_start"])[:, None]
        for x in given[1:3]:
            x.masked_fill_(is_padding[..., None, None], math.nan)
    return given


def gradients(
    function: Callable[..., Tensor], call: Call, dtype: torch.dtype = torch.float64, group: Any = None
) -> dict[str, Tensor]:
    """This rank's out and gradients of its share of a loss that weighs every number differently."""
    q, k, v, freq = (x.clone().requires_grad_() for x in given_of(call, dtype))
    shards = [zigzag_shard(x, group).detach().requires_grad_() for x in (q, k, v)]
    out = function(*shards, make_table(call, freq, dtype), group, **options_of(call))
    loss = (out * zigzag_shard(weights(given_of(call, dtype).q), group)).sum()
    found = torch.autograd.grad(loss, [*shards, freq])
    return dict(zip(("out", "dq", "dk", "dv", "dfreq"), (out.detach(), *found), strict=True))


class Count(TorchDispatchMode):
    """How often attention's operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[0] += func is torch.ops.clex.attention.default
        self.calls[1] += func is torch.ops.clex.attention_bwd.default
        return func(*args, **(kwargs or {}))


def counts() -> list[int]:
    with Count() as count:
        gradients(ring_attention, CALLS["causal"])
    return count.calls


def saved_numbers() -> int:
    """How many numbers the backward pass keeps, beside the table's."""
    q, k, v, freq = make(call_of())
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.data_ptr()] = x.numel()
        return x

    shards = [zigzag_shard(x).requires_grad_() for x in (q, k, v)]
    table = make_table(call_of(), freq.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        ring_attention(*shards, table)
    for x in (table.freq, table.coarse, table.fine):
        sizes.pop(x.data_ptr(), None)
    return sum(sizes.values())


def of_the_ode(out_of: Callable[..., Tensor], part: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Gradients to the ODE's weights from sampled positions, a t and positions for each sequence."""
    leaves = [weight.detach().double().requires_grad_() for weight in make_rope().parameters()]
    times = torch.tensor([2.0, 5.0], dtype=torch.float64)
    freq = solve_frequencies(*leaves, times, CONFIG)
    table = RotaryTableStack.from_frequencies(freq, times, positions=ROWS[:, :L], dtype=torch.float64)
    q, k, v, _ = make(call_of())
    out = out_of(*(part(x) for x in (q, k, v)), table)
    return list(torch.autograd.grad((out * part(weights(q))).sum(), leaves))


def far_dfreq(
    out_of: Callable[..., Tensor],
    part: Callable[[Tensor], Tensor],
    far: int,
    kind: str = "plain",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """dfreq of a sequence at `far` in a table of plain positions, or of sampled ones from there on."""
    q, k, v, freq = (x.requires_grad_() for x in make(call_of(), torch.float32))
    where = {"length": far + L} if kind == "plain" else {"positions": torch.arange(L) + far}
    table = RotaryTable.from_frequencies(freq, **where, dtype=dtype)
    out = out_of(*(part(x.detach().to(dtype)) for x in (q, k, v)), table, offset=far if kind == "plain" else 0)
    return torch.autograd.grad((out * part(weights(q).to(dtype))).sum(), freq)[0]


def checkpointed(*arguments: Any, **options: Any) -> Tensor:
    return checkpoint(ring_attention, *arguments, use_reentrant=False, **options)


def orders(rank: int, world: int) -> dict[str, Tensor]:
    """What the zigzag functions do to a tensor that all ranks have."""
    x = torch.arange(3 * L * 2.0).view(3, L, 2).double().requires_grad_()
    shard = zigzag_shard(x)
    sharded = torch.autograd.grad(shard.sum(), x)[0]
    leaf = shard.detach().requires_grad_()
    unsharded = zigzag_unshard(leaf)
    back = torch.autograd.grad((unsharded * (rank + 1) * x.detach()).sum(), leaf)[0]
    ids = torch.arange(L)[None]
    return {
        "shard": shard.detach(),
        "gradient of the shard": sharded,
        "whole": unsharded.detach(),
        "gradient of the whole": back,
        "ids": zigzag_unshard(zigzag_shard(ids)),
        "last": zigzag_unshard(zigzag_shard(x.detach().transpose(1, 2), dim=-1), dim=2).transpose(1, 2),
        "half": zigzag_unshard(zigzag_shard(x.detach().bfloat16())),
        "positions": zigzag_positions(L),
    }


def twice(q: Tensor, *others: Any) -> None:
    q = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(ring_attention(q, *others).square().sum(), q, create_graph=True)
    dq.sum().backward()


def errors(rank: int, world: int) -> dict[str, str]:
    q, k, v, freq = make(call_of())
    table = make_table(call_of(), freq)
    shards = [zigzag_shard(x) for x in (q, k, v)]
    odd = [x[:, :3] for x in shards]
    alone, mesh = dist.new_group([0]), init_device_mesh("cpu", (world,))
    wrong = {
        "odd": lambda: ring_attention(*odd, table),
        "keys": lambda: ring_attention(shards[0], *(x[:, :4] for x in shards[1:]), table),
        "table": lambda: ring_attention(*shards, table, offset=250),
        "offset": lambda: ring_attention(*shards, table, offset=1.0),
        "kv_start": lambda: ring_attention(*shards, table, kv_start=torch.tensor([0, L + 1])),
        "lengths": lambda: ring_attention(*shards, table, lengths=torch.tensor([1.0, 2.0])),
        "window": lambda: ring_attention(*shards, table, window=0),
        "kind": lambda: ring_attention(*shards, freq),
        "dtensor": lambda: ring_attention(distribute_tensor(q, mesh, [Shard(1)]), *shards[1:], table),
        "group": lambda: ring_attention(*shards, table, "all"),
        "foreign group": lambda: ring_attention(*shards, table, alone),
        "mesh": lambda: ring_attention(*shards, table, init_device_mesh("cpu", (1, world))),
        "cu_seqlens": lambda: ring_attention(*shards, table, cu_seqlens_q=torch.tensor([0, L])),
        "second derivative": lambda: twice(*shards, table),
        "length": lambda: zigzag_positions(L + 2),
        "shard": lambda: zigzag_shard(q[:, :30]),
        "dim": lambda: zigzag_shard(q, dim=4),
        "unshard": lambda: zigzag_unshard(q[:, :3]),
    }
    found = {}
    for name, function in wrong.items():
        if name == "foreign group" and rank == 0:
            continue
        try:
            function()
            found[name] = "nothing was raised"
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def worker(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "context"))
    alone = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data", "context"))["context"]
    places = [(far, kind) for far in (0, FAR) for kind in KINDS]
    return {
        "calls": {name: gradients(ring_attention, call) for name, call in CALLS.items()},
        "low": {name: gradients(ring_attention, *args) for name, args in LOW_PRECISION.items()},
        "checkpointed": gradients(checkpointed, CALLS["causal"]),
        "of a mesh": gradients(ring_attention, CALLS["causal"], group=mesh["context"]),
        "of a group": gradients(ring_attention, CALLS["causal"], group=mesh["context"].get_group()),
        "alone": gradients(ring_attention, CALLS["t by length"], group=alone),
        "counts": counts(),
        "saved": saved_numbers(),
        "ode": of_the_ode(ring_attention, zigzag_shard),
        "far": [far_dfreq(ring_attention, zigzag_shard, *place) for place in places],
        "orders": orders(rank, world),
        "errors": errors(rank, world),
    }


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(worker, request.param, tmp_path_factory.mktemp("ring"))


def rows_of(rank: int, world: int) -> Tensor:
    chunk = L // (2 * world)
    first, last = rank * chunk, L - (rank + 1) * chunk
    return torch.tensor([*range(first, first + chunk), *range(last, last + chunk)])


def put_together(shards: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole sequence's tensors from those of the ranks, and rank 0's dfreq."""
    order = torch.cat([rows_of(rank, len(shards)) for rank in range(len(shards))]).argsort()
    joined = {name: torch.cat([x[name] for x in shards], dim=1)[:, order] for name in ("out", "dq", "dk", "dv")}
    return joined | {"dfreq": shards[0]["dfreq"]}


def truth_of(call: Call, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return outputs_and_gradients(whole, call, given_of(call, dtype), dtype)


def assert_close(actual: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
    assert actual.keys() == truth.keys()
    for name, x in actual.items():
        atol = 1e-10 * truth[name].abs().max().item()
        torch.testing.assert_close(x, truth[name], rtol=1e-10, atol=atol, msg=f"{name}: {x} is not {truth[name]}")


@pytest.mark.parametrize("name", CALLS)
def test_a_ring_gives_what_one_process_gives(results: list[dict[str, Any]], name: str) -> None:
    shards = [result["calls"][name] for result in results]
    truth = truth_of(CALLS[name])
    assert all(x.isfinite().all() and x.any() for x in truth.values())
    assert_close(put_together(shards), truth)
    # every rank has the whole dfreq, the same bits.
    assert all(torch.equal(shard["dfreq"], shards[0]["dfreq"]) for shard in shards)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_ring_keeps_the_tolerance_rule(results: list[dict[str, Any]], name: str) -> None:
    call, dtype = LOW_PRECISION[name]
    causal = call._replace(options={"is_causal": True, **call.options})
    given = given_of(call, dtype)
    exact = Given(*(x.double() for x in given))
    truth, in_dtype = (
        outputs_and_gradients(expected, causal, x, y) for x, y in ((exact, torch.float64), (given, dtype))
    )
    for key, x in put_together([result["low"][name] for result in results]).items():
        if key == "dfreq":
            assert (x - truth[key]).abs().max() <= 30 * torch.finfo(dtype).eps * truth[key].abs().max()
        else:
            assert x.dtype == dtype
            assert_within_rule(x, in_dtype[key].to(dtype), truth[key])


def test_weights_of_the_ode_learn_as_in_one_process(results: list[dict[str, Any]]) -> None:
    truth = of_the_ode(whole, lambda x: x)
    assert all(x.any() for x in truth)
    for result in results:
        for x, y in zip(result["ode"], truth, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * y.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_dfreq_is_as_exact_far_out_as_in_one_process(results: list[dict[str, Any]], kind: str) -> None:
    truth = far_dfreq(whole, lambda x: x, 0, dtype=torch.float64)
    near, far = (results[0]["far"][KINDS.index(kind) + place] for place in (0, 2))
    for found, place in ((near, 0), (far, FAR)):
        in_dtype = far_dfreq(whole, lambda x: x, place, kind)
        assert_within_rule(found.float(), in_dtype.float(), truth)
    errors = [((x - truth).abs().max() / truth.abs().max()).item() for x in (near, far)]
    assert errors[1] <= 2 * errors[0] + 1e-6


def test_every_rank_has_as_much_to_do(results: list[dict[str, Any]]) -> None:
    # of the (2n)^2 pairs of chunks n (2n + 1) are seen.
    pairs = 2 * len(results) + 1
    assert [result["counts"] for result in results] == [[pairs, pairs]] * len(results)


def test_what_is_saved_shrinks_with_the_number_of_ranks(results: list[dict[str, Any]]) -> None:
    batch, heads, groups, dims = 2, 4, 2, 16
    tokens = batch * L // len(results)
    # q' and out, k' and v, lse, and the rows of the table.
    own = tokens * (2 * heads * dims + 2 * groups * dims + heads) + L // len(results)
    assert all(result["saved"] == own for result in results)


def test_a_checkpointed_ring_gives_the_same_bits(results: list[dict[str, Any]]) -> None:
    for result in results:
        for name, x in result["checkpointed"].items():
            assert torch.equal(x, result["calls"]["causal"][name])


@pytest.mark.parametrize("kind", ["of a mesh", "of a group"])
def test_rings_within_a_part_of_the_ranks(results: list[dict[str, Any]], kind: str) -> None:
    truth = truth_of(CALLS["causal"])
    for first in range(0, len(results), 2):
        assert_close(put_together([result[kind] for result in results[first : first + 2]]), truth)


def test_one_rank_is_attention_itself(results: list[dict[str, Any]]) -> None:
    truth = truth_of(CALLS["t by length"])
    for result in results:
        assert all(torch.equal(x, truth[name]) for name, x in result["alone"].items())


def test_shards_and_back(results: list[dict[str, Any]]) -> None:
    world = len(results)
    x = torch.arange(3 * L * 2.0).view(3, L, 2).double()
    for rank, result in enumerate(results):
        found, rows = result["orders"], rows_of(rank, world)
        assert torch.equal(found["positions"], rows)
        assert torch.equal(found["shard"], x[:, rows])
        assert torch.equal(found["gradient of the shard"][:, rows], torch.ones(3, len(rows), 2).double())
        assert found["gradient of the shard"].sum() == 3 * len(rows) * 2
        for name in ("whole", "last"):
            assert torch.equal(found[name], x)
        assert torch.equal(found["half"], x.bfloat16())
        assert torch.equal(found["ids"], torch.arange(L)[None])
        # rank r's loss weighs the whole by r + 1.
        assert torch.equal(found["gradient of the whole"], x[:, rows] * (world * (world + 1) / 2))


MESSAGES = {
    "odd": "ValueError: q: expected two chunks of equal size, L/n even and at least 2, got 3 tokens",
    "keys": "ValueError: k: expected q's L/n=",
    "table": f"ValueError: table: expected positions for the whole sequence, offset + L = {250 + L}, got one of 256",
    "offset": "TypeError: offset: expected an int, got float",
    "kv_start": "ValueError: kv_start: expected numbers within [0, S] = [0, 32], got 0 to 33",
    "lengths": "TypeError: lengths: expected a torch.int32 or torch.int64 tensor",
    "window": "ValueError: window: expected at least 1 token",
    "kind": "TypeError: table: expected a RotaryTable or RotaryTableStack, got Tensor",
    "dtensor": "TypeError: q: expected a plain tensor, this rank's part, got a DTensor; pass its to_local()",
    "group": "TypeError: group: expected a ProcessGroup, a DeviceMesh or None, got str",
    "foreign group": "ValueError: group: expected a group that this process is in",
    "mesh": "ValueError: group: expected a mesh of one dimension, got one of [1, ",
    "cu_seqlens": "TypeError: ring_attention() got an unexpected keyword argument 'cu_seqlens_q'",
    "second derivative": "RuntimeError: trying to differentiate twice a function that was marked with",
    "length": "ValueError: length: expected L divisible by 2n = ",
    "shard": "ValueError: x: dimension 1: expected L divisible by 2n = ",
    "dim": "ValueError: dim: expected a dimension of x [2, 32, 4, 16], got 4",
    "unshard": "ValueError: x: dimension 1 on all ranks: expected L divisible by 2n = ",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_wrong_arguments_are_named(results: list[dict[str, Any]], name: str) -> None:
    assert results[1]["errors"][name].startswith(MESSAGES[name])


def test_without_a_process_group_nothing_works() -> None:
    with pytest.raises(ValueError, match=r"^group: expected torch\.distributed\.init_process_group"):
        zigzag_positions(8)
