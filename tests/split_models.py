"""What four processes see of transformers models whose heads or sequences are split over them, for tests."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers_models import (
    clex_config,
    in_steps,
    pad_left,
    random_tokens,
    scaled_model,
    stock_model,
    widen_norms,
)

from clex_kernels import clip_gradients, param_groups
from clex_kernels.distributed.context import zigzag_positions, zigzag_shard, zigzag_unshard
from clex_kernels.distributed.data import shard_rotary
from clex_kernels.integrations.parallel import shard_context, shard_heads
from clex_kernels.integrations.transformers import (
    apply_clex,
    apply_raw_key_cache,
    remove_clex,
    remove_raw_key_cache,
)

LENGTH, STEPS, NEW = 32, 3, 24
SAMPLING = {"positions": "runs", "factors": "continuous", "plain_share": 0.0}

# family and what it has beyond the tiny models' common sizes, by the case that needs it.
LLAMA = {kv: ("llama", {"num_key_value_heads": kv}) for kv in (4, 2, 1)}
UNEVEN = ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3})
MISTRAL = ("mistral", {"sliding_window": 7})
TIED = ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True})
QWEN3 = ("qwen3", {"num_key_value_heads": 1})
# how heads come to be split.
SPLIT_HEADS = {
    "plan-R4-G4": (*LLAMA[4], 4, "plan"),
    "plan-R4-G2": (*LLAMA[2], 4, "plan"),
    "plan-R4-G1": (*LLAMA[1], 4, "plan"),
    "replicated-R4-G2": (*LLAMA[2], 4, "replicated"),
    "after-R2-G2": (*LLAMA[2], 2, "after"),
    "before-R2-G1": (*LLAMA[1], 2, "before"),
    "before-R2-G3-uneven": (*UNEVEN, 2, "before"),
    "after-R2-tied": (*TIED, 2, "after"),
    "after-R2-qwen2-biases": ("qwen2", {}, 2, "after"),
    "after-R2-qwen3-norms-G1-accumulated": (*QWEN3, 2, "after"),
    "after-R2-mixtral": ("mixtral", {}, 2, "after"),
    "after-R2-gpt_neox-fused": ("gpt_neox", {}, 2, "after"),
    "after-R2-olmo2-gathered": ("olmo2", {}, 2, "after"),
    "after-R2-phi": ("phi", {"qk_layernorm": True}, 2, "after"),
    "after-R2-G1-checkpointed": (*LLAMA[1], 2, "after"),
}
GENERATING = ("plan-R4-G2", "after-R2-G2", "before-R2-G3-uneven")
SAVED = ("plan-R4-G4", "plan-R4-G2", "after-R2-tied")
SPLIT_TOKENS = {
    "R2": (*LLAMA[2], 2),
    "R4": (*LLAMA[2], 4),
    "R2-mistral-window": (*MISTRAL, 2),
    "R2-gemma2-softcap": ("gemma2", {}, 2),
    "R2-checkpointed": (*LLAMA[2], 2),
    "R2-padded": (*LLAMA[2], 2),
}


def as_clex(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """The model as a CLEX model with an ODE far from its start, which draws t and positions by a seed."""
    sampling = {**SAMPLING, "generator": torch.Generator().manual_seed(seed)}
    rope = apply_clex(model, clex_config(model), sampling)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in rope.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def make_model(family: str, extras: dict[str, Any]) -> PreTrainedModel:
    return widen_norms(as_clex(stock_model(family, **extras)))


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def batch(step: int = 0) -> Tensor:
    return random_tokens(2, LENGTH, seed=step)


def padded() -> tuple[Tensor, Tensor]:
    return pad_left([random_tokens(1, LENGTH, 1)[0], random_tokens(1, 11, 2)[0]])


class Whole:
    """How one process, or one whose heads are split, calls a model."""

    def __init__(self, model: nn.Module):
        self.model = model

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, V]."""
        return self.model(tokens, attention_mask=mask, use_cache=False).logits

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What to go back from, and the mean over all labels."""
        # in fp64, where transformers' own goes through fp32.
        loss = F.cross_entropy(self.logits(tokens, mask).flatten(0, 1), next_tokens(tokens, mask).flatten())
        return loss, loss


class Shards(Whole):
    """How one whose sequences are split calls it, under DistributedDataParallel."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup):
        self.model = model
        self.group = group

    def logits(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return zigzag_unshard(self._mine(tokens, mask), self.group)

    def loss(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        labels = next_tokens(tokens, mask)
        count = (labels != -100).sum() / dist.get_world_size(self.group)
        logits, labels = self._mine(tokens, mask), zigzag_shard(labels, self.group)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM, group=self.group)
        return loss, mean / dist.get_world_size(self.group)

    def _mine(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else zigzag_shard(mask, self.group)
        return self.model(zigzag_shard(tokens, self.group), attention_mask=mask).logits


def next_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def train(model: PreTrainedModel, calls: Whole, mask: Tensor | None, passes: int) -> dict[str, Any]:
    """Losses of a few steps of so many backward passes, gradients of the first, all weights after the last."""
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, ode_lr=1e-3))
    losses, gradients = [], {}
    for step in range(STEPS):
        for _ in range(passes):
            loss, mean = calls.loss(batch(step), mask)
            loss.backward()
        if step == 0:
            gradients = {name: full(weight.grad) for name, weight in model.named_parameters()}
        clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.detach())
    model.eval()
    weights = {name: full(weight) for name, weight in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def observe(model: PreTrainedModel, calls: Whole, case: str) -> dict[str, Any]:
    """Everything that must not depend on the number of processes."""
    if "checkpointed" in case:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = padded()[1] if "padded" in case else None
    with torch.no_grad():
        seen = {"logits": calls.logits(batch()), "padded": calls.logits(*padded())}
    seen |= train(model, calls, mask, passes=2 if "accumulated" in case else 1)
    with torch.no_grad():
        seen["logits after"] = calls.logits(batch())
    return seen


@torch.no_grad()
def plain_logits(model: PreTrainedModel) -> Tensor:
    """Logits of transformers' own way to attend to key heads, once CLEX is gone."""
    remove_clex(model)
    model.set_attn_implementation("eager")
    return model(batch()).logits


@torch.no_grad()
def generate(model: PreTrainedModel) -> dict[str, Any]:
    """Tokens, logits and the heads that a cache holds, greedy, of a batch padded on the left."""
    tokens, mask = pad_left([random_tokens(1, 9, 1)[0], random_tokens(1, 4, 2)[0]])
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(tokens, attention_mask=mask, **options)
    return {
        "tokens": out.sequences,
        "logits": torch.stack(out.logits),
        "heads": out.past_key_values.layers[0].keys.shape[1],
    }


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What each of the four processes sees, by case."""
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    meshes = {2: two["tp"], 4: init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))}
    seen: dict[str, Any] = {}
    for case, (family, extras, ranks, how) in SPLIT_HEADS.items():
        model = split_model(family, extras, meshes[ranks], how, folder / case)
        seen[case] = observe(model, Whole(model), case)
        if case in GENERATING:
            seen[case]["generated"] = generate(model)
        if case in SAVED:
            model.save_pretrained(folder / f"{case} again")
        seen[case]["plain logits"] = plain_logits(model)
    for case, (family, extras, ranks) in SPLIT_TOKENS.items():
        model = make_model(family, extras)
        group = meshes[ranks].get_group()
        shard_context(model, group)
        seen[f"tokens {case}"] = observe(
            model, Shards(DistributedDataParallel(model, process_group=group), group), case
        )
    seen["both"] = split_twice(two)
    seen["sharded"] = shard_all(meshes[2])
    seen["raw keys"] = decode_raw_keys(meshes[2])
    seen["copy"] = copied(meshes[2])
    seen["frozen"] = frozen_at_first(meshes[2])
    seen["loss"] = own_loss(meshes[4].get_group())
    seen["bf16"] = in_bf16(meshes[2])
    seen["refused"] = refusals(rank, meshes[4])
    return seen


def split_model(family: str, extras: dict[str, Any], mesh: DeviceMesh, how: str, folder: Path) -> PreTrainedModel:
    if how in ("plan", "replicated"):
        if dist.get_rank() == 0:
            as_clex(stock_model(family, **extras)).save_pretrained(folder)
        dist.barrier()
        names = (f"model.layers.*.self_attn.{name}" for name in ("k_proj", "v_proj"))
        plan = dict.fromkeys(names, "replicate") if how == "replicated" else None
        config = DistributedConfig(tp_size=mesh.size(), tp_plan=plan)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float64)
        apply_clex(model, sampling={**SAMPLING, "generator": torch.Generator().manual_seed(5)})
    elif how == "after":
        model = as_clex(stock_model(family, **extras))
        shard_heads(model, mesh)
    else:
        model = stock_model(family, **extras)
        shard_heads(model, mesh)
        as_clex(model)
    return widen_norms(model)


def split_twice(mesh: DeviceMesh) -> dict[str, Any]:
    """Losses and gradients where heads are split over pairs of ranks, and sequences over the others."""
    model = make_model(*LLAMA[1])
    shard_heads(model, mesh["tp"])
    shard_context(model, mesh["cp"])
    model.train()
    loss, mean = Shards(model, mesh["cp"].get_group()).loss(batch())
    loss.backward()
    gradients = {}
    for name, weight in model.named_parameters():
        # what DistributedDataParallel does; it takes no DTensors.
        local = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        dist.all_reduce(local, group=mesh["cp"].get_group())
        local /= 2
        gradients[name] = full(weight.grad)
    return {"losses": [mean.detach()], "gradients": gradients}


def shard_all(mesh: DeviceMesh) -> dict[str, Any]:
    """Losses and gradients where the same ranks share sequences and, by FSDP2, all weights."""
    model = make_model(*LLAMA[2])
    shard_context(model, mesh)
    shard_rotary(model.base_model.clex_layer, mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    loss, mean = Shards(model, mesh.get_group()).loss(batch())
    loss.backward()
    return {"losses": [mean.detach()], "gradients": {n: full(weight.grad) for n, weight in model.named_parameters()}}


def raw_key_logits(model: PreTrainedModel) -> Tensor:
    return in_steps(model, batch(), [6] + [1] * (LENGTH - 6), DynamicCache(config=model.config))


def decode_raw_keys(mesh: DeviceMesh) -> dict[str, Tensor]:
    """Logits of a model whose own RoPE moves, over a cache that is computed anew."""
    model = scaled_model("llama", "dynamic", num_key_value_heads=1)
    shard_heads(model, mesh)
    apply_raw_key_cache(model, recompute=True)
    seen = {"decoded": raw_key_logits(model)}
    remove_raw_key_cache(model)
    whole = scaled_model("llama", "dynamic", num_key_value_heads=1)
    apply_raw_key_cache(whole)
    shard_context(whole, mesh)
    with torch.no_grad():
        seen["shards"] = Shards(whole, mesh.get_group()).logits(batch())
    return seen


def copied(mesh: DeviceMesh) -> dict[str, Any]:
    """What a copy of a model sees that takes shards."""
    model = make_model(*LLAMA[2])
    shard_context(model, mesh)
    model = copy.deepcopy(model)
    group = mesh.get_group()
    return observe(model, Shards(DistributedDataParallel(model, process_group=group), group), "")


def frozen_at_first(mesh: DeviceMesh) -> dict[str, Any]:
    """What a model sees whose weights were frozen while its heads were split."""
    model = make_model(*QWEN3).requires_grad_(False)
    shard_heads(model, mesh)
    return observe(model.requires_grad_(True), Whole(model), "")


def own_loss(group: dist.ProcessGroup) -> Tensor:
    """The mean of the ranks' losses by transformers' own way to take one, and of a shard's positions."""
    model = make_model(*LLAMA[2])
    shard_context(model, group)
    labels = next_tokens(batch(), None)
    count = (labels != -100).sum() / dist.get_world_size(group)
    labels, positions = zigzag_shard(labels, group), zigzag_positions(LENGTH, group)[None]
    shards = {"labels": labels, "shift_labels": labels, "num_items_in_batch": count, "position_ids": positions}
    loss = model(zigzag_shard(batch(), group), **shards).loss.detach()
    dist.all_reduce(loss, group=group)
    return loss / dist.get_world_size(group)


def in_bf16(mesh: DeviceMesh) -> dict[str, Any]:
    seen = {}
    for name in ("heads", "tokens"):
        model = make_model(*LLAMA[1]).float()
        calls = Whole(model)
        if name == "heads":
            shard_heads(model, mesh)
        else:
            shard_context(model, mesh)
            calls = Shards(DistributedDataParallel(model, process_group=mesh.get_group()), mesh.get_group())
        seen[name] = bf16_step(model, calls)
    return seen


def bf16_step(model: PreTrainedModel, calls: Whole) -> dict[str, Tensor]:
    """Logits and the ODE's gradients under autocast."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = calls.loss(batch())
    loss.backward()
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = calls.logits(batch())
    return {"logits": logits.float(), "ode": model.base_model.clex_layer.proj_func.ode_down_proj.grad}


def refusals(rank: int, mesh: DeviceMesh) -> dict[str, str]:
    """What is said to calls that can't be served."""
    said = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except (TypeError, ValueError) as error:
            said[name] = str(error)

    six = stock_model("llama", num_attention_heads=6, num_key_value_heads=6)
    note("heads", lambda: shard_heads(six, mesh))
    note("family", lambda: shard_heads(stock_model("phimoe"), mesh))
    note("mesh", lambda: shard_heads(six, mesh.get_group()))
    split = make_model(*LLAMA[4])
    shard_heads(split, mesh)
    note("copy", lambda: copy.deepcopy(split))
    note("split already", lambda: shard_heads(split, mesh))
    by_hand = make_model(*LLAMA[4])
    apply_tensor_parallelism(by_hand, mesh, by_hand._expand_parallel_plan(by_hand.tp_plan))
    note("split by hand", lambda: by_hand(batch()))
    note("not patched", lambda: shard_context(six, mesh))
    for name, model in (("heads draw apart", split), ("tokens draw apart", make_model(*LLAMA[2]))):
        if name.startswith("tokens"):
            shard_context(model, mesh)
            note("twice", lambda model=model: shard_context(model, mesh))
        model.base_model.rotary_emb.frequencies.sampling["generator"].manual_seed(rank)
        model.train()
        note(name, lambda model=model: model(batch()))
        model.eval()
    note("cache", lambda: model(batch(), past_key_values=DynamicCache(config=model.config)))
    note("use_cache", lambda: model(batch(), use_cache=True))
    note("generate", lambda: model.generate(batch(), max_new_tokens=2))
    note("labels", lambda: model(batch(), labels=batch()))
    note("uncut positions", lambda: model(batch(), position_ids=torch.arange(LENGTH)[None]))
    holes = zigzag_shard(torch.ones(2, 4 * LENGTH).index_fill(1, torch.tensor([40]), 0.0), mesh)
    note("holes", lambda: model(batch(), attention_mask=holes))
    return said
