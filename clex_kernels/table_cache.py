"""Keeps per-length tables between calls: the Python face of csrc/table_cache.cpp, which holds the tensors."""

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from clex_kernels.extension import destroy_table_cache, library

library.define("fingerprint(Tensor[] tensors) -> int")
library.define("table_cache_create(int byte_budget) -> int")
library.define("table_cache_get(int handle, int key, int length, int fingerprint, bool pin) -> Tensor[]")
library.define("table_cache_put(int handle, int key, int length, int fingerprint, Tensor[] tensors) -> ()")
library.define("table_cache_invalidate(int handle) -> ()")
library.define("table_cache_stats(int handle) -> int[]")


def _untraceable(name: str) -> Callable[..., None]:
    def fake(*args: object) -> None:
        from torch._subclasses.fake_tensor import UnsupportedOperatorException

        raise UnsupportedOperatorException(getattr(torch.ops.clex, name).default)

    return fake


# torch.compile would run the cache's operators while it traces and make constants of what they return, so they break
# the graph instead.
_verbs = ("create", "get", "put", "invalidate", "stats")
for _name in ("fingerprint", *(f"table_cache_{verb}" for verb in _verbs)):
    torch.library.register_fake(f"clex::{_name}", _untraceable(_name), lib=library)


# by tensor: a new one may get the address and the version of one that is gone.
_serials = WeakTensorKeyDictionary()
_next_serial = itertools.count()


def _fingerprint_by_version(weights: list[Tensor]) -> int:
    serials = (_serials.setdefault(weight, next(_next_serial)) for weight in weights)
    versions = (-1 if weight.is_inference() else weight._version for weight in weights)
    return hash((*serials, *versions, *(weight.data_ptr() for weight in weights)))


# the CPU has its own, which reads the contents.
library.impl("fingerprint", _fingerprint_by_version, "CompositeExplicitAutograd")


class CacheStats(NamedTuple):
    """Counts since the cache was made; `bytes` and `entries` are what it keeps now, `bytes` with all pinned memory."""

    hits: int
    misses: int
    evictions: int
    bytes: int
    entries: int
    invalidations: int


class TableCache:
    """Tables kept between calls under a byte budget, least recently used evicted first. Thread-safe; stored in C++.

    All entries belong to the weights of one fingerprint, and a call with another one drops them. An entry larger than
    the budget is kept until the next one is stored. Under CUDA graph capture hits are pinned, so that their memory
    lives as long as the cache, and a miss is a RuntimeError: store the longest table before. Copies and pickles of a
    cache are empty caches of the same budget.
    """

    def __init__(self, byte_budget: int):
        if isinstance(byte_budget, bool) or not isinstance(byte_budget, int):
            raise TypeError(f"byte_budget: expected an int, got {type(byte_budget).__name__}")
        if not 0 <= byte_budget < 2**63:
            raise ValueError(f"byte_budget: expected 0 or more, below 2^63, got {byte_budget}")
        self.byte_budget = byte_budget
        self._handle: int = torch.ops.clex.table_cache_create(byte_budget)
        weakref.finalize(self, destroy_table_cache, self._handle).atexit = False

    def __reduce__(self) -> tuple[type["TableCache"], tuple[int]]:
        return TableCache, (self.byte_budget,)

    def get(self, key: str, length: int, fingerprint: int, pin: bool = False) -> tuple[Tensor, ...] | None:
        """The tensors stored under `key` for at least `length` positions, or None. Never write to them.

        Raises RuntimeError for a miss under CUDA graph capture.
        """
        capturing = _capturing()
        tensors = torch.ops.clex.table_cache_get(self._handle, hash(key), length, fingerprint, pin or capturing)
        if not tensors:
            if capturing:
                raise RuntimeError(
                    f"no cached table for {key!r} and length {length}: none can be built or grown under CUDA graph"
                    " capture, so ask for the longest length once before"
                )
            return None
        for tensor in tensors:
            if tensor.is_cuda:
                # its memory is not reused before this stream is done with it, also if another thread evicts it.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tuple(tensors)

    def put(self, key: str, length: int, fingerprint: int, tensors: tuple[Tensor, ...]) -> None:
        """Store tensors for positions 0 .. length - 1, in place of a shorter entry; a longer one stays.

        Waits for the current stream of their device, so that every stream may read them. Raises ValueError for
        inference tensors, which autograd could not save later, and RuntimeError under CUDA graph capture.
        """
        if _capturing():
            raise RuntimeError(f"the table for {key!r} can't be stored under CUDA graph capture")
        if not tensors:
            raise ValueError("tensors: expected at least one, got none")
        if any(tensor.is_inference() for tensor in tensors):
            raise ValueError("tensors: expected tensors made outside inference mode, got inference tensors")
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        detached = [tensor.detach() for tensor in tensors]
        torch.ops.clex.table_cache_put(self._handle, hash(key), length, fingerprint, detached)

    def fetch(
        self, key: str, length: int, fingerprint: int, build: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`get`, or else what `build` returns, stored. `build` runs without grad and outside inference mode."""
        tensors = self.get(key, length, fingerprint)
        if tensors is None:
            with torch.inference_mode(False), torch.no_grad():
                tensors = build()
                self.put(key, length, fingerprint, tensors)
        return tensors

    def invalidate(self) -> None:
        """Drop all entries."""
        torch.ops.clex.table_cache_invalidate(self._handle)

    def stats(self) -> CacheStats:
        """Hits, misses, evictions, bytes, entries, invalidations."""
        return CacheStats(*torch.ops.clex.table_cache_stats(self._handle))


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def weights_fingerprint(up: Tensor, down: Tensor) -> int:
    """A number that changes with the weights up [R, M] and down [M, R].

    On the CPU a hash of their contents: it sees every write, `.data` and inference mode included. Elsewhere of which
    tensors they are, their addresses and version counters, which waits for nothing but misses writes through `.data`,
    to inference tensors, by collectives and by replayed CUDA graphs: invalidate the cache after those.
    """
    return torch.ops.clex.fingerprint([up, down])
