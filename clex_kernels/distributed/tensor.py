"""Tensor parallel attention: the heads of a ClexAttention dealt out to the ranks of a mesh.

With H query heads, G key heads and n ranks, n a divisor of H and a divisor or a multiple of G, rank r has

    query heads    H / n, from r H / n on
    key heads      G / n, from r G / n on; or, where n is a multiple of G, the one of its query heads, r // (n / G)
    o_proj         the columns of its query heads

and computes from all of x [B, L, C] its heads' part of the output, [B, L, C] too. These parts are added up by the one
all-reduce of the forward pass; o_proj's bias comes on top once. The gradient of x is added up by the one all-reduce of
the backward pass; those of freq (once per step, if the table went through `replicate_table`) and of key heads that
several ranks share are added up beside it, so that what is equal on all ranks stays so.

The packed projection becomes q_proj [H D, C], k_proj and v_proj [G D, C], DTensors placed as Shard(0), or Replicate
where ranks share key heads, for rows of a packed weight in a row are no head's; o_proj [C, H D] is Shard(1). Each name
holds the whole weight at every number of ranks, so torch.distributed.checkpoint saves at one and loads at another,
optimizer state included. One process without a mesh gives its ClexAttention the same names by `name_projections`.

Nothing is communicated for the tables: `ClexRotaryEmbedding.sample` with generators of equal seeds draws the same t and
positions on all ranks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from clex_kernels.attention_layer import ClexAttention
from clex_kernels.distributed.groups import ranks_of
from clex_kernels.packing import NAMES, PACKED, checked_linear, name_rows
from clex_kernels.qkv_rotary import qkv_rotary
from clex_kernels.sharding import HEADS, Layout, is_dtensor
from clex_kernels.tables import RotaryTable, RotaryTableStack


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        # the gradient may be another's too, as that of a sum is, or expanded.
        dx = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(dx, group=ctx.group)
        return dx, None


def sum_gradients(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """x, whose gradient is summed over the ranks of `group` on its way back.

    For what is equal on all ranks and used on each for a part of the work, as a table's freq where heads are split:
    one call per step, on what all layers share, makes one all-reduce in the backward pass, and the gradient equal on
    all ranks. Every rank has to go through the backward pass of its own x.

    Args:
        x: a tensor of any shape, equal on all ranks.
        group: of the ranks that share the work; None: all.

    Raises:
        TypeError: x is no tensor, or group neither a group nor None.
        ValueError: this process is not in the group, or there is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not torch.compiler.is_compiling():
        group = ranks_of(group).group
    return _SumGradients.apply(x, group)


class _HeadRows(nn.Linear):
    """q_proj, k_proj or v_proj: x W^T + bias for this rank's heads, of weights that are DTensors."""

    def prepare(self, layout: Layout, heads: int) -> None:
        self.layout, self.heads = layout, heads

    def local(self, name: str) -> Tensor | None:
        """This rank's rows of the weight or the bias."""
        whole = getattr(self, name)
        return None if whole is None else self.layout.local_keys(name, whole, self.heads, None, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.local("weight"), self.local("bias"))


