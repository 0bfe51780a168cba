"""Trains a small byte-level Llama of transformers with CLEX, on text that ships with Python.

    python -m examples.train --steps 400 --bf16
    torchrun --nproc-per-node 2 examples/train.py --parallel ddp    # or fsdp, tp, cp: NCCL on GPUs, gloo on CPUs
    python -m examples.train --trainer                              # the same by transformers.Trainer
    accelerate launch --config_file examples/accelerate/fsdp.yaml examples/train.py --trainer

A plain loop to copy. What CLEX asks of it:

- apply_clex(model, config, sampling) beforehand. Every forward in training mode then draws one t and one set of
  positions for all layers, and every layer's gradient reaches the ODE.
- param_groups and clip_gradients: the ODE has a learning rate and a clip of its own.
- use_cache=False: a cache would only take memory.
- A StepGenerator for t and positions, advanced at every step and kept in the checkpoint, so that a run that goes on
  from one draws what it would have drawn without the interruption, with any number of processes.

All processes draw the same t, positions and batch, and each takes its part of the batch (examples/train_parallel.py):
a step is the same for any number of processes and in every mode, up to rounding. With --draws independent, processes
that see rows of their own (ddp, fsdp) draw a t and positions of their own for them; a step costs much the same at any
t, since only L = train_length tokens are seen. No parameter goes unused, so DDP needs no find_unused_parameters: at
t = 1, where the ODE has no say, its gradient is zero and not missing.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torchrun and accelerate run this file by its path.
sys.path.append(str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

from clex_kernels import clip_gradients, param_groups
from clex_kernels.distributed import StepGenerator
from examples.train_parallel import Alone, join, last_checkpoint
from examples.train_setup import BETAS, Options, build_model, rows_per_process, warmup_steps, write_results
from examples.train_tiny import as_bytes, draw_batch, load_text

# losses are read from the device this often; reading makes the host wait for it.
LOG_EVERY = 10


@dataclass(frozen=True)
class State:
    """All that changes from step to step."""

    model: LlamaForCausalLM
    forward: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    draws: StepGenerator
    batches: StepGenerator

    def save(self, process: Alone, path: Path, losses: list[float]) -> None:
        """Write a checkpoint; a kill midway leaves the one before."""
        process.save(self._state(losses), path)

    def load(self, process: Alone, path: Path) -> list[float]:
        """Take over a checkpoint; returns the losses of the steps until then."""
        process.load(state := self._state([]), path)
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        return state["losses"]

    def _state(self, losses: list[float]) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        steps = {"schedule": self.schedule, "draws": self.draws, "batches": self.batches, "losses": losses}
        return {"model": weights, "optimizer": moments, **steps}


def start(options: Options, process: Alone) -> State:
    """Everything as it is before the first step."""
    draws = StepGenerator(options.seed, stream=process.data_rank if options.draws == "independent" else 0)
    model = build_model(options, draws.generator).to(process.device)
    forward = process.wrap(model, options.bf16)
    if options.compile:
        # in place, so that parameters keep their names.
        model.compile()
    optimizer = torch.optim.AdamW(param_groups(model, lr=options.lr, ode_lr=options.ode_lr), betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps(options), options.steps)
    return State(model, forward, optimizer, schedule, draws, StepGenerator(options.seed + 1))


def train(options: Options, text: Tensor) -> list[float]:
    """Train on `text` [N], bytes; returns the loss of every step in nats per byte, and writes to options.output."""
    with join(options.parallel) as process:
        return run(options, text, process)


def run(options: Options, text: Tensor, process: Alone) -> list[float]:
    """`train`, as one of the processes that do it."""
    rows_per_process(options, process.data_parts)
    state = start(options, process)
    checkpoints = options.folder / "checkpoints"
    losses = state.load(process, last_checkpoint(checkpoints)) if options.resume else []
    unread: list[Tensor] = []
    bar = tqdm(total=options.steps, initial=len(losses), desc="training", unit="step", disable=process.rank > 0)
    for step in range(len(losses) + 1, options.steps + 1):
        state.draws.advance()
        state.batches.advance()
        tokens = draw_batch(text, options.batch, options.length - 1, state.batches.generator)
        with torch.autocast(process.device.type, torch.bfloat16, enabled=options.bf16):
            loss = state.forward(**process.inputs(tokens), use_cache=False).loss
        state.optimizer.zero_grad()
        loss.backward()
        clip_gradients(state.optimizer)
        state.optimizer.step()
        state.schedule.step()
        unread.append(loss.detach())
        bar.update()
        saves = step % options.save_every == 0 or step == options.steps
        if saves or step % LOG_EVERY == 0:
            losses += process.mean(unread)
            unread.clear()
            bar.set_postfix_str(f"loss {losses[-1]:.3f} nats/byte", refresh=False)
        if saves:
            state.save(process, checkpoints / f"step-{step:08d}", losses)
    bar.close()
    if process.rank == 0:
        write_results(options, losses)
    process.save_model(state.model, options.folder / "model")
    return losses


def main() -> None:
    """Train by the command line."""
    (options,) = HfArgumentParser(Options, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    # ours is the only bar.
    logging.disable_progress_bar()
    text = as_bytes([Path(options.text).read_text()]) if options.text else load_text()[0]
    if options.trainer:
        # only here, since Trainer takes seconds to import.
        from examples.train_with_trainer import train_with_trainer as by
    else:
        by = train
    losses = by(options, text)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"loss {losses[0]:.3f} nats/byte in the first step, {losses[-1]:.3f} in the last; see {options.output}")


if __name__ == "__main__":
    main()
