"""Trains a small byte-level Llama of transformers with CLEX, on text that ships with Python.

    python -m examples.train --steps 400 --bf16
    torchrun --nproc-per-node 2 -m examples.train       # DDP: NCCL on GPUs, gloo on CPUs
    python -m examples.train --trainer                  # the same by transformers.Trainer

A plain loop to copy. What CLEX asks of it:

- apply_clex(model, config, sampling) beforehand. Every forward in training mode then draws one t and one set of
  positions for all layers, and every layer's gradient reaches the ODE.
- param_groups and clip_gradients: the ODE has a learning rate and a clip of its own.
- use_cache=False: a cache would only take memory.
- The generator of t and positions in the checkpoint. Here data comes from it too, so that a run that goes on from a
  checkpoint repeats bit by bit what it would have been without the interruption.

All processes draw the same t, positions and batch, and each takes its rows of the batch: a step is the same for any
number of processes, up to rounding. Draws that differ by process would do too: a step costs much the same at any t,
since only L = train_length tokens are seen. No parameter goes unused, so DDP needs no find_unused_parameters: at
t = 1, where the ODE has no say, its gradient is zero and not missing.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaForCausalLM, get_cosine_schedule_with_warmup

from clex_kernels import clip_gradients, param_groups
from examples.train_setup import BETAS, Options, build_model, rows_per_process, warmup_steps, write_results
from examples.train_tiny import draw_batch, load_text

# losses are read from the device this often; reading makes the host wait for it.
LOG_EVERY = 10
# what torchrun tells a process, and what holds without it.
PLACE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls) -> "Process":
        """Join the processes that torchrun started; alone without it."""
        rank, world, local = (int(os.environ.get(name, default)) for name, default in PLACE.items())
        has_gpu = torch.cuda.is_available()
        device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(device)
        if world > 1:
            dist.init_process_group("nccl" if has_gpu else "gloo", rank=rank, world_size=world)
        return cls(rank, world, device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP around `model`, if there are several processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def rows(self, tokens: Tensor, count: int) -> Tensor:
        """This process's `count` rows of tokens [B, L], on its device."""
        return tokens[self.rank * count : (self.rank + 1) * count].to(self.device)

    def mean(self, values: list[Tensor]) -> list[float]:
        """Means over all processes of scalars on the device."""
        stacked = torch.stack(values) / self.world
        if self.world > 1:
            dist.all_reduce(stacked)
        return stacked.tolist()

    def leave(self) -> None:
        """Wait for the others, and end what `join` began."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


@dataclass(frozen=True)
class State:
    """All that changes from step to step."""

    model: LlamaForCausalLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator

    def save(self, path: Path, losses: list[float]) -> None:
        """Write a checkpoint; a kill midway leaves the one before."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "losses": losses,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, unfinished := path.with_suffix(".unfinished"))
        unfinished.rename(path)

    def load(self, path: Path) -> list[float]:
        """Take over a checkpoint; returns the losses of the steps until then."""
        if not path.is_file():
            raise FileNotFoundError(f"resume: expected a checkpoint at {path}, got none")
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        return state["losses"]


def start(options: Options, device: torch.device) -> State:
    """Everything as it is before the first step."""
    generator = torch.Generator().manual_seed(options.seed)
    model = build_model(options, generator).to(device)
    optimizer = torch.optim.AdamW(param_groups(model, lr=options.lr, ode_lr=options.ode_lr), betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps(options), options.steps)
    return State(model, optimizer, schedule, generator)


def train(options: Options, text: Tensor) -> list[float]:
    """Train on `text` [N], bytes; returns the loss of every step in nats per byte, and writes to options.output."""
    process = Process.join()
    count = rows_per_process(options, process.world)
    state = start(options, process.device)
    checkpoint = options.folder / "checkpoint.pt"
    losses = state.load(checkpoint) if options.resume else []
    if options.compile:
        # in place, so that parameters keep their names.
        state.model.compile()
    forward = process.wrap(state.model)
    unread: list[Tensor] = []
    bar = tqdm(total=options.steps, initial=len(losses), desc="training", unit="step", disable=process.rank > 0)
    for step in range(len(losses) + 1, options.steps + 1):
        tokens = process.rows(draw_batch(text, options.batch, options.length - 1, state.generator), count)
        with torch.autocast(process.device.type, torch.bfloat16, enabled=options.bf16):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
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
        if saves and process.rank == 0:
            state.save(checkpoint, losses)
    bar.close()
    if process.rank == 0:
        write_results(options, losses)
        state.model.save_pretrained(options.folder / "model")
    process.leave()
    return losses


def main() -> None:
    """Train by the command line."""
    (options,) = HfArgumentParser(Options, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    text, _ = load_text()
    if options.trainer:
        # only here, since Trainer takes seconds to import.
        from examples.train_with_trainer import train_with_trainer as run
    else:
        run = train
    losses = run(options, text)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"loss {losses[0]:.3f} nats/byte in the first step, {losses[-1]:.3f} in the last; see {options.output}")


if __name__ == "__main__":
    main()
