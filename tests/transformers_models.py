"""Tiny transformers models of every family, with CLEX weights that matter; stock ones that rotate by given tables."""

import copy
import dataclasses

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clex_kernels import ClexConfig
from clex_kernels.integrations.families import FAMILIES
from clex_kernels.integrations.transformers import apply_clex

VOCABULARY, WIDTH, HEADS = 61, 48, 4
TRAIN_LENGTH = 8

# what a family has beyond the common sizes; heads of 12 are odd-sized for every kernel.
EXTRAS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "head_dim": 16, "hidden_size": 64},
    "gpt_neox": {"rotary_pct": 0.5, "head_dim": 16, "hidden_size": 64},
}
assert set(EXTRAS) == set(FAMILIES)


def stock_model(family: str, layers: int = 2, **extras: object) -> PreTrainedModel:
    """A random model in fp64, in evaluation mode, on its own RoPE."""
    torch.manual_seed(len(family))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 80, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": TRAIN_LENGTH, "initializer_range": 0.3}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **(sizes | special | EXTRAS[family] | extras))
    # the grouped product of experts knows no fp64.
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


def clex_config(model: PreTrainedModel, **changes: object) -> ClexConfig:
    """CLEX over the model's own sizes."""
    settings = model.config
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    rotary_dim = int(head_dim * settings.rope_parameters.get("partial_rotary_factor", 1.0))
    config = ClexConfig(head_dim=head_dim, train_length=TRAIN_LENGTH, max_factor=4, rotary_dim=rotary_dim)
    return dataclasses.replace(config, rope_base=settings.rope_parameters["rope_theta"], **changes)


def clex_model(family: str, layers: int = 2, extras: dict[str, object] | None = None, **changes: object):
    """A patched model in fp64, its ODE far from its start."""
    model = stock_model(family, layers, **(extras or {}))
    rope = apply_clex(model, clex_config(model, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in rope.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


class FixedRotary(nn.Module):
    """Cosines and sines of given frequencies [R] in fp64, as transformers' own rotary embeddings hand them out."""

    def __init__(self, freq: Tensor):
        super().__init__()
        self.freq = freq

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


@torch.no_grad()
def true_logits(model: PreTrainedModel, tokens: Tensor, t: float | None = None) -> Tensor:
    """Logits [B, L, V] of a patched model's weights in stock transformers, at the t of L tokens (or `t`)."""
    rope = model.base_model.clex_layer
    length = tokens.shape[1] if t is None else int(t * rope.config.train_length)
    return stock_of(model, rope(length).freq)(tokens, use_cache=False).logits


def stock_of(model: PreTrainedModel, freq: Tensor) -> PreTrainedModel:
    """A patched model's weights in stock transformers in fp64, rotated by `freq` [R]."""
    stock = type(model)(stock_config(model)).double().eval()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if "clex_layer" not in name})
    stock.base_model.rotary_emb = FixedRotary(freq)
    return stock


def stock_config(model: PreTrainedModel) -> AutoConfig:
    """The settings a patched model had before, for the same weights."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = model.base_model.rotary_emb.frequencies.rope_parameters
    config._attn_implementation, config._experts_implementation = "sdpa", "eager"
    return config


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[batch, length], none of them padding."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch, and its mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return tokens, mask


TOKENS = random_tokens(2, 19)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor | None = TOKENS, **options: object) -> Tensor:
    """Logits [B, L, V] of one forward, without gradients."""
    return model(tokens, **options).logits
