"""examples.train by transformers.Trainer. CLEX asks for three things:

- an optimizer over param_groups, which gives the ODE its learning rate and clip;
- max_grad_norm=0, which turns Trainer's joint clip off, and a callback that clips each group by itself;
- ddp_find_unused_parameters=False, which is right since every parameter has a gradient in every step.

t and positions come from torch's own generator. Trainer seeds it alike in all processes and keeps it in its
checkpoints, so a run that goes on from one repeats what it would have been.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clex_kernels import clip_gradients, param_groups
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


class ClexTrainer(Trainer):
    """Trainer whose optimizer, of the kind that args.optim says, has the ODE in a group of its own."""

    def __init__(self, *args: Any, ode_lr: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ode_lr = ode_lr
        self.add_callback(ClipApart())

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
    model = build_model(options, generator=None)
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
    return ClexTrainer(model=model, args=arguments, train_dataset=Windows(text, options.length), ode_lr=options.ode_lr)


def train_with_trainer(options: Options, text: Tensor) -> list[float]:
    """Train on `text` [N], bytes; returns the loss of every step in nats per byte, and writes to options.output."""
    trainer = make_trainer(options, text)
    trainer.train(resume_from_checkpoint=options.resume or None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        write_results(options, losses)
    trainer.save_model(str(options.folder / "model"))
    return losses
