"""Operators given DTensors directly: calls that the public functions make are made again, over two ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run_processes
from ropes import make_rope, seeded
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clex_kernels import RotaryTableStack, apply_rotary, attention, decode_attention, qkv_rotary
from clex_kernels.sharding_rules import register_rules

B, L, D = 4, 6, 16
TOLERANCE = 1e-10
RULES = {"attention", "attention_bwd", "rotary", "rotary_bwd", "decode", "qkv_rotary"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


class Recorder(TorchDispatchMode):
    """Keeps the operators called, with what they got and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "clex":
            self.calls.append((func, args, out))
        return out


def tables(**settings: Any) -> RotaryTableStack:
    rope = make_rope().double()
    freq = rope.stack().freq[:3].detach().requires_grad_()
    t = torch.arange(1.0, 4.0, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(freq, t, length=64, dtype=torch.float64, **settings)


INDEX = torch.tensor([2, 0, 0, 1])
ENDS = torch.tensor([6, 5, 6, 3])


def attend(heads: int, groups: int, index: Tensor | None = INDEX, **options: Any) -> None:
    q, k, v = (randn(B, L, n, D, seed=i).requires_grad_() for i, n in enumerate((heads, groups, groups)))
    # without an index sequence b has table b.
    table = tables(index=INDEX) if index is not None else stack_of_four()
    out, lse = attention(q, k, v, table, is_causal=True, kv_end=ENDS, return_lse=True, **options)
    (out.square().sum() + (lse * randn(*lse.shape)).nan_to_num(0, 0, 0).sum()).backward()


def stack_of_four() -> RotaryTableStack:
    freq = make_rope().double().stack().freq[:B].detach().requires_grad_()
    t = torch.arange(1.0, 1.0 + B, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(freq, t, length=64, dtype=torch.float64)


def pack() -> None:
    q, k, v = (randn(9, n, D, seed=n).requires_grad_() for n in (4, 2, 2))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    attention(q, k, v, tables(index=torch.tensor([2, 0])), is_causal=True, **options).square().sum().backward()


def rotate(with_k: bool, rows: int) -> None:
    q, k = (randn(B, L, n, D, seed=n).requires_grad_() for n in (4, 2))
    position_ids = torch.randint(64, (rows, L), generator=seeded(1))
    results = apply_rotary(q, k if with_k else None, tables(index=INDEX), position_ids)
    sum((x * randn(*x.shape, seed=3)).sum() for x in results if x is not None).backward()


def decode(paged: bool) -> None:
    block_table = torch.tensor([[3, 6], [0, 2], [5, 1], [7, 4]]) if paged else None
    caches = [randn(*((8, 16) if paged else (B, 32)), 2, D, seed=i) for i in range(2)]
    table, kv_end = tables(train_length=10), torch.tensor([5, 30, 17, 2])
    decode_attention(randn(B, 1, 4, D), *caches, table, kv_end, block_table=block_table, return_lse=not paged)


def project() -> None:
    with torch.no_grad():
        qkv_rotary(randn(B, L, 12), randn(8 * D, 12), tables(index=INDEX), 4, 2, keys="both")


# what is called, how the first argument is placed, whether all calls keep to that or gather it.
CASES: dict[str, tuple[Callable[[], None], int, bool]] = {
    "attention by heads": (lambda: attend(8, 4), 2, True),
    "attention by batch": (lambda: attend(8, 4), 0, True),
    "attention by heads, one for all": (lambda: attend(4, 1), 2, False),
    "attention by batch, tables of their own": (lambda: attend(4, 2, index=None), 0, False),
    "attention, q rotated before": (lambda: attend(4, 2, rotated="q"), 2, True),
    "packed sequences by heads": (pack, 2, True),
    "rotary by heads": (lambda: rotate(True, B), 2, True),
    "rotary by batch": (lambda: rotate(True, B), 0, True),
    "rotary by batch, positions shared": (lambda: rotate(False, 1), 0, True),
    "decode by heads": (lambda: decode(False), 2, True),
    "decode by batch": (lambda: decode(False), 0, True),
    "decode over pages by heads": (lambda: decode(True), 2, True),
    "decode over pages by batch": (lambda: decode(True), 0, True),
    "projection by batch": (project, 0, True),
    "projection by tokens": (project, 1, False),
}


def again(mesh: DeviceMesh, call: Callable[[], None], dim: int, keeps: bool) -> dict[str, float]:
    """The largest difference of each operator's outputs, relative to their largest number."""
    with Recorder() as recorder:
        call()
    errors = {}
    for func, args, expected in recorder.calls:
        if func._schema.name.removeprefix("clex::") not in RULES:
            continue
        whole = [
            DTensor.from_local(x, mesh, [Replicate()], run_check=False) if isinstance(x, Tensor) else x for x in args
        ]
        whole[0] = distribute_tensor(args[0].detach(), mesh, [Shard(dim)], src_data_rank=None)
        with torch.no_grad():
            outs = func(*whole)
        assert outs[0].placements == ((Shard(dim),) if keeps else (Replicate(),)), (func, outs[0].placements)
        for i, (out, wanted) in enumerate(zip(outs, expected, strict=True)):
            assert out.shape == wanted.shape, (func, i, out.shape, wanted.shape)
            if wanted.numel():
                # -inf, where no key is seen, stays that.
                found = out.full_tensor()
                error = torch.where(found == wanted, 0.0, found - wanted).abs().max()
                errors[f"{func} {i}"] = (error / wanted[wanted.isfinite()].abs().max()).item()
    return errors


def work(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    # a second time, which must do no harm.
    register_rules()
    results: dict[str, Any] = {name: again(mesh, *case) for name, case in CASES.items()}
    part = distribute_tensor(randn(B, 1, 2, D), mesh, [Shard(2)], src_data_rank=None)
    kv_end = DTensor.from_local(torch.full((B,), 5), mesh, [Replicate()], run_check=False)
    try:
        torch.ops.clex.append(part, part, part.clone(), part.clone(), kv_end, None)
        results["append"] = "nothing was raised"
    # DTensor's own refusal of an operator without a rule; its words are looked at by the test.
    except NotImplementedError as error:
        results["append"] = str(error)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(work, 2, tmp_path_factory.mktemp("rules"))


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_of_dtensors_what_it_gives_of_tensors(results, name):
    for rank in results:
        assert rank[name]
        assert {op: error for op, error in rank[name].items() if not error < TOLERANCE} == {}


def test_every_operator_with_a_rule_was_called(results):
    called = {op.split(".")[1] for name in CASES for op in results[0][name]}
    assert called == RULES


def test_what_writes_to_its_arguments_is_refused(results):
    assert all("clex.append.default" in rank["append"] for rank in results), results[0]["append"]
