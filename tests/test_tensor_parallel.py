"""ClexAttention with its heads over 2 and 4 processes, compared with one process."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layers import C, inputs, make_layer
from processes import run_processes
from ropes import CONFIG, make_rope, seeded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from clex_kernels import attention, clip_gradients, param_groups
from clex_kernels.distributed.tensor import (
    ClexParallel,
    name_projections,
    parallelize_attention,
    sum_gradients,
)
from clex_kernels.sharding import replicate_table

B, L, D = 2, 6, CONFIG.head_dim
TOLERANCE = 1e-10


class Model(nn.Module):
    """Two layers of attention over one rope."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, bias: bool = True):
        super().__init__()
        self.rope = make_rope()
        self.layers = nn.ModuleList(make_layer(heads=heads, kv_heads=kv_heads, bias=bias) for _ in range(2))
        with torch.no_grad():
            for layer in self.layers:
                for i, weight in enumerate(layer.parameters()):
                    weight.copy_(0.3 * torch.randn(weight.shape, generator=seeded(i)))
        self.double().train()

    def forward(self, x: Tensor, table: Any, **options: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, table, **options)
        return x


def parallel(model: Model, mesh: DeviceMesh) -> Model:
    # as every rank has its own rank's weights after it, rank 0's must have been sent.
    with torch.no_grad():
        for weight in model.layers.parameters():
            weight += mesh.get_local_rank()
    return parallelize_module(model, mesh, {"layers.*": ClexParallel()})


def gather(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    # max() passes over NaN that is not the first.
    return ((actual - expected).abs().max() / expected.abs().max()).nan_to_num(nan=math.inf).item()


def split(whole: dict[str, Tensor], kv_heads: int) -> dict[str, Tensor]:
    """Rows of q, k and v by name, of those of packed weights."""
    result = {}
    for name, x in whole.items():
        if "qkv_proj" not in name:
            result[name] = x
            continue
        kv = kv_heads * D
        for part, rows in zip("qkv", x.split((len(x) - 2 * kv, kv, kv)), strict=True):
            result[name.replace("qkv_proj", f"{part}_proj")] = rows
    return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: gather(weight.grad) for name, weight in model.named_parameters()}


def trains(
    mesh: DeviceMesh,
    kv_heads: int,
    heads: int = 4,
    shared: bool = True,
    where: Any = None,
    bias: bool = True,
    **options: Any,
) -> float:
    """The largest difference of outputs and of the gradients of x, all weights and the ODE's."""
    plain = Model(heads, kv_heads, bias)
    sharded = parallel(deepcopy(plain), mesh)
    x, x_ = inputs(B, L), inputs(B, L)
    packed = {"cu_seqlens_q": torch.tensor([0, 5, 12]), "cu_seqlens_k": torch.tensor([0, 5, 12])}
    if options.pop("packs", False):
        options |= packed
        x, x_ = (y.detach().view(1, B * L, C).requires_grad_() for y in (x, x_))
    length = x.shape[1]
    out = plain(x, plain.rope.sample(length, generator=seeded(3)), **options)
    table = sharded.rope.sample(length, generator=seeded(3))
    if where is not None:
        x_ = distribute_tensor(x_.detach(), mesh, where, src_data_rank=None).requires_grad_()
    out_ = sharded(x_, replicate_table(table, mesh) if shared else table, **options)
    assert isinstance(out_, DTensor) == (where is not None)
    out_ = gather(out_)
    weight = torch.randn(out.shape, generator=seeded(4), dtype=torch.float64)
    (out * weight).sum().backward()
    (out_ * weight).sum().backward()
    errors = [difference(out_.detach(), out.detach()), difference(gather(x_.grad), x.grad)]
    expected = split(gradients(plain), kv_heads)
    for name, grad in gradients(sharded).items():
        errors.append(difference(grad, expected[name]))
    return max(errors)


def decodes(mesh: DeviceMesh, kv_heads: int, heads: int = 4) -> float:
    """Two steps over caches of a rank's own heads, each sequence at its own t."""
    plain = Model(heads, kv_heads).eval()
    sharded = parallel(deepcopy(plain), mesh)
    layer, layer_ = plain.layers[0], sharded.layers[0]
    own = layer_.local_kv_heads
    first = mesh.get_local_rank() * kv_heads // mesh.size()
    caches = [torch.randn(B, 64, kv_heads, D, generator=seeded(5 + i), dtype=torch.float64) for i in range(2)]
    caches_ = [cache[:, :, first : first + own].clone() for cache in caches]
    errors = []
    for end in (40, 42):
        x, kv_end, table = inputs(B, 2).detach() + end, torch.tensor([end, end - 30]), plain.rope.stack()
        out = layer.decode(x, table, *caches, kv_end)
        errors.append(difference(layer_.decode(x, table, *caches_, kv_end), out))
    errors += [difference(a, e[:, :, first : first + own]) for a, e in zip(caches_, caches, strict=True)]
    return max(errors)


