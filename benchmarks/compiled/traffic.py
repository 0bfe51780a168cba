"""Bytes that kernels move, counted: launches run in Triton's interpreter, and every address of every program is noted.

Of each tensor there are two figures, for reading and writing apart. `requested`: the bytes that programs touch, a
byte once a program, added up over programs; L2 delivers them if L1 catches what one program reads twice. `memory`: the
32-byte sectors that the launch touches, each once; memory delivers them if L2 catches what programs share. What stays
between the two is a matter of caches. Copies and sums that a launcher leaves to torch are not in it.

An address outside of the launch's tensors is an error, so that each count is a test of bounds too. CPU tensors take
the launch configurations of sm_80; those of other architectures differ in tiles, which changes `requested` alone.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from tests.interpreter import interpreted

SECTOR = 32


class Bytes(NamedTuple):
    """As requested by the programs one by one, and as read from or written to memory."""

    requested: float
    memory: float

    def plus(self, other: "Bytes") -> "Bytes":
        return Bytes(self.requested + other.requested, self.memory + other.memory)


@dataclass(frozen=True)
class Traffic:
    """What one launch moves, by tensor: `name`, or `name.field` in a tuple; of a tensor given twice the first name."""

    kernel: str
    programs: int
    reads: dict[str, Bytes]
    writes: dict[str, Bytes]

    def total(self, *names: str) -> Bytes:
        """Reads and writes of the tensors named, or of all."""
        moved = Bytes(0, 0)
        for side in (self.reads, self.writes):
            for name, part in side.items():
                if not names or name in names:
                    moved = moved.plus(part)
        return moved


class Span(NamedTuple):
    """A tensor's memory from its first element's address to the end of its last."""

    start: int
    end: int
    name: str
    itemsize: int


def find_spans(name: str, value: Any) -> Iterator[Span]:
    """Those of a kernel's argument, a tensor or a tuple of arguments."""
    if isinstance(value, tuple):
        for key, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from find_spans(f"{name}.{key}", part)
    elif isinstance(value, torch.Tensor) and value.numel() > 0:
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        yield Span(value.data_ptr(), value.data_ptr() + (last + 1) * value.itemsize, name, value.itemsize)


def distinct(parts: list[np.ndarray]) -> np.ndarray:
    """The numbers in the arrays, each once; they lie close together."""
    numbers = np.concatenate(parts)
    first = numbers.min()
    marks = np.zeros(numbers.max() - first + 1, bool)
    marks[numbers - first] = True
    return np.flatnonzero(marks) + first


