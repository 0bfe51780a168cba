"""ClexAttention: the attention of one transformer layer, in training, prefill and decoding.

Tokens that stand at the rows 0 .. L - 1 of a table that is known are rotated by the projection, and attention gets
rotated q and k. Attention rotates where it alone finds out where tokens stand or which table is theirs (packed
sequences, offsets, a stack that is chosen from by length), and where the projection has to be called, being another
module or forward than it was (LoRA, offloading), having quantized weights, or having hooks; and under autocast without
gradients, which keeps the cast of a weight for calls of its module alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from clex_kernels.append import append_kv
from clex_kernels.attention import attention
from clex_kernels.attention_checks import can_look, check_per_sequence
from clex_kernels.config import ClexConfig, check_config, check_flag, check_integer
from clex_kernels.decode import decode_attention
from clex_kernels.decode_checks import MAX_NEW_TOKENS
from clex_kernels.qkv_rotary import qkv_rotary
from clex_kernels.rotary_checks import DTYPES, check_kind, check_strided
from clex_kernels.tables import RotaryTable, RotaryTableStack
from clex_kernels.weights import check_device

# options of `attention` that move tokens away from the rows 0 .. L - 1.
_MOVING = ("cu_seqlens_q", "cu_seqlens_k", "kv_end", "q_offset", "k_offset")


class ClexAttention(nn.Module):
    """The attention of one transformer layer: packed projection, rotary attention, output projection.

    Parameters: qkv_proj.weight [(H + 2G) D, C], rows in the order q, k, v, and o_proj.weight [C, H D]; with biases
    qkv_proj.bias [(H + 2G) D] and o_proj.bias [C].

    All layers share one table, made once per step and passed in, also into compiled code:

        table = rope.sample(L)      # training
        table = rope(L)             # evaluation
        for layer in layers:
            x = x + layer.attention(layer.norm(x), table)

    Args:
        config: names D = head_dim and the rotary dimension.
        hidden_size: C.
        num_heads: H.
        num_kv_heads: G, which divides H; None: H.
        bias: of qkv_proj.
        out_bias: of o_proj; None: as `bias`.
        device, dtype: of the weights.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    # by name, the projection that x goes through first.
    _FIRST = "qkv_proj"

    def __init__(
        self,
        config: ClexConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_config(config)
        self.config = config
        self.hidden_size = check_integer("hidden_size", hidden_size, least=1)
        self.num_heads = check_integer("num_heads", num_heads, least=1)
        self.num_kv_heads = (
            self.num_heads if num_kv_heads is None else check_integer("num_kv_heads", num_kv_heads, least=1)
        )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
        check_flag("bias", bias)
        out_bias = bias if out_bias is None else out_bias
        check_flag("out_bias", out_bias)
        check_device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
            raise TypeError(f"dtype: expected None or one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        packed = (self.num_heads + 2 * self.num_kv_heads) * config.head_dim
        # torch counts bytes in 64 bits.
        if packed * self.hidden_size >= 2**44:
            raise ValueError(f"hidden_size: expected fewer than 2^44 weights, got {packed} * {self.hidden_size}")
        self.qkv_proj = nn.Linear(self.hidden_size, packed, bias, device, dtype)
        self.o_proj = nn.Linear(self.num_heads * config.head_dim, self.hidden_size, out_bias, device, dtype)

    def forward(
        self, x: Tensor, table: RotaryTable | RotaryTableStack, is_causal: bool = True, **options: Any
    ) -> Tensor:
        """Attends within x [B, L, C], or x [1, N, C] with the options cu_seqlens_q and cu_seqlens_k [B + 1].

        Args:
            x: of the weights' dtype, outside autocast.
            table: of the config's rotary dimension.
            is_causal: whether token l sees tokens 0 .. l only.
            **options: of `attention`: scale, window, softcap, cu_seqlens_q, kv_start, lengths, backend, ...

        Returns:
            Of x's shape.

        Raises:
            TypeError, ValueError: x, the table or an option, named, is wrong.
        """
        self._check(x, table, options)
        moves = any(name in options for name in _MOVING)
        if moves or _picks_by_length(table) or self._must_be_called():
            q, k, v = self._project(x)
            if v.requires_grad:
                # attention saves v: a view of it would keep the raw q and k alive until the backward pass.
                v = v.clone(memory_format=torch.contiguous_format)
        else:
            q, k, v = self._project_rotated(x, table, debug=options.get("debug", False))
            options["rotated"] = "qk"
        return self.o_proj(attention(q, k, v, table, is_causal=is_causal, **options).flatten(-2))

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
        """A decode step of x [B, L, C], L from 0 to 16: appends its raw keys and values to the caches, and attends.

        Without gradients. Of the three calls that this is, `qkv_rotary`, `append_kv` and `decode_attention`, the latter
        two describe the caches [B, S, G, D], kv_end, which counts the new tokens too, and block_table.

        Args:
            x: of the weights' dtype, outside autocast.
            table: of the config's rotary dimension, with positions 0, 1, 2, ...
            k_cache, v_cache, kv_end, block_table: of `decode_attention`.
            **options: of `decode_attention`: kv_start, lengths, scale, window, softcap, debug.

        Returns:
            Of x's shape.

        Raises:
            TypeError, ValueError: x, the table, a cache or an option, named, is wrong; the slots of the new tokens may
                have been written to by then.
        """
        self._check(x, table, options)
        debug = options.get("debug", False)
        kv_end = _check_slots(x, table, kv_end, options, debug)
        if not self._must_be_called():
            where = _positions(x, kv_end)
            if _picks_by_length(table):
                table = table.select(_lengths(x, kv_end, **options))
            q, k, v = self._project_rotated(x, table, keys="raw", debug=debug, **where)
            options["rotated"] = "q"
        else:
            q, k, v = self._project(x)
        append_kv(k, v, k_cache, v_cache, kv_end, block_table, debug=debug)
        out = decode_attention(q, k_cache, v_cache, table, kv_end, block_table=block_table, **options)
        return self.o_proj(out.flatten(-2))

    def _check(self, x: Tensor, table: RotaryTable | RotaryTableStack, options: dict[str, Any]) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        check_kind(table)
        check_strided("x", x)
        projection = getattr(self, self._FIRST)
        if _is_plain(projection):
            _check_as_weight(x, projection.weight)
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: expected shape [B, L, C] with C = {self.hidden_size}, got {list(x.shape)}")
        if table.rotary_dim != self.config.rotary_dim:
            raise ValueError(f"table: expected rotary_dim = {self.config.rotary_dim}, got {table.rotary_dim}")
        for name, reason in (
            ("return_lse", "a layer returns its output only"),
            ("rotated", "a layer projects and rotates q and k itself"),
        ):
            if name in options:
                raise ValueError(f"{name}: expected no such option, since {reason}")

    def _must_be_called(self) -> bool:
        return not _is_plain(self.qkv_proj) or _casts_once(self.qkv_proj)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim))
        return heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)

    def _project_rotated(self, x: Tensor, table: RotaryTable | RotaryTableStack, **options: Any) -> tuple[Tensor, ...]:
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        return qkv_rotary(x, weight, table, self.num_heads, self.num_kv_heads, bias, **options)

    def extra_repr(self) -> str:
        """What the sizes of the projections do not tell."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.config.head_dim}"
        return f"{heads}, rotary_dim={self.config.rotary_dim}"


def _picks_by_length(table: RotaryTable | RotaryTableStack) -> bool:
    """Whether a table is a stack of which the sequences' lengths choose."""
    return isinstance(table, RotaryTableStack) and table.index is None and table.train_length is not None


