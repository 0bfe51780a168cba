"""Loads the compiled extension and the `clex` operator namespace that it and the op files fill."""

import torch

from clex_kernels import _C

library: torch.library.Library = torch.library.Library("clex", "FRAGMENT")

isa = _C.isa
has_cuda = _C.has_cuda
build_reason = _C.build_reason
destroy_table_cache = _C.destroy_table_cache
