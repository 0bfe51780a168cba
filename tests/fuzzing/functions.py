"""Every public function by name, with what makes a right call of it."""

from collections.abc import Callable

from . import calls_attention, calls_modules
from .judge import Case
from .values import Draw

FUNCTIONS: dict[str, Callable[[Draw], Case]] = {
    make.__name__: make
    for make in (
        calls_attention.apply_rotary,
        calls_attention.qkv_rotary,
        calls_attention.attention,
        calls_attention.decode_attention,
        calls_attention.append_kv,
        calls_attention.merge_attention,
        calls_modules.config,
        calls_modules.length_factor,
        calls_modules.from_transformers,
        calls_modules.solve_frequencies,
        calls_modules.table,
        calls_modules.table_stack,
        calls_modules.select,
        calls_modules.embedding,
        calls_modules.forward,
        calls_modules.stack,
        calls_modules.at,
        calls_modules.sample,
        calls_modules.layer,
        calls_modules.layer_forward,
        calls_modules.layer_decode,
        calls_modules.pack_qkv,
        calls_modules.unpack_qkv,
        calls_modules.param_groups,
        calls_modules.clip_gradients,
    )
}
