"""CLEX under data parallelism: draws of t and positions that don't depend on the number of processes, and FSDP2.

Every process draws on its host, with no communication. Two processes draw alike if their generators start alike, so a
StepGenerator is a function of three numbers: the seed, the step and a stream. Processes of one stream draw the same t
and positions: all of them for shared draws, or those that work on the same sequences (the ranks of a tensor or context
parallel group, which take the stream of their data parallel rank). What is saved, seed and step, is the same on all
ranks, and goes on with any number of them.

    draws = StepGenerator(seed=0, stream=dist.get_rank())       # or stream 0 everywhere: shared draws
    apply_clex(model, config, sampling={"generator": draws.generator})
    shard_rotary(model.base_model.clex_layer)                   # FSDP2; nothing of the kind for DDP
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ...
    draws.advance()                                             # once per optimizer step, before its forwards

FSDP2 gathers weights in hooks of `forward`. The ODE's weights are also read by `sample`, `stack` and `at`, outside of
the layers, and must be gathered in fp32, whatever the policy of the model: rounded to bf16 they move angles at position
100K by tens of turns. So `shard_rotary` makes them an FSDP2 unit of their own. One gather serves a whole step, or all
forwards of an evaluation: they are few.

Whoever hands a table to a module under FSDP2 by hand, as to ClexAttention, asks for cast_forward_inputs=False: else a
policy in bf16 rounds the table too, which is refused there.

FSDP2 hides from version counters that gathered weights have changed. Between two gathers they can't change, so tables
cached in evaluation are dropped at each gather.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clex_kernels.config import check_integer
from clex_kernels.distributed.groups import ranks_of
from clex_kernels.modules import ClexRotaryEmbedding
from clex_kernels.tables import RotaryTable, RotaryTableStack

__all__ = ["StepGenerator", "shard_rotary"]

_MOST = (1 << 63) - 1
_WORD = (1 << 64) - 1
# what reads the ODE's weights beside `forward`.
_METHODS = ("sample", "stack", "at")


class StepGenerator:
    """A torch.Generator on the CPU that every step seeds anew from (seed, step, stream).

    Several draws within a step, as those of several forwards between two optimizer steps, go on from one another and
    so differ. `advance` before each step; it stands at `step` from the start, 0 if nothing is said.

    torch.distributed.checkpoint takes it as it is, among what dcp.save and dcp.load get. A generator that comes from a
    checkpoint stands at the start of the saved step; its stream is its own.

    Args:
        seed: in [0, 2^63).
        stream: in [0, 2^63): equal on ranks that shall draw alike, 0 on all of them, or their data parallel rank.
        step: in [0, 2^63).

    Raises:
        TypeError: one of them is no int.
        ValueError: one of them is out of range.
    """

    def __init__(self, seed: int, stream: int = 0, step: int = 0):
        self._seed = check_integer("seed", seed, most=_MOST)
        self._stream = check_integer("stream", stream, most=_MOST)
        self._generator = torch.Generator("cpu")
        self.at(step)

    @property
    def generator(self) -> torch.Generator:
        """What draws: the same object at every step, for `sample` or the sampling of apply_clex."""
        return self._generator

    @property
    def seed(self) -> int:
        """Of the run."""
        return self._seed

    @property
    def stream(self) -> int:
        """Equal on ranks that draw alike."""
        return self._stream

    @property
    def step(self) -> int:
        """The step whose draws these are."""
        return self._step

    def at(self, step: int) -> None:
        """Go to the start of `step`.

        Raises TypeError or ValueError for one that is no int in [0, 2^63).
        """
        self._step = check_integer("step", step, most=_MOST)
        self._generator.manual_seed(_mix(self._seed, self._step, self._stream))

    def advance(self) -> None:
        """Go to the start of the next step."""
        self.at(self._step + 1)

    def state_dict(self) -> dict[str, int]:
        """Seed and step: all that a run with another number of processes needs to go on."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the start of the saved step, by the saved seed.

        Raises:
            ValueError: a number is missing or out of range.
            TypeError: one of them is no int.
        """
        missing = sorted({"seed", "step"} - set(state_dict))
        if missing:
            raise ValueError(f"state_dict: expected seed and step, got none of {', '.join(missing)}")
        seed, step = (check_integer(f"state_dict[{name!r}]", state_dict[name], most=_MOST) for name in ("seed", "step"))
        self._seed = seed
        self.at(step)

    def __repr__(self) -> str:
        return f"StepGenerator(seed={self._seed}, stream={self._stream}, step={self._step})"


def shard_rotary(rope: ClexRotaryEmbedding, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Make the ODE's weights an FSDP2 unit in place, gathered in fp32 wherever they are read.

    Call it before fully_shard of the model around it, which then leaves them to it. The optimizer is made afterwards,
    as with FSDP2 always. Saved and loaded by torch.distributed.checkpoint like the rest. As with any FSDP2 unit inside
    another, the first call goes through the outermost one's forward.

    Args:
        rope: with weights that are not sharded.
        mesh: fully_shard's; None: all processes.
        options: fully_shard's others. reshard_after_forward is False if nothing is said, so that one gather serves all
            forwards of an evaluation; cached tables last from one gather to the next.

    Raises:
        TypeError: rope is no ClexRotaryEmbedding, or mesh no DeviceMesh.
        ValueError: it is sharded already, there is no process group, or mp_policy would round its weights, gradients
            or tables.
    """
    if not isinstance(rope, ClexRotaryEmbedding):
        raise TypeError(f"rope: expected a ClexRotaryEmbedding, got {type(rope).__name__}")
    if isinstance(rope, FSDPModule) or any(isinstance(weight, DTensor) for weight in rope.parameters()):
        raise ValueError("rope: expected one with whole weights, got one that is sharded; call this before fully_shard")
    options = {"reshard_after_forward": False} | options
    _check_policy(options.get("mp_policy", MixedPrecisionPolicy()), rope.proj_func.ode_up_proj.dtype)
    if mesh is None:
        # all processes.
        ranks_of(None)
    elif not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
    for name in ("forward", *_METHODS):
        setattr(rope, name, _return_no_view(getattr(rope, name)))
    fully_shard(rope, mesh=mesh, **options)
    # before FSDP's own hook.
    rope.register_forward_pre_hook(_drop_stale_tables, prepend=True)
    for name in _METHODS:
        register_fsdp_forward_method(rope, name)
        setattr(rope, name, _drop_before(rope, getattr(rope, name)))


