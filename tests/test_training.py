"""Training: the ODE in a parameter group of its own, and its gradient through every layer, however the model runs."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ropes import CONFIG, make_rope, seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers_models import CLEX_FAMILIES, clex_model, random_tokens, widen_norms

from clex_kernels import ClexConfig, clip_gradients, param_groups
from clex_kernels.integrations import raw_keys
from clex_kernels.integrations.transformers import SAMPLING
from clex_kernels.sampling import draw_times

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*", "ignore:.*past_key_values.*")
TOKENS = random_tokens(2, 8)
ODE = ("proj_func.ode_up_proj", "proj_func.ode_down_proj")


def first_seed(t: float) -> int:
    """A seed of torch's generator with which a forward draws this length factor."""
    config, share = ClexConfig(head_dim=16, train_length=8, max_factor=4), SAMPLING["plain_share"]
    return next(seed for seed in range(100) if draw_times(config, 1, seeded(seed), "integer", share) == [t])


SEEDS = {t: first_seed(t) for t in (1.0, 2.0, 4.0)}


class OwnModel(nn.Module):
    """A model that holds a rotary embedding and a layer, whose weight is shared with another's."""

    def __init__(self):
        super().__init__()
        self.rope = make_rope(CONFIG)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def loss_of(model: Callable[..., Any], t: float) -> Tensor:
    """The loss on TOKENS, at positions drawn at random for this length factor."""
    torch.manual_seed(SEEDS[t])
    logits = model(input_ids=TOKENS, use_cache=False).logits
    # transformers' own loss is in fp32.
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())