def _casts_once(module: nn.Linear) -> bool:
    """Whether autocast would cast the weight anew for qkv_rotary while it keeps that cast for calls of the module."""
    device = module.weight.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return is_on and not torch.is_grad_enabled() and module.weight.dtype != torch.get_autocast_dtype(device)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module does what its weight and bias say and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_replaced = type(module) is not nn.Linear or "forward" in vars(module)
    is_watched = any(hooks) or nn.modules.module._has_any_global_hook()
    return not (is_replaced or is_watched) and type(module.weight) in (Tensor, nn.Parameter)


def _check_as_weight(x: Tensor, weight: Tensor) -> None:
    """That x can be multiplied by the weight; autocast casts both."""
    if x.device != weight.device:
        raise ValueError(f"x: expected on the weights' device {weight.device}, got {x.device}")
    is_cast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    if not is_cast and x.dtype != weight.dtype:
        raise TypeError(f"x: expected the weights' dtype {weight.dtype}, got {x.dtype}")


def _lengths(
    x: Tensor, kv_end: int | Tensor, kv_start: Tensor | None = None, lengths: Tensor | None = None, **_: Any
) -> Tensor:
    """Tokens of every sequence, [B]."""
    if lengths is not None:
        return lengths
    if not isinstance(kv_end, Tensor):
        kv_end = torch.full((x.shape[0],), kv_end, dtype=torch.int64, device=x.device)
    return kv_end if kv_start is None else kv_end - kv_start


def _check_slots(
    x: Tensor, table: RotaryTable | RotaryTableStack, kv_end: int | Tensor, options: dict[str, Any], debug: bool
) -> int | Tensor:
    """kv_end, once it and what bounds the slots besides are found to fit x and the table."""
    if x.shape[1] > MAX_NEW_TOKENS:
        raise ValueError(f"x: expected L of at most {MAX_NEW_TOKENS} new tokens, got {x.shape[1]}")
    named = {name: options.get(name) for name in ("kv_start", "lengths")} | {"kv_end": kv_end}
    if not isinstance(kv_end, Tensor):
        kv_end = check_integer("kv_end", named.pop("kv_end"))
    for name, value in named.items():
        if value is not None:
            check_per_sequence(name, value, x.shape[0], None, x.device, debug)
    check_kind(table)
    if isinstance(kv_end, int) or (can_look(kv_end, debug) and len(kv_end)):
        last = kv_end if isinstance(kv_end, int) else int(kv_end.max())
        if last > table.length:
            raise ValueError(f"table: expected positions for all keys up to kv_end = {last}, got one of {table.length}")
    return kv_end


def _positions(x: Tensor, kv_end: int | Tensor) -> dict[str, Any]:
    """Where the new tokens stand, at their slots; those before slot 0 are padding, and stand anywhere."""
    length = x.shape[1]
    if isinstance(kv_end, Tensor):
        slots = kv_end[:, None] - length + torch.arange(length, device=x.device)
    elif kv_end >= length:
        return {"offset": kv_end - length}
    else:
        slots = torch.arange(kv_end - length, kv_end, device=x.device)[None]
    return {"position_ids": slots.clamp(min=0).long()}
