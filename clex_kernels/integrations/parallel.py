"""transformers models over several ranks: attention heads split (tensor parallel), or sequences (context parallel).

**Heads.** transformers' own plan, from_pretrained(..., distributed_config=DistributedConfig(tp_size=n)), then
apply_clex or apply_raw_key_cache; or, for a model that is in memory already, shard_heads(model, mesh), before or after
them. q, k, v and o projections are DTensors then, each rank attends with its own heads, and its cache holds their raw
keys. The ODE's weights stay plain tensors, equal on all ranks, and so do their gradients: dfreq is summed over the
ranks once per step.

Where n does not divide the G key heads, transformers' plan cuts through heads and its forward fails. Here the k and v
projections are whole on every rank instead, which goes on with the key heads that its query heads read: query head h
reads key head h // (H / G), so one key head where G divides n, and else one for each query head. Its cache holds
those. The gradients of k and v are summed over the ranks where they leave the projections, so what comes behind them,
weights and hidden states, gets whole gradients, equal on all ranks, as from a projection that is split.

OLMo 2's and Phi-3's plans gather q, k and v, whose norms or layout know no heads: their ranks attend with all heads
alike, and nothing is summed. PhiMoE's plan leaves attention out. With data parallelism beside it, DistributedConfig(
tp_size=n, fsdp_size=m), the ODE's weights come after FSDP2 has gone through the model, so they need a line of their
own: shard_rotary(model.base_model.clex_layer, mesh), over the m ranks, before the first forward.

**Sequences.** apply_clex or apply_raw_key_cache, then shard_context(model, group). The model's forward then takes this
rank's zigzag shard of every sequence, and ring_attention does the rest:

    labels = torch.nn.functional.pad(tokens, (0, 1), value=-100)[:, 1:]     # what comes next, before it is cut
    mine, labels_here = zigzag_shard(tokens, group), zigzag_shard(labels, group)
    count = (labels != -100).sum() / dist.get_world_size(group)             # labels of a rank on average
    loss = model(mine, labels=labels_here, shift_labels=labels_here, num_items_in_batch=count).loss

The mean of the ranks' losses is the one of the whole sequences, and the mean of the ranks' gradients is its gradient,
for all parameters alike: that is what DistributedDataParallel and FSDP2 over these ranks make of it. (Without
num_items_in_batch every rank's mean counts alike, however few labels it has; and the auxiliary loss of a mixture of
experts is that of a rank's own tokens.)

Both together need two meshes of which every rank is in one of each. Ranks that share sequences must draw the same t and
positions: give them generators in the same state, as StepGenerator of clex_kernels.distributed does. That is looked at
in the first step.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from clex_kernels.distributed.groups import Group, Ranks, ranks_of
from clex_kernels.distributed.tensor import sum_gradients
from clex_kernels.integrations.families import find_base
from clex_kernels.integrations.raw_keys import RawKeyRotary, arguments_of

__all__ = ["shard_context", "shard_heads"]

# how the families call what makes queries; the last two make keys and values too.
_QUERIES = ("q_proj", "query_key_value", "qkv_proj")
_KEYS_AND_VALUES = ("k_proj", "v_proj")
_OF_ONE_HEAD = "replicated_with_grad_allreduce"


class _Attention(NamedTuple):
    """A layer's attention, and the projection in it that makes queries, with its name in the model's plan."""

    module: nn.Module
    queries: nn.Module
    plan_name: str


class _OwnHeads:
    """A hook on a whole projection of keys or values [B, L, G D], which goes on with some of the heads."""

    def __init__(self, ranks: Ranks, heads: list[int], head_dim: int):
        self.ranks = ranks
        self.heads = heads
        self.head_dim = head_dim

    def __call__(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and output.requires_grad:
            output = sum_gradients(output, self.ranks.group)
        heads = output.unflatten(-1, (-1, self.head_dim)).unbind(-2)
        return torch.cat([heads[head] for head in self.heads], dim=-1)


def shard_heads(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Split a model's attention heads, and all else its tensor parallel plan names, over the ranks of `mesh`, in place.

    For a model that every rank has whole and alike. It works before and after apply_clex or apply_raw_key_cache, and
    remove_clex or remove_raw_key_cache leave it as it is. save_pretrained, which all ranks must call, then writes whole
    weights. Make the optimizer afterwards.

    Args:
        model: of a family that apply_clex knows, with the head it is used with (LlamaForCausalLM, say).
        mesh: of one dimension, or with one that is called "tp".

    Raises:
        TypeError: model or mesh is of the wrong type.
        ValueError: the family's plan leaves attention out, mesh's size does not divide the heads, or the model is split
            or sharded already (fully_shard comes afterwards).
        RuntimeError: transformers is too old to have a plan for models in memory.
    """
    base = find_base(model)
    mesh = _tensor_mesh(mesh)
    layers = list(_attentions(model, base))
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        raise ValueError("model: expected one that every rank has whole, got one that is split or sharded already")
    plan = dict(model.tp_plan or {})
    if any(layer.plan_name not in plan for layer in layers):
        raise ValueError(
            "model: expected a family whose tensor parallel plan splits attention, got"
            f" {type(model).__name__} (model_type {base.config.model_type!r}), whose plan has no"
            f" {layers[0].plan_name!r}"
        )
    if plan[layers[0].plan_name] == "colwise":
        ranks = ranks_of(mesh)
        _, kv_heads = _check_heads(base, ranks)
        _plan_attention(plan, layers, ranks, shares_key_heads=kv_heads % ranks.size > 0)
    _apply_plan(model, mesh, plan)
    if isinstance(base.rotary_emb, RawKeyRotary):
        base.rotary_emb.split = base.rotary_emb.split._replace(heads=take_heads(model, base))
    else:
        take_heads(model, base)


