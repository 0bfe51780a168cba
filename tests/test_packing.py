"""pack_qkv: one weight of three, the same checkpoints, and three again."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clex_kernels.packing import pack_qkv, unpack_qkv

C, ROWS = 24, {"q_proj": 64, "k_proj": 32, "v_proj": 32}


class Block(nn.Module):
    """What a transformer's attention holds."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, rows in ROWS.items():
            setattr(self, name, nn.Linear(C, rows, bias, dtype=dtype))
        self.o_proj = nn.Linear(64, C, dtype=dtype)


class Model(nn.Module):
    def __init__(self, **settings: object):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(**settings) for _ in range(2))


def packed_model(**settings: object) -> Model:
    model = Model(**settings)
    for block in model.layers:
        pack_qkv(block)
    return model


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("bias", [True, False])
def test_one_projection_gives_what_three_gave(bias: bool) -> None:
    block = Block(bias).to(torch.float64).eval()
    x = torch.randn(2, 5, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [getattr(block, name)(x) for name in ROWS]
    packed = pack_qkv(block)
    assert packed is block.qkv_proj
    assert type(packed) is nn.Linear
    assert (packed.in_features, packed.out_features, packed.training) == (C, 128, False)
    torch.testing.assert_close(packed(x).split(list(ROWS.values()), dim=-1), tuple(expected), rtol=1e-12, atol=1e-12)
    assert not any(hasattr(block, name) for name in ROWS)
    functional.mse_loss(packed(x), torch.zeros(2, 5, 128, dtype=torch.float64)).backward()
    assert packed.weight.grad.abs().min() > 0


def test_every_weight_is_released_before_the_next_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block()
    storages = [weakref.ref(getattr(block, name).weight) for name in ROWS]
    alive = []
    copy_ = Tensor.copy_

    def watch(self: Tensor, source: Tensor) -> Tensor:
        if self.dim() == 2 and not self.is_meta:
            gc.collect()
            alive.append([storage() is not None for storage in storages])
        return copy_(self, source)

    monkeypatch.setattr(Tensor, "copy_", watch)
    pack_qkv(block)
    assert alive == [[True, True, True], [False, True, True], [False, False, True]]
    assert not any(storage() for storage in storages)


def test_checkpoints_go_both_ways() -> None:
    plain, packed = Model(), packed_model()
    assert_same_state(packed.state_dict(), plain.state_dict())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    packed.load_state_dict(plain.state_dict())
    assert_same_state(packed.state_dict(), plain.state_dict())
    assert torch.equal(packed.layers[1].qkv_proj.weight[64:96], plain.layers[1].k_proj.weight)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.mul_(3)
    plain.load_state_dict(packed.state_dict())
    assert_same_state(packed.state_dict(), plain.state_dict())


def test_a_state_dict_holds_slices_and_not_copies() -> None:
    packed = packed_model()
    state = packed.state_dict()
    whole = packed.layers[0].qkv_proj.weight
    for name in ROWS:
        part = state[f"layers.0.{name}.weight"]
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert part.is_contiguous()


def test_safetensors_saves_it() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    packed = packed_model()
    assert_same_state(safetensors.load(safetensors.save(packed.state_dict())), Model().state_dict())


def test_it_survives_copies_and_pickling() -> None:
    packed = packed_model()
    again = io.BytesIO()
    torch.save(packed, again)
    again.seek(0)
    for twin in (copy.deepcopy(packed), torch.load(again, weights_only=False), packed.to(torch.float64).float()):
        assert_same_state(twin.state_dict(), Model().state_dict())
        twin.load_state_dict(Model().state_dict())
        unpack_qkv(twin.layers[0])
        assert_same_state(twin.state_dict(), Model().state_dict())


def test_weights_on_the_meta_device_are_assigned() -> None:
    with torch.device("meta"):
        packed = packed_model()
    packed.load_state_dict(Model().state_dict(), assign=True)
    assert_same_state(packed.state_dict(), Model().state_dict())
    assert packed.layers[0].qkv_proj.weight.requires_grad


def test_what_a_checkpoint_lacks_is_reported() -> None:
    packed, state = packed_model(), Model().state_dict()
    state["layers.0.k_proj.weight"] = state["layers.0.k_proj.weight"][:16]
    with pytest.raises(ValueError, match=r"layers.0.k_proj.weight.*: expected 64, 32, 32 rows, got .*\[16, 24\]"):
        packed.load_state_dict(state)
    state = Model().state_dict()
    del state["layers.1.v_proj.weight"]
    with pytest.raises(RuntimeError, match=r"layers\.1\.qkv_proj\.weight"):
        packed.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
def test_unpacking_restores_the_modules_without_a_copy(bias: bool) -> None:
    packed = packed_model(bias=bias)
    block = packed.layers[0].requires_grad_(False).eval()
    whole = block.qkv_proj.weight
    unpack_qkv(block)
    assert not hasattr(block, "qkv_proj")
    assert_same_state(packed.state_dict(), Model(bias=bias).state_dict())
    for name, rows in ROWS.items():
        linear = getattr(block, name)
        assert (linear.in_features, linear.out_features, linear.training) == (C, rows, False)
        assert linear.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert not linear.weight.requires_grad
    # and packs again.
    pack_qkv(block)
    assert_same_state(packed.state_dict(), Model(bias=bias).state_dict())


def test_what_replaced_the_projection_is_not_taken_apart() -> None:
    block = Block()
    whole = pack_qkv(block)
    block.qkv_proj = nn.Sequential(whole)
    with pytest.raises(TypeError, match=r"qkv_proj: expected a torch\.nn\.Linear, got Sequential"):
        unpack_qkv(block)
    assert block.qkv_proj[0] is whole


def test_optimizers_find_parameters_in_the_order_they_had() -> None:
    block = Block()
    order = [name for name, _ in block.named_parameters()]
    pack_qkv(block)
    assert [name for name, _ in block.named_children()] == ["qkv_proj", "o_proj"]
    unpack_qkv(block)
    assert [name for name, _ in block.named_parameters()] == order


def test_hooks_are_registered_once() -> None:
    block = Block()
    for _ in range(3):
        pack_qkv(block)
        unpack_qkv(block)
    assert len(block._state_dict_hooks) == len(block._load_state_dict_pre_hooks) == 1


def test_other_names() -> None:
    block = Block()
    block.query, block.key, block.value = block.q_proj, block.k_proj, block.v_proj
    expected = {name: getattr(block, name).weight.detach().clone() for name in ("query", "key", "value")}
    for name in ROWS:
        delattr(block, name)
    pack_qkv(block, ("query", "key", "value"))
    assert {"query.weight", "key.bias"} < set(block.state_dict())
    unpack_qkv(block)
    for name, weight in expected.items():
        assert torch.equal(getattr(block, name).weight, weight)


class Adapted(nn.Linear):
    pass


def broken(name: str, projection: nn.Module) -> Block:
    block = Block()
    setattr(block, name, projection)
    return block


def frozen_key() -> Block:
    block = Block()
    block.k_proj.requires_grad_(False)
    return block


def hooked_value() -> Block:
    block = Block()
    block.v_proj.register_forward_hook(lambda *_: None)
    return block


def graded_query() -> Block:
    block = Block()
    block.q_proj.weight.grad = torch.zeros(64, C)
    return block


def replaced_forward() -> Block:
    block = Block()
    block.q_proj.forward = block.k_proj.forward
    return block


def tied_value() -> Block:
    block = Block()
    block.v_proj.weight = block.k_proj.weight
    return block


def packed_block() -> Block:
    block = Block()
    pack_qkv(block)
    for name, rows in ROWS.items():
        setattr(block, name, nn.Linear(C, rows))
    return block


BAD = {
    "subclass": (TypeError, "q_proj: expected a torch.nn.Linear, got Adapted", broken("q_proj", Adapted(C, 64))),
    "missing": (TypeError, "v_proj: expected a torch.nn.Linear, got NoneType", broken("v_proj", None)),
    "width": (ValueError, "k_proj: expected q_proj's C, 24, got 12", broken("k_proj", nn.Linear(12, 32))),
    "dtype": (ValueError, "v_proj: expected q_proj's parameters", broken("v_proj", nn.Linear(C, 32).half())),
    "bias": (ValueError, "v_proj: expected q_proj's parameters", broken("v_proj", nn.Linear(C, 32, bias=False))),
    "frozen": (ValueError, "k_proj: expected q_proj's parameters.*frozen", frozen_key()),
    "mode": (
        ValueError,
        "k_proj: expected q_proj's mode, training, got eval",
        broken("k_proj", nn.Linear(C, 32).eval()),
    ),
    "rows": (ValueError, r"expected H D, G D and G D rows.*\[64, 32, 16\]", broken("v_proj", nn.Linear(C, 16))),
    "hooks": (ValueError, "v_proj: expected no hooks", hooked_value()),
    "grad": (ValueError, "q_proj: expected no .grad", graded_query()),
    "forward": (ValueError, "q_proj: expected no hooks and no forward of its own", replaced_forward()),
    "tied": (ValueError, "expected weights and biases of their own", tied_value()),
    "twice": (ValueError, "module: expected no qkv_proj yet, got a Block", packed_block()),
}


@pytest.mark.parametrize(("error", "match", "block"), BAD.values(), ids=BAD)
def test_what_can_not_be_packed_is_named(error: type[Exception], match: str, block: Block) -> None:
    before = list(dict(block.named_parameters()))
    with pytest.raises(error, match=match):
        pack_qkv(block)
    assert list(dict(block.named_parameters())) == before


def test_what_is_not_packed_can_not_be_unpacked() -> None:
    with pytest.raises(ValueError, match="module: expected one that pack_qkv packed, got Block"):
        unpack_qkv(Block())
    with pytest.raises(ValueError, match="names: expected three different names"):
        pack_qkv(Block(), ("q_proj", "k_proj", "k_proj"))
