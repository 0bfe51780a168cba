"""What apply_rotary says of wrong arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_rotary_interface import FREQ, B, D, H, L, inputs, make_stack, make_table
from torch import Tensor

from clex_kernels.rotary import apply_rotary
from clex_kernels.tables import RotaryTable

Q, K = inputs()
ODD = torch.randn(B, L, H, 2 * D)[..., ::2]
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)


def leaf(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, 999), requires_grad=False)


def by_hand(**changes: Tensor) -> RotaryTable:
    return replace(make_table(), **changes)


BAD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "q-list": (TypeError, "q: expected a tensor", lambda: apply_rotary([1.0], K, make_table())),
    "q-integer": (TypeError, "q: .*got torch.int64", lambda: apply_rotary(Q.long(), None, make_table())),
    "q-2d": (ValueError, r"q: expected shape \[B, L, H, D\], got \[3, 4\]", lambda: call(torch.zeros(3, 4))),
    "q-strided": (ValueError, "q: expected unit stride in D", lambda: apply_rotary(ODD, K, make_table())),
    "k-dtype": (TypeError, "k: expected q's torch.float32", lambda: apply_rotary(Q, K.double(), make_table())),
    "k-device": (ValueError, "k: .*got torch.float32 on meta", lambda: apply_rotary(Q, K.to("meta"), make_table())),
    "k-batch": (ValueError, r"k: expected shape \[B=2, L=9, G, D=24\]", lambda: apply_rotary(Q, K[:1], make_table())),
    "table-type": (TypeError, "table: expected a RotaryTable", lambda: apply_rotary(Q, K, FREQ)),
    "table-wide": (ValueError, "at most D=24, got 26", lambda: apply_rotary(Q, K, make_table(torch.ones(13).double()))),
    "table-dtype": (TypeError, "table: expected dtype", lambda: apply_rotary(Q.double(), K.double(), make_table())),
    "table-fp64": (TypeError, "table: expected dtype", lambda: apply_rotary(Q, K, make_table(dtype=torch.float64))),
    "table-device": (ValueError, "table: expected it on", lambda: apply_rotary(Q.to("meta"), None, make_table())),
    "no-index": (ValueError, r"needs an index \[B=2\]", lambda: apply_rotary(Q, K, make_stack())),
    "index-shape": (ValueError, "index: expected", lambda: apply_rotary(Q, K, make_stack(index=torch.arange(3)))),
    "offset-type": (TypeError, "offset: expected an int", lambda: call(Q, offset=1.5)),
    "table-by-hand": (
        ValueError,
        "table: expected freq",
        lambda: apply_rotary(Q, K, by_hand(coarse=make_table().coarse[:, :1])),
    ),
    "table-rows": (
        ValueError,
        r"got \[1, 8\].* \[1, 3\]",
        lambda: apply_rotary(Q, K, by_hand(positions=torch.ones(3))),
    ),
    "index-leaf": (ValueError, "got 999 to", lambda: apply_rotary(Q, K, replace(make_stack(), index=leaf(B)))),
    "ids-leaf": (ValueError, "got 999 to 999", lambda: call(Q, position_ids=leaf(1, L))),
    "offset-bool": (TypeError, "offset: expected an int, got bool", lambda: call(Q, offset=True)),
    "offset-huge": (ValueError, r"within 2\^62", lambda: call(Q[:, :0], position_ids=NO_IDS, offset=2**63)),
    "offset-negative": (ValueError, "offset: expected at least 0", lambda: call(Q, offset=-1)),
    "offset-past": (ValueError, r"128 positions, got 120 \+ 9", lambda: call(Q, offset=120)),
    "ids-type": (TypeError, "position_ids: expected an int64", lambda: call(Q, position_ids=torch.ones(1, L))),
    "ids-shape": (ValueError, r"\[B=2 or 1, L=9\]", lambda: call(Q, position_ids=torch.arange(L))),
    "ids-past": (ValueError, r"\[0, 128\), got 0 to 128", lambda: call(Q, position_ids=torch.arange(0, 144, 16)[None])),
    "ids-negative": (ValueError, "got -1 to 7", lambda: call(Q, position_ids=torch.arange(L)[None] - 1)),
    "out-in-place": (ValueError, "out: expected None", lambda: call(Q, out=(Q.clone(), None), inplace=True)),
    "out-type": (TypeError, "out: expected", lambda: call(Q, out=Q.clone())),
    "out-shape": (ValueError, r"out\[0\]: expected", lambda: call(Q, out=(K.clone(), None))),
    "out-expanded": (ValueError, "share memory", lambda: call(Q, out=(Q[:, :, :1].expand_as(Q), None))),
    "out-grad": (ValueError, "not differentiable", lambda: call(Q.clone().requires_grad_(), out=(Q.clone(), None))),
    "in-place-expanded": (ValueError, "share memory", lambda: call(Q[:, :, :1].expand_as(Q), inplace=True)),
    "in-place-overlapping": (
        ValueError,
        "share memory",
        lambda: call(torch.randn(999).as_strided((1, L, H, D), (0, H * D, D - 4, 1)), inplace=True),
    ),
    "stack-to-choose-from": (
        ValueError,
        r"needs an index \[B=2\], call table.select",
        lambda: apply_rotary(Q, None, make_stack(2, train_length=16)),
    ),
    "out-text": (TypeError, r"out\[0\]: expected a tensor, got str", lambda: call(Q, out=("text", None))),
    "out-crossed": (ValueError, "share no memory", lambda: apply_rotary(Q, Q + 1, make_table(), out=(Q.clone(), Q))),
    "in-place-same": (ValueError, "share no memory", lambda: apply_rotary(Q, Q, make_table(), inplace=True)),
}


def call(q: Tensor, **options: Any) -> Any:
    return apply_rotary(q, None, make_table(), **options)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    error, message, function = BAD[case]
    with pytest.raises(error, match=message):
        function()