class _HeadColumns(nn.Linear):
    """o_proj: the product of this rank's heads, added up over the ranks, then the bias."""

    def prepare(self, layout: Layout) -> None:
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.layout.local("weight", self.weight, None, 1))
        mesh = self.layout.mesh
        out = DTensor.from_local(part, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        out = out.to_local()
        # every rank adds it to the same sum, and finds the same gradient.
        return out if self.bias is None else out + self.bias.to_local().to(out.dtype)


class ParallelAttention(ClexAttention):
    """What `parallelize_attention` makes of a ClexAttention: num_heads and num_kv_heads remain those of all ranks."""

    layout: Layout
    _FIRST = NAMES[0]

    @property
    def local_kv_heads(self) -> int:
        """Key heads of this rank's caches, max(G / n, 1)."""
        return max(self.num_kv_heads // self.layout.count(HEADS), 1)

    def forward(
        self, x: Tensor, table: RotaryTable | RotaryTableStack, is_causal: bool = True, **options: Any
    ) -> Tensor:
        """ClexAttention.forward of x that is equal on all ranks; of a DTensor of any placement it gives one too."""
        table = self.layout.shared_table(table)
        return self._as_given(x, super().forward(self._whole(x), table, is_causal, **options))

    @torch.no_grad()
    def decode(
        self,
        x: Tensor,
        table: RotaryTable | RotaryTableStack,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_end: int | Tensor,
        block_table: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """ClexAttention.decode; the caches are this rank's own, plain tensors with `local_kv_heads` heads."""
        table = self.layout.shared_table(table)
        return self._as_given(
            x, super().decode(self._whole(x), table, k_cache, v_cache, kv_end, block_table, **options)
        )

    def extra_repr(self) -> str:
        """With the number of ranks."""
        return f"{super().extra_repr()}, ranks={self.layout.count(HEADS)}"

    def _whole(self, x: Any) -> Any:
        """All of x on this rank, with a gradient that is added up over the ranks."""
        if not isinstance(x, Tensor):
            return x
        if not is_dtensor(x):
            if not (x.requires_grad and torch.is_grad_enabled()):
                return x
            x = DTensor.from_local(x, self.layout.mesh, [Replicate()], run_check=False)
        return self.layout.local("x", x, None, None)

    def _as_given(self, x: Tensor, out: Tensor) -> Tensor:
        return DTensor.from_local(out, self.layout.mesh, [Replicate()], run_check=False) if is_dtensor(x) else out

    def _projections(self) -> list[nn.Module]:
        return [getattr(self, name) for name in NAMES]

    def _must_be_called(self) -> bool:
        return (
            any(
                type(module) is not _HeadRows
                or "forward" in vars(module)
                or module._forward_hooks
                # hooks of all kinds, so that none is passed over.
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                for module in self._projections()
            )
            or nn.modules.module._has_any_global_hook()
        )

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(x).unflatten(-1, (-1, self.config.head_dim)) for module in self._projections())

    def _project_rotated(self, x: Tensor, table: RotaryTable | RotaryTableStack, **options: Any) -> tuple[Tensor, ...]:
        weights, biases = ([module.local(name) for module in self._projections()] for name in ("weight", "bias"))
        heads = self.num_heads // self.layout.count(HEADS), self.local_kv_heads
        return qkv_rotary(x, weights, table, *heads, None if biases[0] is None else biases, **options)


def parallelize_attention(layer: ClexAttention, mesh: DeviceMesh, src_data_rank: int | None = 0) -> ClexAttention:
    """Deals the heads of a layer out to the ranks of `mesh`, in place; see the module docstring.

    Tables are made on every rank. For one all-reduce of their freq's gradient per step instead of one per layer:

        table = replicate_table(rope.sample(L, generator=seeded_alike), mesh)

    Args:
        layer: whole on every rank. Its qkv_proj is replaced by q_proj, k_proj and v_proj, its parameters by new ones:
            make the optimizer afterwards.
        mesh: of one dimension.
        src_data_rank: the rank whose weights all get; None: each its own, which must be equal, without communication.

    Returns:
        The layer, a ParallelAttention now.

    Raises:
        TypeError: layer is no ClexAttention, or one of its projections no plain torch.nn.Linear.
        ValueError: mesh has more dimensions, heads can't be dealt out evenly, or a projection has hooks or a .grad.
    """
    if type(layer) is not ClexAttention:
        raise TypeError(f"layer: expected a ClexAttention, got {type(layer).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, that of the heads, got {mesh}")
    layout = Layout(mesh, (HEADS,))
    layout.check_heads("num_heads", layer.num_heads, layer.num_kv_heads)
    packed, output = checked_linear(layer, PACKED), checked_linear(layer, "o_proj")
    is_shared = layer.num_kv_heads % mesh.size() != 0
    del layer.qkv_proj, layer.o_proj
    first = 0
    for name, heads in zip(NAMES, (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads), strict=True):
        rows = heads * layer.config.head_dim
        placement = Replicate() if is_shared and name != NAMES[0] else Shard(0)
        parts = {kind: whole[first : first + rows] for kind, whole in packed.named_parameters()}
        module = _distributed(_HeadRows, parts, packed, mesh, dict.fromkeys(parts, placement), src_data_rank)
        module.prepare(layout, heads)
        setattr(layer, name, module)
        first += rows
    placements = {"weight": Shard(1), "bias": Replicate()}
    layer.o_proj = _distributed(_HeadColumns, dict(output.named_parameters()), output, mesh, placements, src_data_rank)
    layer.o_proj.prepare(layout)
    layer.layout = layout
    # it has these names by itself now, if it had them by `name_projections`.
    name_rows(layer, {})
    # as torch's fully_shard does: whoever holds the layer holds the parallel one.
    layer.__class__ = ParallelAttention
    return layer


def _distributed(
    kind: type[nn.Linear],
    parts: dict[str, Tensor],
    like: nn.Linear,
    mesh: DeviceMesh,
    placements: dict[str, Any],
    src_data_rank: int | None,
) -> Any:
    """A module of that kind with those parameters, placed over the mesh."""
    rows, columns = parts["weight"].shape
    module = kind(columns, rows, "bias" in parts, device="meta")
    for name, part in parts.items():
        # a part by itself, or it would keep all of the weight alive.
        part = distribute_tensor(part.detach().clone(), mesh, [placements[name]], src_data_rank=src_data_rank)
        trained = getattr(like, name).requires_grad
        setattr(module, name, nn.Parameter(part, requires_grad=trained))
    return module.train(like.training)


class ClexParallel(ParallelStyle):
    """`parallelize_attention` as a plan: parallelize_module(model, mesh, {"layers.*.attention": ClexParallel()})."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return parallelize_attention(module, device_mesh, self.src_data_rank)


def name_projections(layer: ClexAttention) -> None:
    """From now on the layer's state dict has q_proj, k_proj and v_proj, slices of qkv_proj, as a parallel layer's has.

    For checkpoints between the two; parameters, and what an optimizer calls them, remain. A parallel layer on a mesh of
    one rank is all the same, optimizer state included.

    Raises:
        TypeError: layer is no ClexAttention, or its qkv_proj no plain torch.nn.Linear.
    """
    if type(layer) is not ClexAttention:
        raise TypeError(f"layer: expected a ClexAttention, got {type(layer).__name__}")
    checked_linear(layer, PACKED)
    rows = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    name_rows(layer, {name: heads * layer.config.head_dim for name, heads in zip(NAMES, rows, strict=True)})
