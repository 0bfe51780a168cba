"""Cases, their truths and tuning's subjects on meta tensors in the place of CUDA's: meeting a CPU tensor raises."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("torchdiffeq")

from gpu_measured_mock import SIZES, TUNED, Cpu

from benchmarks import formulations
from benchmarks.on_gpu import case, stages
from benchmarks.on_gpu.sizes import FULL
from benchmarks.on_gpu.tune_subjects import SUBJECTS
from clex_kernels.kernels import append, attention_bwd, attention_fwd, decode, qkv_rotary, rotary
from clex_kernels.kernels.launch_tables import ANY

CACHED = ("for_q_and_k", "with_frequencies", "attend", "attend_with_frequencies", "compiled_whole")
LAUNCHERS: tuple[ModuleType, ...] = (append, attention_bwd, attention_fwd, decode, qkv_rotary, rotary)


class Meta(Cpu):
    device = "meta"


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What would be compared, without its values."""
    generator, compared = torch.Generator, []

    def error_of(found: Tensor, exact: Tensor) -> float:
        compared.append(found.detach().double() - exact)
        return 0.0

    monkeypatch.setattr(case, "error_of", error_of)
    # there is none for meta tensors.
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name in CACHED:
        monkeypatch.setattr(formulations, name, getattr(formulations, name).__wrapped__)
    return compared


@pytest.mark.parametrize("stem", ["attention", "decode", "rotary", "layer"])
def test_truths_lie_where_results_do(stem: str, on_meta: list[Tensor]):
    for each in getattr(stages, f"{stem}_cases")(SIZES):
        bench = each.make(Meta())
        for rival in (bench.ours, *bench.own, *bench.rivals, *bench.besides):
            if not rival.needs:
                way, before = rival.make(), len(on_meta)
                way.prepare(1)
                way.errors(1, way.run())
                assert len(on_meta) > before, (each.full_name, rival.name)
    assert {x.device.type for x in on_meta} == {"meta"}


# bytes and operations of full sizes, counted by hand.
COSTS = {
    # q and out, k and v; half of all pairs, two products.
    "attention, prefill: bf16, 8,192 tokens": (2 * 67_108_864 + 2 * 16_777_216, 549_755_813_888),
    # forward; then q, k, v, out and dout read, dq, dk and dv written; seven products.
    "attention, forward, backward and dfreq: bf16, 4,096 tokens": (
        83_886_080 + 117_440_512 + 50_331_648,
        481_036_337_152,
    ),
    "decode step: bf16, batch 1, 32K keys": (134_217_728, 536_870_912),
    "decode step over pages: bf16, batch 8, 32K keys, pages of 16": (1_073_741_824, 4_294_967_296),
    "rotary in place: Llama 8B at 4K, bf16": (83_886_080, 0),
    "rotary out of place, preallocated: Llama 8B at 4K, fp32": (167_772_160, 0),
    "rotary forward, backward and dfreq: Llama 8B at 4K, bf16": (209_715_200, 0),
    "projection and rotary: Llama-3-8B, bf16, 512 tokens": (60_817_408, 25_769_803_776),
    # weights of 41,943,040 elements and the same caches; linears and two products.
    "decode step of a layer: bf16, batch 1, 32K keys": (83_886_080 + 134_217_728, 83_886_080 + 536_870_912),
    # weights and what passes between, three times; linears three times, seven products of attention.
    "attention layer, forward and backward: bf16, 4,096 tokens": (
        3 * (83_886_080 + 150_994_944),
        3 * 343_597_383_680 + 481_036_337_152,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_as_counted_by_hand(name: str, on_meta: list[Tensor]):
    (found,) = (each for each in stages.all_cases(FULL) if each.full_name == name)
    cost = found.make(Meta()).cost
    assert (cost.bytes, cost.operations) == COSTS[name]


@pytest.mark.parametrize("table", SUBJECTS)
def test_subjects_of_tuning_lie_in_one_place(table: str, on_meta: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    def launch(*arguments: Any) -> Tensor:
        return torch.empty(1, 1, dtype=torch.float64, device="meta")

    for module in LAUNCHERS:
        for name in [name for name in vars(module) if name.startswith("launch_")]:
            monkeypatch.setattr(module, name, launch)
    subject = SUBJECTS[table](Meta(), "half", ANY if "keys" in table or "delta" in table else 64, TUNED)
    subject.spoil()
    subject.errors(launch())
    assert {x.device.type for x in on_meta} == {"meta"}