def _drop_stale_tables(rope: nn.Module, *_: Any) -> None:
    """Drop cached tables if the weights are about to be gathered, which they are as long as they are sharded."""
    if isinstance(rope.proj_func.ode_up_proj, DTensor):
        rope.invalidate()


def _drop_before(rope: ClexRotaryEmbedding, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        _drop_stale_tables(rope)
        return method(*args, **kwargs)

    return call


def _return_no_view(method: Callable[..., RotaryTable | RotaryTableStack]) -> Callable[..., Any]:
    """`method` whose tables own their freq: FSDP hooks it, and warns that writing to a view would lose the hook."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> RotaryTable | RotaryTableStack:
        table = method(*args, **kwargs)
        return replace(table, freq=table.freq.clone()) if table.freq.requires_grad else table

    return call


def _check_policy(policy: MixedPrecisionPolicy, dtype: torch.dtype) -> None:
    expected = {
        "param_dtype": (None, dtype),
        "reduce_dtype": (None, torch.float32, torch.float64),
        "output_dtype": (None,),
    }
    for name, dtypes in expected.items():
        if getattr(policy, name) not in dtypes:
            choice = " or ".join(map(str, dtypes))
            raise ValueError(f"mp_policy: expected a {name} of {choice} for the ODE, got {getattr(policy, name)}")


def _mix(*numbers: int) -> int:
    """[0, 2^64): SplitMix64 over `numbers`, in which neighbours share nothing.

    torch's CPU generator starts from the low 32 bits of its seed, so it takes a mix whose bits all depend on all.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
