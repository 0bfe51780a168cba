"""A Llama trained with plain RoPE, and two models with its weights whose frequencies change past the trained length.

Dynamic NTK: a Llama whose frequencies shrink with every token past L0, the length of training. LongRoPE: a Phi-3, the
same weights fused, with plain frequencies up to L0 tokens and YaRN's beyond; both sets with Phi-3's amplitude.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from clex_kernels import ClexConfig
from examples.extrapolation.corpus import load_corpus
from examples.extrapolation.methods import frequencies
from examples.train_tiny import VOCABULARY, draw_batch

LEARNING_RATE, WEIGHT_DECAY, CLIP, WARMUP_SHARE = 3e-3, 0.1, 1.0, 0.1
THETA = 10000.0
# Phi-3's linear layers, and Llama's that they are made of.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
DYNAMIC, LONG = "dynamic-NTK Llama", "LongRoPE Phi-3"


@dataclass(frozen=True)
class Setting:
    """Of the whole experiment, in bytes of text; `length` may be up to `factor` times `train_length`."""

    steps: int = 500
    train_length: int = 128
    prompt: int = 96
    length: int = 512
    texts: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 2
    batch: int = 16
    factor: int = 4

    @property
    def sizes(self) -> dict[str, Any]:
        """What Llama and Phi-3 have in common, one key head for all query heads."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": 11 * self.width // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


def train(setting: Setting) -> LlamaForCausalLM:
    """A Llama with plain RoPE, trained on windows of train_length bytes."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = LlamaConfig(**setting.sizes, max_position_embeddings=setting.train_length, rope_parameters=rope)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=setting.steps, pct_start=WARMUP_SHARE
    )
    generator = torch.Generator().manual_seed(0)
    text = load_corpus().train
    with tqdm(range(setting.steps), desc="training", unit="step") as bar:
        for _ in bar:
            # draw_batch adds the byte after the window, which labels here don't need.
            tokens = draw_batch(text, setting.batch, setting.train_length - 1, generator)
            loss = model(tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.2f} nats/byte", refresh=False)
    return model.eval()


class Family:
    """Models of one kind with the same trained weights, made anew for every way to decode."""

    def __init__(self, make: partial[PreTrainedModel], weights: Mapping[str, Tensor]):
        self._make, self._weights = make, weights

    def fresh(self) -> PreTrainedModel:
        """A stock model that has seen no text."""
        model = self._make()
        model.load_state_dict(self._weights)
        return model.eval()


def families(setting: Setting, trained: LlamaForCausalLM) -> dict[str, Family]:
    """By name, the models whose frequencies change with length."""
    weights = trained.state_dict()
    return {
        LONG: Family(partial(make_phi3, setting, long_rope(setting)), fuse(weights)),
        DYNAMIC: Family(partial(make_dynamic, setting), weights),
    }


def make_dynamic(setting: Setting) -> LlamaForCausalLM:
    """A random Llama with dynamic NTK, whose t is length / train_length."""
    rope = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}
    return LlamaForCausalLM(
        LlamaConfig(**setting.sizes, max_position_embeddings=setting.train_length, rope_parameters=rope)
    )


def make_phi3(setting: Setting, rope: dict[str, Any]) -> Phi3ForCausalLM:
    """A random Phi-3 with these rope_parameters."""
    lengths = {
        "max_position_embeddings": setting.factor * setting.train_length,
        "original_max_position_embeddings": setting.train_length,
    }
    return Phi3ForCausalLM(Phi3Config(**setting.sizes, **lengths, rope_parameters=rope))


def long_rope(setting: Setting) -> dict[str, Any]:
    """rope_parameters: plain frequencies up to train_length, YaRN's beyond, which a model needs no training for."""
    rope = ClexConfig(head_dim=setting.width // setting.heads, train_length=setting.train_length, rope_base=THETA)
    plain, _ = frequencies("rope", 1.0, rope)
    yarn, _ = frequencies("yarn", float(setting.factor), rope)
    factors = {"short_factor": [1.0] * len(plain), "long_factor": (plain / yarn).tolist()}
    return {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": float(setting.factor),
        "original_max_position_embeddings": setting.train_length,
        **factors,
    }


def fuse(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's weights under Phi-3's names: q, k and v in one, gate and up in one."""
    fused = dict(weights)
    for name, (whole, parts) in product(weights, FUSED.items()):
        if f".{parts[0]}." in name:
            fused[name.replace(parts[0], whole)] = torch.cat([fused.pop(name.replace(parts[0], p)) for p in parts])
    return fused
