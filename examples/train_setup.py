"""What both ways of training share: the options, a small byte-level Llama with CLEX, and what a run leaves behind."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

from clex_kernels import ClexConfig
from clex_kernels.integrations.transformers import apply_clex

VOCABULARY, HEAD_DIM, MAX_FACTOR = 256, 32, 16
BETAS = (0.9, 0.97)
WARMUP_SHARE = 0.05


def option(default: Any, text: str) -> Any:
    """A field of `Options`, with its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Options:
    """The command line."""

    steps: int = option(400, "optimizer steps, those before an interruption included")
    batch: int = option(16, "sequences per step, of all processes together")
    length: int = option(128, "bytes per sequence, and the length that t = 1 stands for")
    width: int = option(128, "channels of the model")
    layers: int = option(4, "layers of the model")
    lr: float = option(3e-3, "peak learning rate of all but the ODE: high, since the model starts from nothing")
    ode_lr: float = option(1e-5, "peak learning rate of the ODE; 1e-3 made log-frequencies drift by up to 6")
    positions: Literal["uniform", "runs"] = option("runs", "how positions are drawn; uniform is the authors' way")
    plain_share: float = option(0.25, "share of steps at t = 1, on top of those that t = 1 gets by chance")
    bf16: bool = option(False, "autocast to bfloat16")
    compile: bool = option(False, "torch.compile")
    checkpointing: bool = option(False, "keep only the layers' inputs, and run layers again in the backward pass")
    parallel: Literal["auto", "ddp", "fsdp", "tp", "cp"] = option(
        "auto",
        "what the processes that torchrun starts share out: rows, weights and rows, heads, or tokens; auto: rows",
    )
    draws: Literal["shared", "independent"] = option(
        "shared", "whether processes with rows of their own draw a t and positions of their own for them"
    )
    trainer: bool = option(False, "by transformers.Trainer in place of the plain loop")
    seed: int = option(0, "of weights, data, t and positions")
    text: str = option("", "a file to train on; none: text that ships with Python, which takes seconds to collect")
    output: str = option("build/train", "where checkpoints, losses.json, losses.png and the model go")
    save_every: int = option(100, "steps from one checkpoint to the next")
    resume: bool = option(False, "go on from the last checkpoint in the output directory")

    @property
    def folder(self) -> Path:
        """`output` as a path."""
        return Path(self.output)


def build_model(options: Options, generator: torch.Generator) -> LlamaForCausalLM:
    """A fresh Llama over bytes with CLEX, in training mode; `generator` draws t and positions."""
    torch.manual_seed(options.seed)
    heads = options.width // HEAD_DIM
    settings = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(settings)
    sampling = {"positions": options.positions, "plain_share": options.plain_share, "generator": generator}
    apply_clex(model, ClexConfig(head_dim=HEAD_DIM, train_length=options.length, max_factor=MAX_FACTOR), sampling)
    if options.checkpointing:
        # the name until transformers 5.23 was gradient_checkpointing_enable.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def rows_per_process(options: Options, processes: int) -> int:
    """Sequences of a step that each process takes; ValueError if they can't be shared out evenly."""
    rows, rest = divmod(options.batch, processes)
    if rest:
        raise ValueError(f"batch: expected a multiple of {processes} processes, got {options.batch}")
    return rows


def warmup_steps(options: Options) -> int:
    """Steps in which learning rates rise linearly; a cosine takes them to 0 at the end."""
    return max(1, round(WARMUP_SHARE * options.steps))


def write_results(options: Options, losses: list[float]) -> None:
    """losses.json and losses.png: nats per byte in every step, and their running mean."""
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "losses.json").write_text(json.dumps({"options": asdict(options), "losses": losses}, indent=1))
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    window = max(1, len(losses) // 20)
    means = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", label="one step")
    middles = steps[window // 2 : window // 2 + len(means)]
    axes.plot(middles, means, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Training loss; t is drawn anew in every step")
    axes.legend()
    figure.savefig(options.folder / "losses.png", dpi=150)
