"""The commands that train in several processes, as they are printed: the same training as in one, and one bar."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

# of the extra "bench".
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("accelerate")

from clex_kernels.distributed import StepGenerator
from examples import train, train_with_trainer
from examples.train_parallel import MODES, Alone
from examples.train_setup import Options, build_model
from examples.train_tiny import as_bytes

# what is tested is how they run on CPUs: two processes, and most machines have one GPU or none.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="each process would ask for a GPU of its own")

ROOT = Path(__file__).parent.parent
TORCHRUN = "torchrun --nproc-per-node 2 examples/train.py --parallel"
ACCELERATE = "accelerate launch --config_file examples/accelerate/{}.yaml examples/train.py --trainer"
OPTIONS = Options(
    steps=5,
    batch=4,
    length=32,
    width=64,
    layers=2,
    plain_share=0.0,
    save_every=3,
    text=str(ROOT / "LICENSE"),
)
TEXT = as_bytes([Path(OPTIONS.text).read_text()])
# accelerate takes FSDP for GPUs alone.
AS_ON_GPUS = """
import runpy
from accelerate.state import PartialState
from accelerate.utils import DistributedType

join = PartialState.__init__

def join_as_on_gpus(state, *args, **options):
    join(state, *args, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = join_as_on_gpus
runpy.run_path("examples/train.py", run_name="__main__")
"""


def arguments_of(options: Options) -> list[str]:
    changed = {name: value for name, value in vars(options).items() if value != getattr(Options(), name)}
    return [word for name, value in changed.items() for word in (f"--{name}", str(value))]


def call(command: str, options: Options) -> str:
    """What a command, with these options, wrote to stderr."""
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "OMP_NUM_THREADS": "1",
        # torchrun's own --standalone: a port that is free.
        "PET_STANDALONE": "1",
    }
    words = [*command.split(), *arguments_of(options)]
    log = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert log.returncode == 0, log.stderr
    return log.stderr


def losses_of(options: Options) -> list[float]:
    return json.loads((options.folder / "losses.json").read_text())["losses"]


def weights_of(options: Options) -> dict[str, Tensor]:
    """Those that were saved but for the ODE's: at its start the gradient of one is 0, which Adam makes much of."""
    weights = load_file(options.folder / "model" / "model.safetensors")
    return {name: weight for name, weight in weights.items() if "clex_layer" not in name}


def bars_in(stderr: str) -> list[str]:
    """Every bar that was begun, by what stands before its share."""
    return re.findall(r"([^\r\n]*?)  0%\|", stderr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where one process has trained."""
    options = replace(OPTIONS, output=str(tmp_path_factory.mktemp("alone")))
    train.train(options, TEXT)
    return options


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Where Trainer has trained in one process."""
    options = replace(OPTIONS, output=str(tmp_path_factory.mktemp("trained")), trainer=True)
    train_with_trainer.train_with_trainer(options, TEXT)
    return options


@pytest.mark.parametrize("command", [f"{TORCHRUN} ddp", *map(ACCELERATE.format, ("ddp", "fsdp"))])
def test_commands_are_printed_where_one_looks_for_them(command):
    assert command in train.__doc__ + train_with_trainer.__doc__


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(alone, tmp_path, mode):
    options = replace(OPTIONS, output=str(tmp_path / "run"))
    stderr = call(f"{TORCHRUN} {mode}", options)
    assert bars_in(stderr) == ["training: "]
    assert losses_of(options) == pytest.approx(losses_of(alone), rel=1e-5)
    found, expected = (load_file(each.folder / "model" / "model.safetensors") for each in (options, alone))
    assert_close({name: found[name] for name in expected}, expected, rtol=1e-3, atol=1e-4)
    assert_close(
        found["model.clex_layer.proj_func.ode_down_proj"], expected["model.clex_layer.proj_func.ode_down_proj"]
    )
    # one process goes on from their checkpoint.
    shutil.rmtree(options.folder / "checkpoints" / "step-00000005")
    train.train(replace(options, resume=True), TEXT)
    assert losses_of(options) == pytest.approx(losses_of(alone), rel=1e-5)


@pytest.mark.parametrize("config", ["ddp", "fsdp"])
def test_trainer_under_accelerate_trains_as_alone(trained_alone, tmp_path, config):
    options = replace(OPTIONS, output=str(tmp_path / "run"), trainer=True)
    command = ACCELERATE.format(config)
    if config == "fsdp":
        (tmp_path / "as_on_gpus.py").write_text(AS_ON_GPUS)
        command = command.replace("examples/train.py", str(tmp_path / "as_on_gpus.py"))
    assert bars_in(call(command, options)) == [""]
    assert losses_of(options) == pytest.approx(losses_of(trained_alone), rel=1e-5)
    found, expected = (weights_of(each) for each in (options, trained_alone))
    assert_close({name: found[name] for name in expected}, expected, rtol=1e-3, atol=1e-4)
    checkpoint = options.folder / "checkpoints" / "checkpoint-5"
    assert (checkpoint / "pytorch_model_fsdp.bin").is_file() == (config == "fsdp")


def gradients(mode: str | None, rank: int, world: int) -> list[dict[str, Tensor]]:
    """Those of all weights in three steps, in fp64, of an ODE that is not at its start."""
    draws = StepGenerator(OPTIONS.seed)
    model = build_model(OPTIONS, draws.generator).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.base_model.clex_layer.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    process = (MODES[mode] if mode else Alone)(rank, world, torch.device("cpu"))
    forward = process.wrap(model, bf16=False)
    tokens = TEXT[: OPTIONS.batch * OPTIONS.length].view(OPTIONS.batch, OPTIONS.length)
    found = []
    for _ in range(3):
        draws.advance()
        model.zero_grad()
        forward(**process.inputs(tokens), use_cache=False).loss.backward()
        found.append({name: whole(weight.grad) for name, weight in model.named_parameters()})
    return found


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def gradients_in_all_modes(rank: int, world: int) -> dict[str, Any]:
    return {mode: gradients(mode, rank, world) for mode in MODES}


@pytest.fixture(scope="module")
def in_all_modes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(gradients_in_all_modes, 2, tmp_path_factory.mktemp("gradients"))


@pytest.mark.parametrize("mode", MODES)
def test_every_gradient_is_that_of_one_process(in_all_modes, mode):
    expected = gradients(None, 0, 1)
    # a step at t = 1 gives none.
    assert max(step["model.clex_layer.proj_func.ode_up_proj"].norm() for step in expected) > 1e-2
    for results in in_all_modes:
        for found, exact in zip(results[mode], expected, strict=True):
            # transformers' loss is in fp32.
            assert_close({name: found[name] for name in exact}, exact, rtol=1e-5, atol=1e-7)