def optimizer_of(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, lr=1e-2, ode_lr=1e-2))


def steps(model: Model, optimizer: torch.optim.Optimizer, count: int, mesh: DeviceMesh | None = None) -> list[Tensor]:
    """Training; returns the tables' numbers."""
    generator, seen = seeded(11), []
    for i in range(count):
        table = model.rope.sample(L, generator=generator)
        seen.append(torch.cat([x.detach().flatten() for x in (table.freq, table.coarse, table.positions)]))
        x = torch.randn(B, L, C, generator=seeded(20 + i), dtype=torch.float64)
        out = model(x, table if mesh is None else replicate_table(table, mesh))
        (out - x.roll(1, 2)).square().mean().backward()
        clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def everywhere(x: Tensor) -> Tensor:
    """x of all ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.stack(parts)


def learns(mesh: DeviceMesh, kv_heads: int) -> dict[str, Any]:
    """Whether tables and ODE weights are the same bits on all ranks after three steps, and one process's nearly."""
    plain = Model(4, kv_heads)
    sharded = parallel(deepcopy(plain), mesh)
    before = [weight.detach().clone() for weight in plain.rope.parameters()]
    steps(plain, optimizer_of(plain), 3)
    tables = steps(sharded, optimizer_of(sharded), 3, mesh)
    copies = [everywhere(x) for x in (*tables, *sharded.rope.parameters())]
    shared = [layer.k_proj.weight.to_local() for layer in sharded.layers] if kv_heads < mesh.size() else []
    copies += [everywhere(x) for x in shared]
    expected = split(dict(plain.named_parameters()), kv_heads)
    return {
        "bits": all(bool((copy == copy[0]).all()) for copy in copies),
        "difference": max(difference(gather(w), expected[name]) for name, w in sharded.named_parameters()),
        "moved": min((a - b).abs().max().item() for a, b in zip(plain.rope.parameters(), before, strict=True)),
    }


def sums_once(rank: int, world: int) -> float:
    """freq's gradient with sum_gradients on it and heads split by hand, in checkpoints."""
    rope = make_rope().double().train()
    q = torch.randn(B, L, 4, D, generator=seeded(1), dtype=torch.float64)
    table = rope.sample(L, generator=seeded(2))
    attention(q, q, q, table).square().sum().backward()
    expected = [weight.grad for weight in rope.parameters()]
    rope.zero_grad()
    table = rope.sample(L, generator=seeded(2))
    table, own = replace(table, freq=sum_gradients(table.freq)), q.chunk(world, 2)[rank]
    out = checkpoint(lambda x: attention(x, x, x, table), own, use_reentrant=False)
    out.square().sum().backward()
    return max(difference(w.grad, e) for w, e in zip(rope.parameters(), expected, strict=True))


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def trained(mesh: DeviceMesh | None, kv_heads: int, count: int) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(4, kv_heads)
    model = model if mesh is None else parallel(model, mesh)
    optimizer = optimizer_of(model)
    steps(model, optimizer, count, mesh)
    return model, optimizer


def resumes(mesh: DeviceMesh, folder: Path) -> float:
    """After loading what 2 ranks saved after two steps, one step more is the third step of one process."""
    model, optimizer = trained(mesh, 2, 1)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "two")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    steps(model, optimizer, 1, mesh)
    plain, plain_optimizer = trained(None, 2, 2)
    steps(plain, plain_optimizer, 1)
    expected = split(dict(plain.named_parameters()), 2)
    return max(difference(gather(weight), expected[name]) for name, weight in model.named_parameters())


def loads_one(mesh: DeviceMesh, folder: Path) -> float:
    """What a process without a mesh saved."""
    model = parallel(Model(4, 2), mesh)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "one")
    model.load_state_dict(state["model"])
    expected = split(dict(Model(4, 2).named_parameters()), 2)
    return max(difference(gather(weight), expected[name]) for name, weight in model.named_parameters())