def shard_context(model: PreTrainedModel, group: Group = None) -> None:
    """From now on the forward of a patched model takes zigzag shards [B, L / n] of sequences [B, L], in place.

    input_ids or inputs_embeds are this rank's shard, and so are a 2-D mask of padding and position_ids, where they are
    given; logits come out alike. t is that of whole sequences, of each by itself under a mask. No cache can be used,
    and a causal model's labels need shift_labels beside them, since what comes next may be another rank's. remove_clex
    or remove_raw_key_cache end it. The module docstring says how losses and gradients are taken.

    Args:
        model: patched by apply_clex or apply_raw_key_cache.
        group: a process group, a device mesh of one dimension, or None for all ranks; all of them have the model whole
            and alike (or its heads split over other ranks).

    Raises:
        TypeError: model or group is of the wrong type.
        ValueError: the model is not patched, or split so already, or this process is not in the group.
    """
    base = find_base(model)
    if not isinstance(base.rotary_emb, RawKeyRotary):
        raise ValueError("model: expected one patched by apply_clex or apply_raw_key_cache, got one that is not")
    if base.rotary_emb.split.tokens is not None:
        raise ValueError("model: expected one that takes whole sequences, got one under shard_context already")
    base.rotary_emb.split = base.rotary_emb.split._replace(tokens=ranks_of(group))
    if getattr(model, "loss_type", None) == "ForCausalLM":
        base.rotary_emb.also_remove(model.register_forward_pre_hook(_check_labels, with_kwargs=True))


