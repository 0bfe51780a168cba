import pytest
import torch
from tolerance import assert_within_rule
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

from interpreter import interpreted
from liger_kernel.ops.rope import rope_backward, rope_forward

from benchmarks.compiled.cases import CASES
from benchmarks.compiled.compiling import TARGETS, compiling
from benchmarks.compiled.document import REPORTED
from benchmarks.compiled.peers import (
    PEERS,
    eager_figures,
    liger_figures,
    loop_figures,
    rotate_in_fp32,
)
from benchmarks.compiled.traffic import Bytes
from benchmarks.compiled.tutorial_attention import launch_tutorial_attention
from clex_kernels import reference

FREQ = 10 ** torch.linspace(0, -4, 16, dtype=torch.float64)


def test_peers_are_compared_with_what_the_report_counts() -> None:
    for name, peer in PEERS.items():
        assert name == peer.case.name
        assert name not in CASES
        assert peer.ours in REPORTED
        if peer.case.plain is not None:
            assert CASES[peer.ours].plain == PEERS[peer.case.plain].ours, "rotary is added to the same work"


@pytest.mark.parametrize("target", TARGETS)
def test_peers_compile_for_every_target_within_its_shared_memory(target: str) -> None:
    for peer in PEERS.values():
        with compiling(target) as compiled:
            peer.case.launch()
        ((kernel, _),) = compiled
        assert kernel.metadata.name == peer.case.kernel
        assert kernel.metadata.shared <= TARGETS[target].shared_bytes


def rotary_inputs(dtype: torch.dtype, length: int = 5) -> tuple[Tensor, ...]:
    """q [B, H, L, D] and k in memory as [B, L, H, D], cosines and sines [1, L, D] in fp64."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, length, heads, 32, generator=generator, dtype=torch.float64) for heads in (6, 2))
    cos, sin = reference.tables(FREQ, torch.arange(length) + 3)
    return *(x.to(dtype).transpose(1, 2) for x in (q, k)), cos[None], sin[None]


@pytest.mark.parametrize("tables", [torch.float32, torch.float64])
def test_liger_rotates_q_and_k_in_place_and_back(tables: torch.dtype) -> None:
    q, k, cos, sin = rotary_inputs(tables)
    before = [x.clone() for x in (q, k)]
    with interpreted():
        rotated = rope_forward(q, k, cos.to(tables), sin.to(tables))[:2]
        for x, y, raw in zip((q, k), rotated, before, strict=True):
            assert x.data_ptr() == y.data_ptr()
            truth = reference.rotary(raw.double().transpose(1, 2), cos, sin).transpose(1, 2)
            torch.testing.assert_close(y, truth.to(tables))
        for y, raw in zip(rope_backward(*rotated, cos.to(tables), sin.to(tables)), before, strict=True):
            torch.testing.assert_close(y, raw)


def test_the_eager_form_in_fp32_rotates() -> None:
    q, k, cos, sin = rotary_inputs(torch.bfloat16)
    for y, x in zip(rotate_in_fp32(q, k, cos.float(), sin.float()), (q, k), strict=True):
        truth = reference.rotary(x.double().transpose(1, 2), cos, sin).transpose(1, 2)
        assert_within_rule(y, truth.bfloat16(), truth)


# B, H, G, L, S: tails of both blocks, whole blocks alone, keys before the queries, one query.
CALLS = [(1, 2, 1, 130, 130), (1, 1, 1, 128, 128), (2, 4, 2, 37, 101), (1, 2, 2, 1, 70)]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rotates", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_tutorials_attention_is_right(
    call: tuple[int, ...], dtype: torch.dtype, rotates: bool, is_causal: bool
) -> None:
    B, H, G, L, S = call
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, H, L, 32), (B, G, S, 32), (B, G, S, 32))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = reference.tables(FREQ, torch.arange(S))
    out, lse = torch.full_like(q, torch.nan), torch.full((B, H, L), torch.nan, dtype=wide)
    rows = (x[:, :16].to(wide).contiguous() for x in (cos, sin))
    with interpreted():
        launch_tutorial_attention(q, k, v, *rows, out, lse, 0.3, is_causal, rotates)

    def expected(into: torch.dtype) -> tuple[Tensor, Tensor]:
        operands = [x.to(into).transpose(1, 2) for x in (q, k, v)]
        if rotates:
            operands[0] = reference.rotary(operands[0], cos[S - L :], sin[S - L :])
            operands[1] = reference.rotary(operands[1], cos, sin)
        mask = reference.visible(L, S, is_causal=True) if is_causal else None
        result, logarithms = reference.attention(*operands, mask, 0.3)
        return result.transpose(1, 2), logarithms

    truth, true_lse = expected(torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-10)
    else:
        in_dtype, lse_in_dtype = expected(dtype)
        assert_within_rule(out, in_dtype, truth)
        assert_within_rule(lse, lse_in_dtype.to(wide), true_lse)


def test_liger_moves_each_element_once_and_half_of_the_tables_rows() -> None:
    half, single = liger_figures()
    assert half.parts == {"elements": Bytes(4, 4), "table": Bytes(0.05, 0.05), "other": Bytes(0, 0)}
    assert single.parts["table"] == Bytes(0.1, 0.1)


def test_eager_rotation_moves_an_element_by_every_operator() -> None:
    half, single = eager_figures(tokens=8)
    # q and k, of 40 heads in all, are multiplied twice, each time by a table's row of 256 bytes.
    expected = {"mul": 2 * 4 + 4 * 256 / (40 * 128), "neg": 2, "cat": 4, "add": 6}
    assert half.parts.keys() == expected.keys()
    for operator, moved in expected.items():
        assert half.parts[operator].memory == pytest.approx(moved)
    # twice as much, and bf16 to fp32 and back.
    assert single.total.memory == pytest.approx(2 * half.total.memory + 2 * 6)


def test_rotary_in_the_loop_doubles_the_bytes_of_a_key() -> None:
    ours, tutorial = loop_figures()
    assert ours.parts == {"keys and values": Bytes(512, 512), "table": Bytes(0, 0), "other": Bytes(0, 0)}
    assert tutorial.parts == {"keys and values": Bytes(512, 512), "table": Bytes(512, 512), "other": Bytes(0, 0)}
