"""Which engine serves a call of attention, and torch's attention as one of them."""

from typing import NamedTuple

import pytest
import torch
from attention_calls import Call, Given, assert_same, expected, make, make_table, outputs_and_gradients
from torch import Tensor

from clex_kernels.attention import attention
from clex_kernels.attention_checks import check_operands
from clex_kernels.attention_engines import choose_engine, sdpa_refusal
from clex_kernels.attention_terms import Rule, Tokens

L = 9


def heads(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, *size, 16, generator=generator) for size in ((queries, 4), (keys, 2), (keys, 2))]


SDPA = {
    "square": Call(options={"is_causal": True, "scale": 0.3}),
    "square without order": Call(queries=30, keys=30, g=4),
    "more keys": Call(queries=20, options={"is_causal": True}),
    "more keys without order": Call(queries=20, options={"q_offset": 3, "k_offset": 1}),
    "one query": Call(queries=1, options={"is_causal": True, "q_offset": 40, "k_offset": 4}),
    "sampled": Call(settings={"positions": 1}, options={"is_causal": True}),
    "mixed t": Call(tables=4, options={"is_causal": True, "lengths": [60, 12]}),
    "queries that come first": Call(queries=45, options={"k_offset": 100}),
    "q rotated before": Call(queries=9, options={"is_causal": True, "rotated": "q"}),
    "k rotated before": Call(options={"is_causal": True, "rotated": "k"}),
    "both rotated before": Call(options={"is_causal": True, "rotated": "qk"}),
}


@pytest.mark.parametrize("call", SDPA.values(), ids=SDPA.keys())
def test_torch_s_attention_as_the_backend_gives_the_same(call: Call) -> None:
    given = make(call)
    by_operator, by_sdpa = (
        outputs_and_gradients(attention, call, given, backend=backend) for backend in ("auto", "sdpa")
    )
    assert_same(by_sdpa, by_operator)
    assert by_sdpa["out"].stride(-1) == 1


def test_torch_s_attention_keeps_dfreq_exact_far_out() -> None:
    errors = []
    for far in (0, 100_000):
        call = Call(settings={"positions": far + torch.arange(37.0).double()[None]}, options={"is_causal": True})
        given = make(call, torch.float32)
        truth = outputs_and_gradients(expected, call, Given(*(x.double() for x in given)))["dfreq"]
        dfreq = outputs_and_gradients(attention, call, given, torch.float32, backend="sdpa")["dfreq"]
        errors.append((dfreq - truth).abs().max() / truth.abs().max())
    assert errors[1] <= 2 * errors[0] + 1e-6


def refusal(rule: Rule, tokens: Tokens | None = None, queries: int = L, keys: int = L, lse: bool = False) -> str | None:
    operands = check_operands(*heads(queries, keys), None, None)
    return sdpa_refusal(operands, tokens or Tokens(), rule, lse)


def test_torch_s_attention_is_refused_what_it_lacks() -> None:
    causal = Rule(1.0, is_causal=True)
    starts = torch.tensor([0, 1])
    assert refusal(causal) is None
    assert refusal(causal, keys=2 * L) is None
    assert refusal(Rule(1.0), Tokens(q_offset=5)) is None
    assert refusal(causal, Tokens(q_offset=9, k_offset=4), keys=L + 5) is None
    assert "do not end" in refusal(causal, Tokens(q_offset=8, k_offset=4), keys=L + 5)
    assert "window" in refusal(Rule(1.0, window=3))
    assert "softcap" in refusal(Rule(1.0, softcap=3.0))
    assert "log_scale" in refusal(Rule(1.0, log_base=2.0))
    assert "return_lse" in refusal(causal, lse=True)
    assert "kv_start" in refusal(causal, Tokens(kv_start=starts))
    assert "differ between sequences" in refusal(causal, Tokens(k_offsets=starts))
    assert "see no key" in refusal(causal, queries=2 * L)
    assert "no queries" in refusal(causal, queries=0)
    bounds = torch.tensor([0, 4, L])
    packed = check_operands(*(x[:1] for x in heads(L, L)), bounds, bounds)
    assert "cu_seqlens" in sdpa_refusal(packed, Tokens(bounds, bounds), causal, False)


class Engine(NamedTuple):
    """A GPU, a call, and what "auto" takes for it."""

    capability: tuple[int, int]
    engine: str
    dtype: torch.dtype = torch.bfloat16
    q_heads: int = 4
    d: int = 64
    keys: int = L
    reason: str | None = None
    hip: str | None = None


ENGINES = {
    "A100": Engine((8, 0), "triton"),
    "H100": Engine((9, 0), "sdpa"),
    "RTX 5090": Engine((12, 0), "sdpa", torch.float16),
    "H100, heads that few kernels serve": Engine((9, 0), "triton", d=256),
    "H100, refused": Engine((9, 0), "triton", reason="softcap"),
    "L4, fp32": Engine((8, 9), "sdpa", torch.float32, q_heads=2),
    "L4, fp32, grouped heads": Engine((8, 9), "triton", torch.float32),
    "L4, fp32, causal after other keys": Engine((8, 9), "triton", torch.float32, q_heads=2, keys=2 * L),
    "MI300": Engine((9, 4), "triton", hip="7.0"),
}


@pytest.mark.parametrize("case", ENGINES.values(), ids=ENGINES.keys())
def test_the_engine_is_chosen_by_what_is_known_of_it(case: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(torch.version, "hip", case.hip)
    q = torch.empty(1, L, case.q_heads, case.d, dtype=case.dtype)
    k = torch.empty(1, case.keys, 2, case.d, dtype=case.dtype)
    operands = check_operands(q, k, k, None, None)
    assert choose_engine(operands, Rule(1.0, is_causal=True), case.reason) == case.engine


def test_compiled_code_leaves_later_queries_to_the_operator() -> None:
    torch._dynamo.reset()
    q, k, v = heads(L, 2 * L)
    with pytest.raises(Exception, match="in compiled code"):
        torch.compile(attention, backend="eager", fullgraph=True)(
            q, k, v, make_table(Call(), make(Call()).freq, torch.float32), True, backend="sdpa"
        )