def _check_labels(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """That the loss does not move labels within a shard, whose chunks are no neighbours."""
    given = arguments_of(model, args, kwargs)
    if given.get("labels") is not None and given.get("shift_labels") is None:
        raise ValueError(
            "shift_labels: expected what comes next for every token, moved before it is cut by zigzag_shard, beside"
            " labels where sequences are split over ranks (shard_context), got None"
        )


def take_heads(model: PreTrainedModel, base: PreTrainedModel) -> Ranks | None:
    """The ranks over which a plan has split the heads of every layer, if it has; each then gets key heads to its own.

    Raises:
        ValueError: the heads can't be split so.
    """
    layers = list(_attentions(model, base))
    mesh = _mesh_of_heads(model, layers[0])
    if mesh is None:
        return None
    ranks = ranks_of(mesh)
    heads, kv_heads = _check_heads(base, ranks)
    if kv_heads % ranks.size:
        own = _own_key_heads(heads, kv_heads, ranks)
        for layer in layers:
            for name in _KEYS_AND_VALUES:
                projection = getattr(layer.module, name)
                _make_whole(projection, mesh)
                if not any(isinstance(hook, _OwnHeads) for hook in projection._forward_hooks.values()):
                    projection.register_forward_hook(_OwnHeads(ranks, own, layer.module.head_dim))
            # transformers' own attention goes by it.
            layer.module.num_key_value_groups = heads // ranks.size // len(own)
    return ranks


def _mesh_of_heads(model: PreTrainedModel, layer: _Attention) -> DeviceMesh | None:
    """The mesh over which queries are split, if they are, and are not gathered again."""
    weight = layer.queries.weight
    if not isinstance(weight, DTensor) or (model.tp_plan or {}).get(layer.plan_name) != "colwise":
        return None
    mesh = weight.device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        return mesh["tp"]
    # FSDP's alone, or one that somebody has split by torch's own parallelize_module.
    is_for_data = mesh.ndim > 1 or any(isinstance(part, FSDPModule) for part in model.modules())
    return None if is_for_data else mesh


def _plan_attention(plan: dict[str, str], layers: list[_Attention], ranks: Ranks, shares_key_heads: bool) -> None:
    """Let `plan` say what it must for attention whose heads are split."""
    place = layers[0].plan_name.rpartition(".")[0]
    if shares_key_heads:
        plan |= {f"{place}.{name}": "replicate" for name in _KEYS_AND_VALUES}
    for name, _ in layers[0].module.named_children():
        # norms of single heads. transformers' own way sums again what earlier backward passes have left, and Phi's plan
        # lacks them.
        if plan.get(f"{place}.{name}", _OF_ONE_HEAD) == _OF_ONE_HEAD:
            plan[f"{place}.{name}"] = "replicate"
            for layer in layers:
                for weight in getattr(layer.module, name).parameters(recurse=False):
                    # a frozen one takes no hook, and may be trained later.
                    trained = weight.requires_grad
                    weight.requires_grad_(True).register_hook(partial(_sum, ranks))
                    weight.requires_grad_(trained)


def _sum(ranks: Ranks, gradient: Tensor) -> Tensor:
    gradient = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(gradient, group=ranks.group)
    return gradient


def _make_whole(projection: nn.Module, mesh: DeviceMesh) -> None:
    """Undo a cut of keys or values over the ranks of `mesh`, if there is one."""
    for name, weight in projection.named_parameters(recurse=False):
        if not isinstance(weight, DTensor):
            continue
        if weight.device_mesh == mesh:
            setattr(projection, name, nn.Parameter(weight.full_tensor().detach(), requires_grad=weight.requires_grad))
            # transformers exchanges a module's forward for one that takes its weights for split ones.
            vars(projection).pop("forward", None)
        elif weight.device_mesh.ndim > 1:
            raise ValueError(
                f"model: expected k_proj and v_proj that are not cut where its weights are sharded for data parallelism"
                f" too, since {mesh.size()} ranks do not divide its key heads, got some that are; load it with"
                " DistributedConfig(tp_plan={...}) that says 'replicate' for both"
            )


def _own_key_heads(heads: int, kv_heads: int, ranks: Ranks) -> list[int]:
    """The key heads that one rank's query heads read: one, if all of them do on every rank, or one for each."""
    here = heads // ranks.size
    read = [head // (heads // kv_heads) for head in range(ranks.rank * here, (ranks.rank + 1) * here)]
    return read[:1] if ranks.size % kv_heads == 0 else read


def _check_heads(base: PreTrainedModel, ranks: Ranks) -> tuple[int, int]:
    """H and G."""
    heads = base.config.num_attention_heads
    if heads % ranks.size:
        raise ValueError(f"mesh: expected a size that divides the model's H = {heads} heads, got {ranks.size}")
    return heads, getattr(base.config, "num_key_value_heads", None) or heads


def _attentions(model: PreTrainedModel, base: PreTrainedModel) -> Iterator[_Attention]:
    names = {part: name for name, part in model.named_modules()}
    for layer in base.layers:
        for part in layer.children():
            for name in _QUERIES:
                if hasattr(part, name):
                    queries = getattr(part, name)
                    yield _Attention(part, queries, re.sub(r"\.\d+(?=\.|$)", ".*", names[queries]))


def _tensor_mesh(mesh: DeviceMesh) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim > 1 and "tp" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"mesh: expected one dimension, or one called 'tp', got {mesh}")
    return mesh["tp"] if mesh.ndim > 1 else mesh


def _apply_plan(model: PreTrainedModel, mesh: DeviceMesh, plan: dict[str, str]) -> None:
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise RuntimeError(
            f"transformers: expected a version whose plans apply to models in memory (5.24), got"
            f" {transformers.__version__}"
        ) from error
    _untie(model)
    apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(plan))
    model.tie_weights()
    # what from_pretrained notes, for save_pretrained, generate() and Trainer.
    model.config.distributed_config = DistributedConfig(tp_size=mesh.size())
    model._device_mesh = mesh
    model._tp_size = mesh.size()
    model._is_distributed_loading_by_transformers = True


def _untie(model: nn.Module) -> None:
    """Parameters of their own for all modules, over the same memory: a plan passes over the second of two alike."""
    met: set[Tensor] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight in met:
                setattr(module, name, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))
            met.add(weight)
