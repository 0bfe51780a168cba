"""docs/scaling.md holds what benchmarks/scaling.py counts, and that counts what the code does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scaling import (
    LAYER_REDUCTIONS,
    LLAMA,
    OUTER_REDUCTIONS,
    Model,
    operations,
    ring_bytes,
    saved_per_token,
    size,
    tables,
    training,
)
from clex_kernels import ClexConfig
from clex_kernels.distributed import ring_attention
from clex_kernels.integrations.parallel import shard_heads
from clex_kernels.integrations.transformers import apply_clex
from clex_kernels.tables import RotaryTable

DOCUMENT = Path(__file__).parent.parent / "docs" / "scaling.md"
SMALL = Model("small", 2, 64, 4, 2, 16, 128, 256)


def llama(model: Model, device: str = "meta") -> LlamaForCausalLM:
    settings = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.columns,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_heads,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    with torch.device(device):
        return LlamaForCausalLM(settings)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process as the first of two, of which the other one sends and gets nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_the_document_has_the_tables():
    text = DOCUMENT.read_text()
    for table in tables():
        assert table in text, f"expected this table, python -m benchmarks.scaling prints it:\n{table}"


@pytest.mark.parametrize("model", [LLAMA, SMALL], ids=lambda model: model.name)
def test_parameters_are_those_of_transformers(model):
    assert model.parameters == sum(weight.numel() for weight in llama(model).parameters())


def test_operations_are_those_of_products():
    length = 128
    model = llama(SMALL, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    weights = 2 * 3 * length * (SMALL.projections + SMALL.vocabulary * SMALL.columns)
    # eager attention: all pairs, two products in forward and four in backward.
    attention = 2 * (2 + 4) * length**2 * SMALL.heads * SMALL.dims * SMALL.layers
    assert counter.get_total_flops() == weights + attention
    # here a forward pass again, half the pairs, and seven products in backward.
    assert operations(SMALL, length) == weights * 4 / 3 + attention * 11 / 12


def test_reductions_are_those_of_split_heads(two_ranks):
    model = llama(SMALL, "cpu")
    apply_clex(model, ClexConfig(head_dim=SMALL.dims, train_length=64))
    shard_heads(model, init_device_mesh("cpu", (2,)))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with CommDebugMode() as counter:
        model(torch.zeros(1, 32, dtype=torch.long), use_cache=False).logits.sum().backward()
    counts = counter.get_comm_counts()
    assert counts[torch.ops.c10d_functional.all_reduce] == LAYER_REDUCTIONS * SMALL.layers + OUTER_REDUCTIONS
    # logits.
    assert counts[torch.ops.c10d_functional.all_gather_into_tensor] == 1


def test_bytes_sent_round_a_ring_are_those_of_ring_attention(two_ranks, monkeypatch):
    sent, send = [], dist.batch_isend_irecv

    def count(transfers: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(transfer.tensor.nbytes for transfer in transfers if transfer.op is dist.isend)
        return send(transfers)

    monkeypatch.setattr(dist, "batch_isend_irecv", count)
    length = 64
    shapes = ((SMALL.heads, SMALL.dims), *((SMALL.key_heads, SMALL.dims),) * 2)
    q, k, v = (torch.zeros(1, length // 2, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    table = RotaryTable.from_frequencies(torch.ones(SMALL.pairs, dtype=torch.float64), length)
    checkpoint(ring_attention, q, k, v, table, use_reentrant=False).sum().backward()
    assert SMALL.layers * sum(sent) == ring_bytes(SMALL, length, 2)


def test_more_devices_take_less_each():
    few, many = (training(LLAMA, 1 << 17, devices)[-1] for devices in (8, 16))
    assert many.memory < few.memory
    assert many.operations == few.operations / 2
    assert ring_bytes(LLAMA, 1 << 17, 16) < ring_bytes(LLAMA, 1 << 17, 8) * 1.1
    assert saved_per_token(LLAMA, 8) < saved_per_token(LLAMA, 1)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (999_900, "1 MB"), (2.5e9, "2.5 GB"), (3.2e12, "3,200 GB")]
)
def test_sizes_are_in_decimal_units(count, words):
    assert size(count) == words