def shards_too() -> float:
    """Heads over one dimension of a mesh, and fully_shard over the other: gradients beside those of one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    plain = Model(4, 2)
    sharded = parallel(deepcopy(plain), mesh["heads"])
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh["data"])
    x, table, table_ = inputs(4, L).detach(), *(m.rope.sample(L, generator=seeded(3)) for m in (plain, sharded))
    # fully_shard takes the mean over its ranks.
    (plain(x, table).square().sum() / 2).backward()
    own = x.chunk(2)[mesh.get_local_rank("data")]
    sharded(own, replicate_table(table_, mesh["heads"])).square().sum().backward()
    expected = split(gradients(plain), 2)
    return max(difference(grad, expected[f"layers.{name}"]) for name, grad in gradients(sharded.layers).items())


def refusal(call: Any) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    hooked = make_layer()
    hooked.o_proj.register_forward_hook(lambda *_: None)
    calls = {
        "layer": lambda: parallelize_attention(nn.Linear(2, 2), mesh),
        "twice": lambda: parallelize_attention(parallelize_attention(make_layer(), mesh), mesh),
        "mesh": lambda: parallelize_attention(make_layer(), init_device_mesh("cpu", (mesh.size(), 1))),
        "mesh type": lambda: parallelize_attention(make_layer(), 2),
        "uneven": lambda: parallelize_attention(make_layer(heads=3, kv_heads=1), mesh),
        "hooks": lambda: parallelize_attention(hooked, mesh),
    }
    return {name: refusal(call) for name, call in calls.items()}


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {
        "own kv heads": trains(mesh, 4),
        "two kv heads": trains(mesh, 2),
        "one kv head": trains(mesh, 1),
        "without bias": trains(mesh, 2, heads=8, bias=False),
        "table per layer": trains(mesh, 2, shared=False),
        "sequence parallel x": trains(mesh, 2, where=[Shard(1)]),
        "replicated x": trains(mesh, 2, where=[Replicate()]),
        "packed sequences": trains(mesh, 2, packs=True),
        "decode own kv heads": decodes(mesh, 4),
        "decode two kv heads": decodes(mesh, 2),
        "decode one kv head": decodes(mesh, 1),
        "sum_gradients": sums_once(rank, world),
        "learns": learns(mesh, 2),
    }
    if world == 2:
        model, optimizer = trained(mesh, 2, 2)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / "two")
        results |= {"refusals": refusals(mesh), "loads one": loads_one(mesh, folder)}
    else:
        results["over data parallel"] = shards_too()
    results["resumes"] = resumes(mesh, folder)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one process saved, and later what two saved."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    model = Model(4, 2)
    for layer in model.layers:
        name_projections(layer)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "one", no_dist=True)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_processes(work, 2, folder, folder)


@pytest.fixture(scope="module")
def four(folder: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run_processes(work, 4, folder, folder)


@pytest.fixture(params=["two", "four"])
def results(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.getfixturevalue(request.param)


def test_every_case_equals_one_process_on_every_rank(results):
    differences = [(name, value) for rank in results for name, value in rank.items() if isinstance(value, float)]
    assert len(differences) == 14 * len(results)
    assert [(name, value) for name, value in differences if not value < TOLERANCE] == []


def test_tables_and_shared_weights_stay_the_same_bits_on_all_ranks_and_learn_what_one_process_does(results):
    for rank in results:
        learned = rank["learns"]
        assert learned["bits"]
        assert learned["moved"] > 1e-3
        assert learned["difference"] < TOLERANCE


def test_one_process_loads_what_two_saved(folder, two):
    model = Model(4, 2)
    for layer in model.layers:
        name_projections(layer)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "two", no_dist=True)
    model.load_state_dict(state["model"])
    expected, _ = trained(None, 2, 2)
    for (name, weight), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert difference(weight.detach(), other.detach()) < TOLERANCE, name


def test_what_is_not_supported_is_refused_by_name(two):
    expected = {
        "layer": "TypeError: layer: expected a ClexAttention, got Linear",
        "twice": "TypeError: layer: expected a ClexAttention, got ParallelAttention",
        "mesh": "ValueError: mesh: expected one dimension",
        "mesh type": "TypeError: mesh: expected a DeviceMesh, got int",
        "uneven": "ValueError: num_heads: expected heads in a multiple of the 2 ranks",
        "hooks": "ValueError: o_proj: expected no hooks",
    }
    assert two[0]["refusals"].keys() == expected.keys()
    for name, start in expected.items():
        assert two[0]["refusals"][name].startswith(start), two[0]["refusals"][name]


def test_names_are_given_to_layers_with_a_plain_projection_only():
    with pytest.raises(TypeError, match="layer: expected a ClexAttention, got Linear"):
        name_projections(nn.Linear(2, 2))
    layer = make_layer(bias=True)
    packed = layer.qkv_proj.weight.detach().clone()
    name_projections(layer)
    state = layer.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == {
        "q_proj.weight": (64, C),
        "k_proj.weight": (32, C),
        "v_proj.weight": (32, C),
        "q_proj.bias": (64,),
        "k_proj.bias": (32,),
        "v_proj.bias": (32,),
        "o_proj.weight": (C, 64),
        "o_proj.bias": (C,),
    }
    with torch.no_grad():
        layer.qkv_proj.weight.zero_()
    layer.load_state_dict({name: x.clone() for name, x in state.items()} | {"q_proj.weight": packed[:64]})
    assert torch.equal(layer.qkv_proj.weight[:64], packed[:64])
    assert not layer.qkv_proj.weight[64:].any()
