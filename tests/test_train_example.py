"""The training example: interrupted and by Trainer it is the same training (in several processes: test_recipes)."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

# of the extra "bench".
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from transformers import AutoModelForCausalLM, TrainerCallback

from clex_kernels import ClexRotaryEmbedding, RotaryTable
from clex_kernels.integrations.transformers import apply_clex
from examples import train, train_parallel, train_with_trainer
from examples.train_setup import Options, rows_per_process

SIZES = {"batch": 4, "length": 16, "width": 32, "layers": 2}
TEXT = torch.randint(97, 123, (2000,), generator=torch.Generator().manual_seed(0))


def options_in(folder: Path, **changes: Any) -> Options:
    return replace(Options(steps=6, save_every=2, output=str(folder), **SIZES), **changes)


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = train.draw_batch, itertools.count(1)

    def draw_or_stop(*args: Any) -> Tensor:
        if next(calls) == step:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train, "draw_batch", draw_or_stop)


def record_times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The length factors that forwards draw from now on."""
    sample, times = ClexRotaryEmbedding.sample, []

    def sample_and_record(*args: Any, **options: Any) -> RotaryTable:
        table = sample(*args, **options)
        times.append(table.t)
        return table

    monkeypatch.setattr(ClexRotaryEmbedding, "sample", sample_and_record)
    return times


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_learns_and_leaves_its_losses_a_plot_and_a_model(tmp_path):
    options = options_in(tmp_path, steps=30, bf16=True)
    losses = train.train(options, TEXT)
    assert losses[-1] < losses[0] - 1
    assert json.loads((tmp_path / "losses.json").read_text())["losses"] == losses
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rope = apply_clex(model)
    loaded = {name: torch.empty_like(weight) for name, weight in model.state_dict().items()}
    dcp.load({"model": loaded}, checkpoint_id=tmp_path / "checkpoints" / "step-00000030", no_dist=True)
    assert_close(model.state_dict(), loaded, rtol=0, atol=0)
    assert rope.proj_func.ode_down_proj.abs().max() > 0
    assert rope.config.train_length == 16


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True, "bf16": True, "positions": "uniform"}])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path, monkeypatch, changes):
    expected = train.train(options_in(tmp_path / "whole", **changes), TEXT)
    interrupt_at(6, monkeypatch)
    options = options_in(tmp_path / "resumed", **changes)
    with pytest.raises(KeyboardInterrupt):
        train.train(options, TEXT)
    monkeypatch.undo()
    assert train.train(replace(options, resume=True), TEXT) == expected
    assert_close(saved_weights(tmp_path / "resumed"), saved_weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "draws", "stream"), [("ddp", "shared", 0), ("ddp", "independent", 3), ("tp", "independent", 0)]
)
def test_processes_with_rows_of_their_own_may_draw_for_themselves(tmp_path, monkeypatch, mode, draws, stream):
    process = train_parallel.MODES[mode](3, 4, torch.device("cpu"))
    monkeypatch.setattr(type(process), "wrap", lambda self, model, bf16: model)
    assert train.start(options_in(tmp_path, draws=draws), process).draws.stream == stream


def test_resuming_from_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resume: expected a checkpoint in .*checkpoints, got none"):
        train.train(options_in(tmp_path, resume=True), TEXT)


def test_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    options = options_in(tmp_path / "run")
    expected = train.train(options, TEXT)
    folder = options.folder / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000006"]
    (folder / "step-00000008").mkdir()
    assert train.train(replace(options, resume=True), TEXT) == expected


def test_modes_ask_for_torchrun(tmp_path):
    with pytest.raises(
        ValueError, match="parallel: expected processes that torchrun started for 'tp', got one without"
    ):
        train.train(options_in(tmp_path, parallel="tp"), TEXT)
    with pytest.raises(ValueError, match="parallel: expected no word of it with trainer"):
        train_with_trainer.train_with_trainer(options_in(tmp_path, parallel="ddp"), TEXT)


def test_batch_that_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch: expected a multiple of 3 processes, got 4"):
        rows_per_process(options_in(tmp_path), 3)


class Recorder(TrainerCallback):
    """Norms of each group's gradient as the optimizer meets it."""

    def __init__(self):
        self.norms: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        groups = [[weight.grad for weight in group["params"]] for group in optimizer.param_groups]
        self.norms.append([float(torch.nn.utils.get_total_norm(group)) for group in groups])


def test_trainer_clips_each_group_by_itself(tmp_path, monkeypatch):
    before = []
    clip = train_with_trainer.clip_gradients
    monkeypatch.setattr(train_with_trainer, "clip_gradients", lambda optimizer: before.append(clip(optimizer)))
    trainer = train_with_trainer.make_trainer(options_in(tmp_path, plain_share=0.0), TEXT)
    with torch.no_grad():
        trainer.model.base_model.clex_layer.proj_func.ode_down_proj.normal_(std=0.3)
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [3e-3, 1e-5]
    before = torch.tensor(before)
    assert before[:, 1].max() > 10 * before[:, 0].max()
    assert_close(torch.tensor(recorder.norms), before.clamp(max=1.0))


def test_resumed_trainer_repeats_the_uninterrupted_one(tmp_path):
    options = options_in(tmp_path, checkpointing=True, bf16=True)
    expected = train_with_trainer.train_with_trainer(options, TEXT)
    weights = saved_weights(tmp_path)
    assert len(expected) == 6
    # the last checkpoint is now one from midway.
    (tmp_path / "checkpoints" / "checkpoint-6").rename(tmp_path / "later")
    assert train_with_trainer.train_with_trainer(replace(options, resume=True), TEXT) == expected
    assert_close(saved_weights(tmp_path), weights, rtol=0, atol=0)
