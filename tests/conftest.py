import os
from collections.abc import Iterator

import pytest
import torch

from clex_kernels import _C

# several pytest workers with all of torch's threads each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has."""
    widest = ISAS.index(_C.isa())
    if ISAS.index(request.param) > widest:
        pytest.skip(f"this processor has no {request.param}")
    _C.set_isa(ISAS.index(request.param))
    yield request.param
    _C.set_isa(widest)


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    """A GPU if there is one, else the CPU under Triton's interpreter."""
    pytest.importorskip("triton")
    from interpreter import interpreted

    if torch.cuda.is_available():
        yield "cuda"
    else:
        with interpreted():
            yield "cpu"


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Memory that is not initialised holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A text for the examples, since parsing the whole standard library takes seconds."""
    from examples.extrapolation import corpus

    some = [f"document {number}: " + "all work and no play. " * (20 + number) for number in range(36)]
    monkeypatch.setattr(corpus, "documents", lambda: iter(some))
    corpus.load_corpus.cache_clear()
    yield
    corpus.load_corpus.cache_clear()
