"""How one training step is shared out among processes, on torch's own distributed engine.

| mode | a process has | its inputs | gradients |
|---|---|---|---|
| ddp | the whole model | its rows of the batch | DDP takes their mean |
| fsdp | its part of all weights | its rows of the batch | FSDP2 takes their mean |
| tp | its attention heads, and its part of the MLP | all of the batch | of its own part, whole |
| cp | the whole model | its tokens of every row | DDP takes their mean |

In all of them the loss of the step is the mean over processes. What CLEX asks for is one line in three of them:
shard_rotary (fsdp), shard_heads (tp), shard_context (cp).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from clex_kernels.distributed import shard_rotary, zigzag_shard
from clex_kernels.integrations.parallel import shard_context, shard_heads

# what torchrun tells a process, and what holds without it.
PLACE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
NO_LABEL = -100


@dataclass(frozen=True)
class Alone:
    """One process, which sees the whole batch and has the whole model; the others differ from it in a few lines."""

    rank: int
    world: int
    device: torch.device

    @property
    def data_rank(self) -> int:
        """Which part of the batch's rows this process sees."""
        return 0

    @property
    def data_parts(self) -> int:
        """In how many parts rows are shared out."""
        return 1

    def wrap(self, model: PreTrainedModel, bf16: bool) -> nn.Module:
        """What to call in place of `model`, which may be changed in place."""
        return model

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """A forward's arguments for this process, from the tokens [B, L] of all."""
        rows = tokens.chunk(self.data_parts)[self.data_rank].to(self.device)
        return {"input_ids": rows, "labels": rows}

    def mean(self, values: list[Tensor]) -> list[float]:
        """Means over all processes of scalars on the device."""
        stacked = torch.stack(values) / self.world
        dist.all_reduce(stacked)
        return stacked.tolist()

    def save(self, state: dict[str, Any], path: Path) -> None:
        """Write a checkpoint that any number of processes can load, in any mode, and keep the one before it."""
        dcp.save(state, checkpoint_id=path)
        if self.rank == 0:
            for old in sorted(path.parent.glob("step-*"))[:-2]:
                shutil.rmtree(old)

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Take over a checkpoint in place."""
        dcp.load(state, checkpoint_id=path)

    def save_model(self, model: PreTrainedModel, folder: Path) -> None:
        """Write whole weights for from_pretrained; all processes call this, and the first one writes."""
        model.save_pretrained(folder)


def in_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """DDP around `model`, which is on `device`."""
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


class Ddp(Alone):
    """Rows are shared out."""

    @property
    def data_rank(self) -> int:
        """One part for each process."""
        return self.rank

    @property
    def data_parts(self) -> int:
        """One part for each process."""
        return self.world

    def wrap(self, model: PreTrainedModel, bf16: bool) -> nn.Module:
        """DDP around the model."""
        return in_ddp(model, self.device)


class Fsdp(Ddp):
    """Rows and weights are shared out."""

    def wrap(self, model: PreTrainedModel, bf16: bool) -> nn.Module:
        """Each layer a unit of its own, the ODE's weights too."""
        options = {"mesh": init_device_mesh(self.device.type, (self.world,))}
        # in fp32, which those around it may not be.
        shard_rotary(model.base_model.clex_layer, **options)
        if bf16:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for layer in model.base_model.layers:
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    def save_model(self, model: PreTrainedModel, folder: Path) -> None:
        """Gathers them beforehand, on the first process."""
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        # those of this list are there once, also where two modules share one.
        once = {name: weights[name] for name, _ in model.named_parameters() if name in weights}
        model.save_pretrained(folder, state_dict=once)


class Tp(Alone):
    """Attention heads and channels of the MLP are shared out."""

    def wrap(self, model: PreTrainedModel, bf16: bool) -> nn.Module:
        """Heads and plan of transformers, in place."""
        shard_heads(model, init_device_mesh(self.device.type, (self.world,)))
        return model


class Cp(Alone):
    """Tokens of every row are shared out."""

    def wrap(self, model: PreTrainedModel, bf16: bool) -> nn.Module:
        """The model takes shards from now on; DDP around it."""
        shard_context(model)
        return in_ddp(model, self.device)

    def inputs(self, tokens: Tensor) -> dict[str, Any]:
        """A zigzag shard of the tokens, and what comes next after each."""
        tokens = tokens.to(self.device)
        # what comes next, before tokens and their labels are cut apart.
        labels = functional.pad(tokens[:, 1:], (0, 1), value=NO_LABEL)
        mine = zigzag_shard(labels)
        # labels of a process on average; one that has fewer then weighs less.
        count = tokens[:, 1:].numel() / self.world
        return {"input_ids": zigzag_shard(tokens), "labels": mine, "shift_labels": mine, "num_items_in_batch": count}


MODES: dict[str, type[Alone]] = {"ddp": Ddp, "fsdp": Fsdp, "tp": Tp, "cp": Cp}


@contextmanager
def join(mode: str) -> Iterator[Alone]:
    """This process among those that torchrun started, NCCL on GPUs and gloo on CPUs; "auto": ddp under torchrun.

    Raises ValueError for a mode other than "auto" without torchrun.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in PLACE.items())
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        kind = MODES["ddp" if mode == "auto" else mode]
        dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
    elif mode == "auto":
        kind = Alone
        # a group of one, so that checkpoints and means need no case of their own.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=world)
    else:
        raise ValueError(f"parallel: expected processes that torchrun started for {mode!r}, got one without it")
    try:
        yield kind(rank, world, device)
        # nobody leaves while another still needs it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def last_checkpoint(folder: Path) -> Path:
    """The last whole one that `Alone.save` left in `folder`; FileNotFoundError if there is none."""
    # its metadata is what is written last.
    whole = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not whole:
        raise FileNotFoundError(f"resume: expected a checkpoint in {folder}, got none")
    return whole[-1]
