"""The one tolerance rule: a kernel may err twice as much as plain torch does in the same dtype, plus one rounding.

    max |actual - truth|  <=  2 (max |in_dtype - truth| + eps(dtype) max |truth|)

`truth` is the reference in fp64, `in_dtype` the same reference run in the kernel's own dtype.
"""

import torch
from torch import Tensor


def assert_within_rule(actual: Tensor, in_dtype: Tensor, truth: Tensor) -> None:
    """Asserts the rule for three tensors of one shape; NaN anywhere fails, infinities (an empty LSE) must coincide."""
    assert actual.shape == in_dtype.shape == truth.shape, f"{actual.shape}, {in_dtype.shape}, {truth.shape}"
    assert actual.dtype == in_dtype.dtype, f"{actual.dtype} judged by {in_dtype.dtype}"
    assert truth.dtype == torch.float64, f"the truth must be fp64, got {truth.dtype}"
    truth = truth.detach().cpu()
    finite = truth.isfinite()
    errors = []
    for name, value in (("actual", actual), ("in_dtype", in_dtype), ("truth", truth)):
        value = value.detach().cpu().double()
        assert not value.isnan().any(), f"{name}: {int(value.isnan().sum())} of {value.numel()} values are NaN"
        assert torch.equal(value[~finite], truth[~finite]), f"{name}: infinities differ from the truth's"
        assert value[finite].isfinite().all(), f"{name}: infinite where the truth is finite"
        errors.append(_largest(value[finite] - truth[finite]))
    eps = torch.finfo(actual.dtype).eps
    bound = 2 * (errors[1] + eps * _largest(truth[finite]))
    assert errors[0] <= bound, f"error {errors[0]:.3e} over the bound {bound:.3e} (reference errs by {errors[1]:.3e})"


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
