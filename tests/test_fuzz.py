"""Random calls of every public function, in a process of their own, and the bugs that such calls have found."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_calls import findings
from fuzzing.functions import FUNCTIONS
from fuzzing.gradients import Derivative
from fuzzing.judge import Case, judge

import clex_kernels
from clex_kernels import (
    ClexAttention,
    ClexConfig,
    ClexRotaryEmbedding,
    RotaryTable,
    RotaryTableStack,
    append_kv,
    apply_rotary,
    attention,
    clip_gradients,
    decode_attention,
    merge_attention,
    pack_qkv,
    qkv_rotary,
    solve_frequencies,
)

# what has classes of its own among the functions that are called.
COVERED = {
    "ClexAttention": ("layer", "layer_forward", "layer_decode"),
    "ClexConfig": ("config", "length_factor", "from_transformers"),
    "ClexRotaryEmbedding": ("embedding", "forward", "stack", "at", "sample"),
    "RotaryTable": ("table",),
    "RotaryTableStack": ("table_stack", "select"),
}


def test_every_public_name_is_called():
    called = {name for public in clex_kernels.__all__ for name in COVERED.get(public, (public,))}
    assert called == FUNCTIONS.keys()


def test_random_calls_are_right_or_refused_by_name():
    assert list(findings(list(FUNCTIONS), seed=0, calls=120)) == []


@pytest.mark.long
@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_random_calls_are_right_or_refused_by_name(name):
    assert list(findings([name], seed=random.SystemRandom().randrange(2**32), calls=5000)) == []


def test_the_judge_sees_what_is_wrong():
    def case(function: Any, written: tuple[str, ...] = (), how: tuple[str, ...] = ("spoiled",)) -> Case:
        def check(before: Any, result: Any, after: Any) -> None:
            assert result is None, "another result"

        return Case(function, {"x": torch.zeros(4)[1:3]}, check, written, how=list(how))

    def raises(error: Exception) -> Any:
        def function(x: Any) -> None:
            raise error

        return function

    def writes(x: torch.Tensor) -> None:
        x.fill_(1.0)

    def writes_beside(x: torch.Tensor) -> None:
        x._base.fill_(1.0)

    assert judge(case(raises(ValueError("x: expected 1, got 2")))) is None
    assert "right raised" in judge(case(raises(ValueError("x: expected 1, got 2")), how=()))
    assert "does not name" in judge(case(raises(TypeError("unhashable"))))
    assert "IndexError" in judge(case(raises(IndexError("x: expected 1, got 2"))))
    assert "another result" in judge(case(lambda x: 3))
    assert "4 bytes written" in judge(case(writes))
    assert judge(case(writes, written=("x",))) is None
    assert "4 bytes written" in judge(case(writes_beside, written=("x",)))


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda x: x.sin(), None),
        (lambda x: x.sin() + x.cos().detach() - x.cos(), "gradient 0: off by"),
        (lambda x: x.detach().sin(), "without a gradient"),
        (lambda x: x.sin() + (0 * x).sqrt(), "gradient 0: not finite"),
    ],
    ids=["right", "another", "none", "not finite"],
)
def test_the_judge_sees_a_wrong_gradient(function, complaint):
    x = torch.linspace(0, 1, 100, dtype=F)

    def check(before: Any, result: Any, after: Any) -> None:
        torch.testing.assert_close(result, x.sin())

    derivative = Derivative(("x",), lambda given: (given["x"].sin(),))
    # some calls are not asked for the gradient of their result.
    found = {judge(Case(lambda x, n: function(x), {"x": x, "n": n}, check, derivative=derivative)) for n in range(8)}
    texts = [text for text in found if text is not None]
    assert texts == [] if complaint is None else texts and all(complaint in text for text in texts)


F = torch.float64
TABLE = RotaryTable.from_frequencies(torch.tensor([1.0, 0.1], dtype=F), 64)
WIDE = RotaryTable.from_frequencies(torch.tensor([1.0, 0.1], dtype=F), 64, dtype=F)
STACK = RotaryTableStack.from_frequencies(
    torch.ones(2, 2, dtype=F), torch.ones(2, dtype=F), 64, train_length=32, log_scale=True
)
Q = torch.randn(1, 3, 2, 4)
CONFIG = ClexConfig(head_dim=4, train_length=8)
WEIGHT = torch.randn(24, 5)
# it has unit stride, as far as that goes with one channel.
ONE = Q[..., :1].clone()
NEGATED = torch.complex(ONE, -ONE).conj().imag


def changed(table: Any, **fields: Any) -> Any:
    from dataclasses import replace

    return replace(table, **fields)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


FOUND: dict[str, Any] = {
    # the sum of an int32 offset and the length came round, and rows outside of the table were asked for.
    "32-bit offsets": ("table: expected positions", lambda: attention(Q, Q, Q, TABLE, k_offset=int32(2**31 - 1))),
    "32-bit query offsets": ("table: expected positions", lambda: attention(Q, Q, Q, TABLE, q_offset=int32(2**31 - 2))),
    "packed at a far offset": (
        "table: expected positions",
        lambda: attention(Q[0], Q[0], Q[0], TABLE, cu_seqlens_q=int32(0, 3), cu_seqlens_k=int32(0, 3), k_offset=2**31),
    ),
    "64-bit offsets": ("k_offset: expected", lambda: attention(Q, Q, Q, TABLE, k_offset=torch.tensor([2**63 - 1]))),
    # these came out as NaN.
    "a cap that vanishes in fp32": ("softcap: expected", lambda: attention(Q, Q, Q, TABLE, softcap=1e-45)),
    "a scale past all logits": ("scale: expected", lambda: attention(Q, Q, Q, TABLE, scale=1e38)),
    "an amplitude that vanishes in fp32": (
        "amplitude: expected",
        lambda: RotaryTable.from_frequencies(torch.ones(2, dtype=F), 3, amplitude=1e-300),
    ),
    # other types of errors, from deep inside.
    "flag of many": ("inplace: expected a bool", lambda: apply_rotary(Q, None, TABLE, inplace=torch.ones(2))),
    "flag of text": ("return_lse: expected a bool", lambda: decode_attention(Q, Q, Q, TABLE, 3, return_lse="yes")),
    "choice of many": ("rotated: expected one of", lambda: decode_attention(Q, Q, Q, TABLE, 3, rotated=torch.ones(2))),
    "dropout of many": ("dropout_p: not supported", lambda: attention(Q, Q, Q, TABLE, dropout_p=torch.ones(2))),
    "table without rows": ("table: expected a tensor coarse", lambda: apply_rotary(Q, None, changed(TABLE, coarse=3))),
    "table of one number": (
        "table: expected fine with 3 dim",
        lambda: decode_attention(Q, Q, Q, changed(TABLE, fine=torch.tensor(1.0)), 3),
    ),
    "table of two dtypes": ("table: expected dtype", lambda: apply_rotary(Q, None, changed(TABLE, fine=WIDE.fine))),
    "table of wide rows": (
        "table: expected dense rows",
        lambda: apply_rotary(Q, None, changed(TABLE, coarse=TABLE.coarse.mT.contiguous().mT)),
    ),
    "table with fp32 frequencies": (
        "table: expected freq of torch.float64",
        lambda: apply_rotary(Q, None, changed(TABLE, freq=TABLE.freq.float())),
    ),
    "table with gradients in its rows": (
        "table: expected cosines and sines without gradients",
        lambda: attention(Q, Q, Q, changed(TABLE, coarse=TABLE.coarse.clone().requires_grad_())),
    ),
    "table with half a log scale": (
        "log_scale: expected a train_length",
        lambda: decode_attention(Q, Q, Q, changed(STACK, train_length=None), 3),
    ),
    "sparse q": ("q: expected a dense tensor", lambda: apply_rotary(Q.to_sparse(), None, TABLE)),
    "sparse x": ("x: expected a dense tensor", lambda: qkv_rotary(Q[..., 0, :3].to_sparse(), WEIGHT, TABLE, 2, 2)),
    "sparse frequencies": (
        "freq: expected a dense tensor",
        lambda: RotaryTable.from_frequencies(torch.ones(2, dtype=F).to_sparse(), 3),
    ),
    "negated cache": ("v_cache: can't be written to", lambda: append_kv(ONE, ONE, ONE.clone(), NEGATED, 3)),
    "no config": ("config: expected a ClexConfig", lambda: solve_frequencies(WEIGHT, WEIGHT, TABLE.freq, None)),
    "no optimizer": ("optimizer: expected a torch optimizer", lambda: clip_gradients([])),
    "names that are none": ("names: expected three names", lambda: pack_qkv(torch.nn.Module(), names=3)),
    "t past fp64": ("t: expected", lambda: RotaryTable.from_frequencies(torch.ones(2, dtype=F), 3, t=10**400)),
    "sparse lse": (
        r"lses\[0\]: expected a dense tensor",
        lambda: merge_attention([Q], [Q[..., 0].mT.contiguous().to_sparse()]),
    ),
    "device past all numbers": ("device: expected one that", lambda: ClexRotaryEmbedding(CONFIG, device=10**30)),
    "device that is not there": ("device: expected one that", lambda: ClexRotaryEmbedding(CONFIG, device="cuda:99")),
    "dtype of many": (
        "dtype: expected",
        lambda: RotaryTable.from_frequencies(torch.ones(2, dtype=F), 3, dtype=np.arange(3)),
    ),
    "kind of many": (
        "config: expected rope_parameters",
        lambda: ClexConfig.from_transformers({"rope_scaling": {"type": np.arange(3)}}),
    ),
    "sparse v": ("v: expected a dense tensor", lambda: append_kv(Q, Q.to_sparse(), Q.clone(), Q.clone(), 3)),
    "weights past all addresses": ("hidden_size: expected fewer", lambda: ClexAttention(CONFIG, 2**53, 2)),
    "frequencies past fp64": (
        "up, down: expected weights of finite frequencies",
        lambda: solve_frequencies(
            torch.tensor([[0.0] * 4, [1.0] * 4], dtype=F),
            torch.tensor([[-1e3, 0.0]] * 4, dtype=F),
            torch.tensor([5.0], dtype=F),
            CONFIG,
        ),
    ),
    "unknown device": ("device: expected one that", lambda: ClexRotaryEmbedding(CONFIG, device="none")),
    "cache past memory": ("byte_budget: expected", lambda: ClexRotaryEmbedding(CONFIG, cache_bytes=2**63)),
    "sizes past 64 bits": ("head_dim: expected at most", lambda: ClexConfig(head_dim=2**62, train_length=8)),
    "tokens past fp64": ("train_length: expected at most", lambda: ClexConfig(head_dim=4, train_length=2**53)),
    "tables past all addresses": (
        "length: expected tables that a process can address",
        lambda: RotaryTable.from_frequencies(torch.ones(2, dtype=F), 2**53),
    ),
    "a span past fp64": (
        "length: expected length . max_factor",
        lambda: ClexRotaryEmbedding(CONFIG).sample(2**50),
    ),
    "a part past fp64": (
        "rotary_dim: expected",
        lambda: ClexConfig.from_transformers(
            {
                "head_dim": 16,
                "max_position_embeddings": 8,
                "rope_scaling": {"type": "clex", "max_factor": 2},
                "partial_rotary_factor": 1.7e308,
            }
        ),
    ),
}


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("leading", [Q.shape[:1], ()], ids=["batch", "packed"])
def test_logits_of_a_log_factor_of_zero_are_equal(length, leading):
    """ln 1 = 0: every visible key weighs alike. torch's own attention multiplies hidden logits of -inf by it."""
    tables = changed(STACK, index=torch.tensor([0]))
    x, packed = Q.clone(), {}
    if not leading:
        x, packed = x[0], {"cu_seqlens_q": int32(0, 3), "cu_seqlens_k": int32(0, 3)}
    q, k, v = (x.clone().requires_grad_() for _ in range(3))
    out = attention(q, k, v, tables, is_causal=True, lengths=int32(length), **packed)
    means = x.cumsum(-3) / torch.arange(1.0, 4.0)[:, None, None]
    torch.testing.assert_close(out, means)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("case", FOUND)
def test_what_random_calls_found_is_refused_by_name(case):
    message, call = FOUND[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
