import os
from collections.abc import Iterator

import pytest
import torch

from clex_kernels import _C

# several pytest workers with all of torch's threads each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has."""
    names = ["baseline", "avx2", "avx512"]
    widest = names.index(_C.isa())
    if names.index(request.param) > widest:
        pytest.skip(f"this processor has no {request.param}")
    _C.set_isa(names.index(request.param))
    yield request.param
    _C.set_isa(widest)