def gradients_of(model: PreTrainedModel, t: float, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Of all weights by name, and the loss as "loss"; `forward` is `model` in some wrapping."""
    model.zero_grad()
    loss = loss_of(model if forward is None else forward, t)
    loss.backward()
    return {"loss": loss.detach()} | {name: weight.grad.clone() for name, weight in model.named_parameters()}


def ode_gradients(gradients: dict[str, Tensor]) -> list[Tensor]:
    found = [gradient for name, gradient in gradients.items() if name.endswith(ODE)]
    assert len(found) == 2
    return found


def test_the_ode_has_its_own_rate_decay_and_clip():
    model = OwnModel()
    rest, ode = param_groups(model, lr=0.1, ode_lr=0.2, weight_decay=0.3, max_norm=4.0, ode_max_norm=5.0)
    assert {"lr": 0.1, "weight_decay": 0.3, "max_norm": 4.0}.items() <= rest.items()
    assert {"lr": 0.2, "weight_decay": 0.0, "max_norm": 5.0}.items() <= ode.items()
    assert {id(weight) for weight in ode["params"]} == {id(weight) for weight in model.rope.parameters()}
    assert [id(weight) for weight in rest["params"]] == [
        id(weight) for weight in (model.first.weight, model.first.bias, model.second.bias)
    ]


def test_groups_are_the_same_in_a_wrapping():
    model = clex_model("llama").float()
    for group, expected in zip(param_groups(nn.Sequential(model), lr=0.1), param_groups(model, lr=0.1), strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected["params"]))


def test_groups_hold_what_lora_trains():
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["clex_layer"], task_type="CAUSAL_LM")
    model = get_peft_model(clex_model("llama").float(), settings)
    rest, ode = param_groups(model, lr=0.1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert len(rest["params"]) == 4
    assert all("lora" in names[id(weight)] for weight in rest["params"])
    found = [names[id(weight)].split("clex_layer.")[1] for weight in ode["params"]]
    assert found == [f"modules_to_save.default.{name}" for name in ODE]


def test_frozen_weights_are_left_out():
    model = OwnModel()
    model.first.requires_grad_(False)
    rest, ode = param_groups(model, lr=0.1)
    assert [id(weight) for weight in rest["params"]] == [id(model.second.bias)]
    assert len(ode["params"]) == 2
    model.second.requires_grad_(False)
    (ode,) = param_groups(model, lr=0.1)
    assert ode["lr"] == 1e-5
    model.rope.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected parameters that require gradients, got none"):
        param_groups(model, lr=0.1)


def test_frozen_ode_warns():
    model = OwnModel()
    model.rope.requires_grad_(False)
    with pytest.warns(UserWarning, match="clex_layer in modules_to_save"):
        (rest,) = param_groups(model, lr=0.1)
    assert len(rest["params"]) == 3


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("llama", {}, TypeError, "model: expected a torch.nn.Module, got str"),
        (nn.Linear(2, 2), {}, ValueError, "model: expected one with a ClexRotaryEmbedding in it, got Linear"),
        (None, {"lr": "fast"}, TypeError, "lr: expected a number, got 'fast'"),
        (None, {"ode_lr": -1e-5}, ValueError, "ode_lr: expected a finite number of at least 0, got -1e-05"),
        (None, {"weight_decay": math.inf}, ValueError, "weight_decay: expected a finite number"),
        (None, {"max_norm": 0}, ValueError, "^max_norm: expected a positive number, infinity for no clip, got 0"),
        (None, {"ode_max_norm": math.nan}, ValueError, "ode_max_norm: expected a positive number"),
    ],
)
def test_bad_models_and_options_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        param_groups(OwnModel() if model is None else model, **({"lr": 0.1} | options))


def test_each_group_is_clipped_by_its_own_norm():
    model = OwnModel()
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, max_norm=2.0, ode_max_norm=0.5))
    for weight in model.rope.parameters():
        weight.grad = torch.full_like(weight, 1e4)
    model.first.weight.grad, model.first.bias.grad = torch.full((4, 4), 0.25), torch.zeros(4)
    rest, ode = clip_gradients(optimizer)
    assert_close(rest, torch.tensor(1.0))
    assert_close(ode, torch.tensor(1e4 * math.sqrt(sum(weight.numel() for weight in model.rope.parameters()))))
    assert_close(model.first.weight.grad, torch.full((4, 4), 0.25))
    after = torch.cat([weight.grad.flatten() for weight in model.rope.parameters()])
    assert_close(after.norm(), torch.tensor(0.5))


def test_clips_survive_a_checkpoint_of_the_optimizer():
    model = OwnModel()
    state = torch.optim.AdamW(param_groups(model, lr=0.1, max_norm=2.0, ode_max_norm=0.5)).state_dict()
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1))
    optimizer.load_state_dict(state)
    assert [group["max_norm"] for group in optimizer.param_groups] == [2.0, 0.5]


def test_clipping_needs_the_groups():
    with pytest.raises(ValueError, match='optimizer: expected "max_norm" in every group, as param_groups'):
        clip_gradients(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_all_layers_of_a_forward_share_one_draw(monkeypatch):
    model = clex_model("llama").train()
    tables = []

    def record(q: Tensor, k: Tensor, v: Tensor, table: Any, *args: Any, **options: Any) -> Tensor:
        tables.append(table)
        return attend(q, k, v, table, *args, **options)

    attend = raw_keys.attention
    monkeypatch.setattr(raw_keys, "attention", record)
    for t in SEEDS:
        loss_of(model, t)
    assert [float(table.t) for table in tables] == [t for t in SEEDS for _ in range(2)]
    assert all(first is second for first, second in zip(tables[::2], tables[1::2], strict=True))


@pytest.mark.parametrize("family", CLEX_FAMILIES)
def test_ode_gradients_are_the_slopes_of_the_loss(family):
    model = clex_model(family).train()
    widen_norms(model)
    weights = list(model.base_model.clex_layer.parameters())
    with torch.no_grad():
        for weight in weights:
            # less curved, for differences to come close to slopes.
            weight.mul_(0.2)
    found = ode_gradients(gradients_of(model, 4.0))
    directions = [torch.linspace(-1, 1, weight.numel()).view_as(weight).double() for weight in weights]

    @torch.no_grad()
    def move(step: float) -> None:
        for weight, direction in zip(weights, directions, strict=True):
            weight.add_(direction, alpha=step)

    step, losses = 1e-6, []
    for change in (step, -2 * step):
        move(change)
        losses.append(loss_of(model, 4.0).item())
    slope = (losses[0] - losses[1]) / (2 * step)
    expected = sum(float((gradient * direction).sum()) for gradient, direction in zip(found, directions, strict=True))
    assert abs(expected) > 1e-4
    # routers are in fp32.
    assert slope == pytest.approx(expected, rel=1e-3 if family in ("mixtral", "qwen2_moe", "qwen3_moe") else 1e-5)


def test_the_ode_gradient_is_the_sum_over_layers(monkeypatch):
    model = clex_model("llama").train()
    whole = ode_gradients(gradients_of(model, 4.0))
    attend = raw_keys.attention

    def through_one_layer(kept: int) -> list[Tensor]:
        layers = itertools.count()

        def attend_in(q: Tensor, k: Tensor, v: Tensor, table: Any, *args: Any, **options: Any) -> Tensor:
            if next(layers) != kept:
                table = replace(table, freq=table.freq.detach())
            return attend(q, k, v, table, *args, **options)

        monkeypatch.setattr(raw_keys, "attention", attend_in)
        return ode_gradients(gradients_of(model, 4.0))

    for gradient, *parts in zip(whole, through_one_layer(0), through_one_layer(1), strict=True):
        assert all(part.norm() > 0 for part in parts)
        assert_close(gradient, sum(parts))


def test_plain_steps_give_the_ode_a_gradient_of_zero():
    model = clex_model("llama").train()
    gradients = gradients_of(model, 1.0)
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in ode_gradients(gradients))
    assert gradients["model.layers.0.self_attn.q_proj.weight"].norm() > 0


@pytest.mark.parametrize("t", SEEDS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_checkpointing_changes_no_gradient(family, t):
    model = clex_model(family).train()
    expected = gradients_of(model, t)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients_of(model, t), expected)


def test_reentrant_checkpointing_is_refused():
    model = clex_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant: expected False for activation"):
        model(TOKENS)


def test_bf16_autocast_stays_close():
    model = clex_model("llama").float().train()
    expected = gradients_of(model, 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(model, 4.0)
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)
    for gradient, exact in zip(ode_gradients(found), ode_gradients(expected), strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < (gradient - exact).norm() < 0.1 * exact.norm()


def test_compiled_model_has_the_same_gradients_and_one_break():
    model = clex_model("llama", layers=1).float().train()
    expected = {t: gradients_of(model, t) for t in SEEDS}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for t in SEEDS:
        assert_close(gradients_of(model, t, compiled), expected[t])
    # up to the table, which is built outside, and from there on; no draw of t compiles anew.
    assert counter.frame_count == 2