class Recorder:
    """Notes what the programs of one launch touch."""

    def __init__(self, kernel: str, arguments: dict[str, Any]):
        spans: dict[tuple[int, int], Span] = {}
        for name, value in arguments.items():
            for span in find_spans(name, value):
                spans.setdefault(span[:2], span)
        self.kernel = kernel
        self.spans = sorted(spans.values())
        for one, other in zip(self.spans, self.spans[1:], strict=False):
            if other.start < one.end:
                raise ValueError(f"{kernel}: {one.name} and {other.name} share some of their memory, but not all of it")
        self.starts, self.ends = (np.array([span[side] for span in self.spans], np.int64) for side in (0, 1))
        self.programs = 0
        # addresses of the program that runs, then bytes and sectors of those before it, by direction and span.
        self.touched: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
        self.requested: dict[tuple[str, int], int] = defaultdict(int)
        self.sectors: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def begin_program(self) -> None:
        self.end_program()
        self.programs += 1

    def end_program(self) -> None:
        for key, parts in self.touched.items():
            addresses = distinct(parts)
            self.requested[key] += len(addresses) * self.spans[key[1]].itemsize
            self.sectors[key].append(distinct([addresses // SECTOR]))
        self.touched.clear()

    def touch(self, direction: str, pointers: TensorHandle, mask: np.ndarray) -> None:
        # the interpreter's masks may be of integers.
        active = np.broadcast_to(mask.astype(bool), pointers.data.shape)
        addresses = pointers.data[active].astype(np.int64)
        if not addresses.size:
            return
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        owners = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (owners < 0) | (addresses + width > self.ends[owners])
        if outside.any():
            raise IndexError(f"{self.kernel}: {outside.sum()} {direction} outside of every tensor")
        for owner in np.unique(owners).tolist():
            if width != self.spans[owner].itemsize:
                raise NotImplementedError(f"{self.kernel}: {width} bytes at a time of {self.spans[owner].name}")
            self.touched[direction, owner].append(addresses[owners == owner])

    def finish(self) -> Traffic:
        self.end_program()
        sides: dict[str, dict[str, Bytes]] = {"reads": {}, "writes": {}}
        for (direction, owner), sectors in self.sectors.items():
            moved = Bytes(self.requested[direction, owner], len(distinct(sectors)) * SECTOR)
            sides[direction][self.spans[owner].name] = moved
        return Traffic(self.kernel, self.programs, **sides)


def refuse(self: InterpreterBuilder, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("counted are loads and stores through pointers: no atomics, block pointers, descriptors")


REFUSED = ("create_atomic_cas", "create_atomic_rmw", "create_make_block_ptr", "create_make_tensor_descriptor")


@contextlib.contextmanager
def recording() -> Iterator[list[Traffic]]:
    """Lists what the interpreter's launches move."""
    found: list[Traffic] = []
    launches: list[Recorder] = []
    run, builder = JITFunction.run, InterpreterBuilder
    load, store, set_grid_idx = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    replaced = {name: getattr(builder, name) for name in REFUSED}

    # loads and stores without a mask come here with one that is true.
    def load_noted(self: Any, ptrs: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        launches[-1].touch("reads", ptrs, mask.data)
        return load(self, ptrs, mask, *rest)

    def store_noted(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        launches[-1].touch("writes", ptrs, mask.data)
        return store(self, ptrs, value, mask, *rest)

    def begin_program(self: Any, *index: int) -> None:
        launches[-1].begin_program()
        set_grid_idx(self, *index)

    def run_noted(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Recorder(self.fn.__name__, named))
        run(self, *args, **kwargs)
        found.append(launches.pop().finish())

    JITFunction.run, builder.set_grid_idx = run_noted, begin_program
    builder.create_masked_load, builder.create_masked_store = load_noted, store_noted
    for name in REFUSED:
        setattr(builder, name, refuse)
    try:
        yield found
    finally:
        JITFunction.run, builder.set_grid_idx = run, set_grid_idx
        builder.create_masked_load, builder.create_masked_store = load, store
        for name, method in replaced.items():
            setattr(builder, name, method)


def count_traffic(launch: Callable[[], Any]) -> list[Traffic]:
    """What each Triton launch within `launch`, on CPU tensors, moves."""
    with interpreted(), recording() as found:
        launch()
    return found


@dataclass
class EagerBytes:
    """What operators read and write, a byte once an operator and direction, and both together by operator."""

    read: int = 0
    written: int = 0
    by_operator: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.read + self.written


WRITTEN_ONLY = (torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_)
UNWRITTEN = tuple(getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty"))


class EagerCounter(TorchDispatchMode):
    """Counts operators as they are dispatched. Views move nothing, a tensor changed in place is read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.found = EagerBytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, packet = func._schema, func.overloadpacket
        # _unsafe_view's schema does not say that it returns a view.
        given = {tensor.untyped_storage().data_ptr() for tensor in find_tensors([*args, *kwargs.values()])}
        is_view = any(tensor.untyped_storage().data_ptr() in given for tensor in find_tensors(result))
        if packet in UNWRITTEN or (is_view and not schema.is_mutable):
            return result
        inputs: list[Any] = []
        outputs = [] if schema.is_mutable else [result]
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            is_changed = argument.alias_info is not None and argument.alias_info.is_write
            if is_changed:
                outputs.append(value)
            if not is_changed or not (argument.is_out or packet in WRITTEN_ONLY):
                inputs.append(value)
        read, written = distinct_bytes(inputs), distinct_bytes(outputs)
        self.found.read += read
        self.found.written += written
        name = str(packet)
        self.found.by_operator[name] = self.found.by_operator.get(name, 0) + read + written
        return result


def distinct_bytes(values: Any) -> int:
    """Bytes of memory behind the tensors in nested lists."""
    memory: dict[int, np.ndarray] = {}
    for tensor in find_tensors(values):
        storage = tensor.untyped_storage()
        touched = memory.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), bool))
        first = touched[tensor.storage_offset() * tensor.itemsize :]
        shape, strides = (*tensor.shape, tensor.itemsize), (*(n * tensor.itemsize for n in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(first, shape, strides)[...] = True
    return sum(int(touched.sum()) for touched in memory.values())


def find_tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from find_tensors(value)


def eager_bytes(function: Callable[..., Any], *args: Any) -> EagerBytes:
    """What function(*args) moves on CPU tensors, operator by operator.

    Operators that torch composes of others count as those; temporaries within one are not seen. No cache is assumed
    between operators, as for tensors larger than one.
    """
    with torch.no_grad(), EagerCounter() as counter:
        function(*args)
    return counter.found
