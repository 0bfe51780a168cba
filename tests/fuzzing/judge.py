"""One call, and whether what it did is allowed: the right result, or an error that names what is wrong."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import gradients, values
from .gradients import Derivative
from .values import Draw, described, tensors_in

# torch's own words for memory that does not exist, and for inference tensors beside ones that require grad.
TORCHS_OWN = (
    *("can't allocate memory", '"aten::empty", "memory_format"', "MemoryError"),
    "Inference tensors cannot be saved for backward",
)
NAMED = re.compile(r"^[a-z_][\w\[\]., ()]*: ", re.IGNORECASE)


@dataclass
class Case:
    """A call that must work, what its result must be, and which RuntimeErrors the docstring promises."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    # of the arguments as they were, the result, and the arguments as they are; raises AssertionError.
    check: Callable[[dict[str, Any], Any, dict[str, Any]], None]
    written: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    # sizes of what is made: large ones are no mistake but take long.
    costly: tuple[str, ...] = ()
    # whether `written` may have been written to before an error.
    writes_early: bool = False
    derivative: Derivative | None = None
    how: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        given = ", ".join(f"{name}={described(value)}" for name, value in self.arguments.items())
        return f"{name}({given})" + f"  # spoiled: {'; '.join(self.how)}" * bool(self.how)


def spoil(draw: Draw, case: Case) -> None:
    """Changes one or two arguments to something that may not fit."""
    names = [name for name in signature(case.function).parameters if name not in ("self", "options")]
    for _ in range(draw.choice((1, 1, 1, 2))):
        name = draw.choice(list(case.arguments) if case.arguments and draw.maybe(0.6) else names)
        changed = values.spoil(draw, case.arguments.get(name))
        case.arguments[name] = _cheap(changed.value) if name in case.costly else changed.value
        case.how.append(f"{name} {changed.how}")


def _cheap(size: Any) -> Any:
    """`size` with numbers that would take long but may fit into memory made small."""
    if isinstance(size, Tensor):
        if size.dtype not in (torch.int32, torch.int64) or size.is_meta:
            return size
        # in 32 bits the bound would come round.
        is_large = (size.long() > 2**20) & (size.long() < 2**45)
        return torch.where(is_large, size % 1000, size)
    return size % 1000 if isinstance(size, int) and 2**20 < size < 2**45 else size


class Memory:
    """All memory of the arguments, to see what a call writes to."""

    def __init__(self, arguments: dict[str, Any]):
        self._kept = []
        for name, value in arguments.items():
            for x in tensors_in(value):
                if x.layout == torch.strided and x.is_cpu:
                    whole = _bytes(x)
                    self._kept.append((name, x, whole, whole.clone()))

    def check(self, written: tuple[str, ...]) -> None:
        """Raises AssertionError unless only elements of the arguments `written` have changed."""
        allowed: dict[int, Tensor] = {}
        for name, x, whole, _ in self._kept:
            mask = allowed.setdefault(whole.data_ptr(), torch.zeros(whole.shape, dtype=torch.bool))
            if name in written and x.numel():
                flat = mask.view(-1, x.element_size()) if mask.numel() % x.element_size() == 0 else None
                elements = torch.zeros(len(flat), dtype=torch.bool)
                elements.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
                flat |= elements[:, None]
        for name, _, whole, before in self._kept:
            changed = (whole != before) & ~allowed[whole.data_ptr()]
            assert not changed.any(), f"{name}: {int(changed.sum())} bytes written that are not its elements"


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.detach().untyped_storage())


def kept(value: Any) -> Any:
    """A copy of an argument's numbers."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(kept, value))
    return value


def judge(case: Case) -> str | None:
    """What is wrong with how the call went, or None."""
    before = {name: kept(value) for name, value in case.arguments.items()}
    memory = Memory(case.arguments)
    try:
        result = case.function(**case.arguments)
    except (ValueError, TypeError) as error:
        if not case.how:
            return f"a call that is right raised {type(error).__name__}: {error}"
        if not NAMED.match(str(error)):
            return f"{type(error).__name__} does not name what is wrong: {error}"
        return _complaint(lambda: memory.check(case.written if case.writes_early else ()))
    # whatever else comes out is a finding, but for what is promised.
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        promised = isinstance(error, RuntimeError) and any(re.search(known, text) for known in case.refusals)
        if promised or (case.how and any(words in text for words in TORCHS_OWN)):
            return _complaint(lambda: memory.check(()))
        return text.splitlines()[0][:300]
    # it may have been spoiled into one that works in place.
    written = ("q", "k") if case.arguments.get("inplace") is True else case.written
    checks = [lambda: memory.check(written), lambda: case.check(before, result, case.arguments)]
    if case.derivative is not None:
        checks.append(lambda: gradients.check(case.derivative, case.function, case.arguments, str(case)))
        # a backward pass writes to no argument either.
        checks.append(lambda: memory.check(written))
    return _complaint(*checks)


def _complaint(*checks: Callable[[], None]) -> str | None:
    for check in checks:
        try:
            check()
        except AssertionError as error:
            return f"wrong: {error}"
        # the truth may fail in any way where it should have been refused: a call was accepted of which it is not known.
        except Exception as error:
            return f"accepted, where the truth is {type(error).__name__}: {str(error).splitlines()[:1]}"
    return None
