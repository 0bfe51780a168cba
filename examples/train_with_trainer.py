"""examples.train by transformers.Trainer. CLEX asks for these things:

- an optimizer over param_groups, which gives the ODE its learning rate and clip;
- max_grad_norm=0, which turns Trainer's joint clip off, and a callback that clips each group by itself;
- a callback that puts the StepGenerator of t and positions at each step, so that a run that goes on from a checkpoint
  draws what it would have drawn, with any number of processes;
- ddp_find_unused_parameters=False, which is right since every parameter has a gradient in every step.

In several processes:

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py --trainer
    accelerate launch --config_file examples/accelerate/fsdp.yaml examples/train.py --trainer

or torchrun, which is DDP without more. The files are for two processes on CPUs, and accelerate (1.15) knows FSDP on
GPUs only: on CPUs it takes DDP by either file, and says nothing. On GPUs set use_cpu to false and num_processes to
their number. What fsdp.yaml says can be said under torchrun too, in TrainingArguments(fsdp=True, fsdp_config={...}).
Where Trainer shards the model, the ODE's weights are sharded before, in fp32, as --bf16 would round them otherwise.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clex_kernels import clip_gradients, param_groups
from clex_kernels.distributed import StepGenerator, shard_rotary
from examples.train_setup import BETAS, Options, build_model, rows_per_process, warmup_steps, write_results


class Windows(Dataset):
    """Text [N] cut into sequences of `length` bytes."""

    def __init__(self, text: Tensor, length: int):
        self.windows = text[: len(text) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class ClipApart(TrainerCallback):
    """Clips each parameter group by its own norm, after gradients are complete and before the optimizer's step."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        """What Trainer calls."""
        clip_gradients(optimizer)


class DrawByStep(TrainerCallback):
    """Puts a generator at the start of every optimizer step, before its forwards."""

    def __init__(self, draws: StepGenerator):
        self.draws = draws

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What Trainer calls."""
        self.draws.at(state.global_step)


class ClexTrainer(Trainer):
    """Trainer whose optimizer, of the kind that args.optim says, has the ODE in a group of its own."""

    def __init__(self, *args: Any, ode_lr: float, draws: StepGenerator, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ode_lr = ode_lr
        self.add_callback(ClipApart())
        self.add_callback(DrawByStep(draws))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """What Trainer calls."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            rates = {"lr": self.args.learning_rate, "ode_lr": self.ode_lr, "weight_decay": self.args.weight_decay}
            self.optimizer = kind(param_groups(model, **rates), **options)
        return self.optimizer


def make_trainer(options: Options, text: Tensor) -> ClexTrainer:
    """A Trainer of a fresh model on `text` [N]."""
    if options.parallel != "auto":
        raise ValueError(
            f"parallel: expected no word of it with trainer, which asks accelerate, got {options.parallel}"
        )
    arguments = TrainingArguments(
        output_dir=str(options.folder / "checkpoints"),
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps(options),
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=0.0,
        ddp_find_unused_parameters=False,
        # Trainer autocasts on a CPU only if told that it is meant.
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=options.bf16,
        torch_compile=options.compile,
        seed=options.seed,
        save_steps=options.save_every,
        logging_steps=1,
        report_to="none",
    )
    arguments.per_device_train_batch_size = rows_per_process(options, arguments.world_size)
    draws = StepGenerator(options.seed, stream=arguments.process_index if options.draws == "independent" else 0)
    own = {"ode_lr": options.ode_lr, "draws": draws}
    model = build_model(options, draws.generator)
    trainer = ClexTrainer(model=model, args=arguments, train_dataset=Windows(text, options.length), **own)
    if trainer.is_fsdp_enabled:
        shard_rotary(model.base_model.clex_layer)
    return trainer


def train_with_trainer(options: Options, text: Tensor) -> list[float]:
    """Train on `text` [N], bytes; returns the loss of every step in nats per byte, and writes to options.output."""
    trainer = make_trainer(options, text)
    trainer.train(resume_from_checkpoint=options.resume or None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        write_results(options, losses)
    trainer.save_model(str(options.folder / "model"))
    return losses
