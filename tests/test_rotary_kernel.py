from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tolerance import assert_within_rule

from clex_kernels import reference
from clex_kernels.kernels.launch_tables import ROTARY, ROTARY_BWD
from clex_kernels.kernels.rotary import launch_config, launch_rotary, launch_rotary_bwd

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS32 = torch.finfo(torch.float32).eps
# longer sequences have several tokens in a program.
SHORT_LENGTH = min(ROTARY["sm_80"]["float32"])


class Shape(NamedTuple):
    B: int
    L: int
    H: int
    G: int
    D: int
    R: int

    def __str__(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


SHAPES = [
    # one token of a decoding batch.
    Shape(3, 1, 4, 1, 32, 16),
    # a tail tile, heads and pairs that fill no block.
    Shape(1, SHORT_LENGTH + 3, 3, 1, 20, 10),
    # Phi-2, and NeoX-20B.
    Shape(2, 5, 6, 2, 80, 16),
    Shape(1, SHORT_LENGTH + 1, 4, 4, 96, 12),
    # more heads than a block takes.
    Shape(1, SHORT_LENGTH + 1, 11, 9, 128, 64),
]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    freq: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, tables: int = 1) -> Inputs:
    """Random q [B, L, H, D], k [B, L, G, D] and freq [T, R] from 1 down to 1e-4 rad/token, another decay each."""
    generator = torch.Generator().manual_seed(0)
    B, L, H, G, D, R = shape
    q, k = (torch.randn(B, L, heads, D, generator=generator, dtype=torch.float64) for heads in (H, G))
    decay = torch.linspace(0, -4, R, dtype=torch.float64) * (1 + torch.arange(tables, dtype=torch.float64)[:, None] / 8)
    return Inputs(q.to(device, dtype), k.to(device, dtype), (10**decay).to(device))


def table_rows(freq: Tensor, positions: Tensor, dtype: torch.dtype, amplitude: float = 1.0) -> Tensor:
    """cos and sin [T, rows, 2, R] of positions [T or 1, rows] fp64."""
    angle = positions[..., None] * freq[:, None]
    rows = amplitude * torch.stack((angle.cos(), angle.sin()), dim=-2)
    return rows.to(torch.float64 if dtype == torch.float64 else torch.float32)


def make_tables(freq: Tensor, length: int, dtype: torch.dtype, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factored tables of the positions 0, 1, 2, ..., with as few whole tiles as hold `length`."""
    coarse = torch.arange(0, length, 64, dtype=torch.float64, device=freq.device)[None]
    fine = torch.arange(64, dtype=torch.float64, device=freq.device)[None]
    return table_rows(freq, coarse, dtype, amplitude), table_rows(freq, fine, dtype)


def rotated(x: Tensor, freq: Tensor, positions: Tensor, sign: int = 1, amplitude: float = 1.0) -> Tensor:
    """The reference in fp64. freq [R] or [B, R], positions [L] or [B, L]."""
    cos, sin = reference.tables(freq, positions, amplitude)
    return reference.rotary(x.double(), cos, sign * sin)


def poisoned(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def assert_rotated(actual: Tensor, truth: Tensor) -> None:
    """fp64 to 1e-12; otherwise the rule, the best in this dtype being the truth rounded once from fp32."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
    else:
        assert_within_rule(actual, truth.float().to(actual.dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotates_q_and_k(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, freq = make_inputs(shape, dtype, device)
    tables = make_tables(freq, shape.L + 7, dtype, amplitude=1.2)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *tables, None, None, 7, False)
    positions = torch.arange(shape.L, device=device) + 7
    assert_rotated(q_out, rotated(q, freq[0], positions, amplitude=1.2))
    assert_rotated(k_out, rotated(k, freq[0], positions, amplitude=1.2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conjugate_rotates_back(dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(1, SHORT_LENGTH + 2, 3, 1, 24, 10)
    q, k, freq = make_inputs(shape, dtype, device)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *make_tables(freq, shape.L, dtype), None, None, 0, True)
    positions = torch.arange(shape.L, device=device)
    assert_rotated(q_out, rotated(q, freq[0], positions, sign=-1))
    assert_rotated(k_out, rotated(k, freq[0], positions, sign=-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_gives_the_same_bits(shape: Shape, device: torch.device) -> None:
    q, k, freq = make_inputs(shape, torch.bfloat16, device)
    tables = make_tables(freq, shape.L, torch.bfloat16)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *tables, None, None, 0, False)
    launch_rotary(q, k, q, k, *tables, None, None, 0, False)
    assert torch.equal(q, q_out)
    assert torch.equal(k, k_out)


def test_strided_views_leave_what_lies_between_alone(device: torch.device) -> None:
    shape = Shape(2, 9, 3, 2, 16, 4)
    q, k, freq = make_inputs(shape, torch.float32, device)
    # heads before tokens, as in Hugging Face's layout, and rows with a gap.
    memory = [torch.full((2, heads, 9, 16 + 5), torch.nan, device=device) for heads in (3, 2)]
    q_out, k_out = (rows[..., :16].transpose(1, 2) for rows in memory)
    q_in, k_in = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    launch_rotary(q_in, k_in, q_out, k_out, *make_tables(freq, 9, torch.float32), None, None, 0, False)
    assert_rotated(q_out, rotated(q, freq[0], torch.arange(9, device=device)))
    assert_rotated(k_out, rotated(k, freq[0], torch.arange(9, device=device)))
    assert all(rows[..., 16:].isnan().all() for rows in memory)


def test_strides_of_single_elements_are_ignored(device: torch.device) -> None:
    q, _, freq = make_inputs(Shape(1, 1, 1, 1, 16, 8), torch.float32, device)
    odd = q.as_strided((1, 1, 1, 16), (3, 7, 1, 1))
    q_out = poisoned(q)
    launch_rotary(odd, None, q_out, None, *make_tables(freq, 64, torch.float32), None, None, 5, False)
    assert_rotated(q_out, rotated(q, freq[0], torch.tensor([5], device=device)))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["sequences", "tokens", "heads"])
def test_offsets_past_two_to_the_31_are_reached(dim: int, device: torch.device) -> None:
    # every stride fits 32 bits, the third offset does not; on the CPU pages in between are never touched, hence free.
    memory = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    sizes, strides = [1, 1, 1, 16], [16, 16, 16, 1]
    sizes[dim], strides[dim] = 3, 2**30
    q = memory.as_strided(sizes, strides)
    given, _, freq = make_inputs(Shape(*sizes[:3], 1, 16, 8), torch.bfloat16, device)
    q.copy_(given)
    launch_rotary(q, None, q, None, *make_tables(freq, 64, torch.bfloat16), None, None, 9, False)
    assert_rotated(q, rotated(given, freq[0], torch.arange(sizes[1], device=device) + 9))


def test_without_keys_only_queries_are_rotated(device: torch.device) -> None:
    q, _, freq = make_inputs(Shape(1, 4, 2, 1, 16, 8), torch.float32, device)
    q_out = poisoned(q)
    launch_rotary(q, None, q_out, None, *make_tables(freq, 4, torch.float32), None, None, 0, False)
    assert_rotated(q_out, rotated(q, freq[0], torch.arange(4, device=device)))


def test_wide_heads_take_no_more_threads_than_a_block_has() -> None:
    wide = torch.empty(1, SHORT_LENGTH + 1, 1, 4096, device="meta")
    assert launch_config(ROTARY_BWD, wide, None, 2048, False)["num_warps"] == 16


@pytest.mark.parametrize("shape", [Shape(0, 3, 2, 1, 16, 8), Shape(2, 0, 2, 1, 16, 8)], ids=str)
def test_empty_tensors_launch_nothing(shape: Shape, device: torch.device) -> None:
    q, k, freq = make_inputs(shape, torch.float32, device)
    tables = make_tables(freq, 64, torch.float32)
    launch_rotary(q, k, poisoned(q), poisoned(k), *tables, None, None, 0, False)
    dfreq = launch_rotary_bwd(q, k, q, k, poisoned(q), poisoned(k), *tables, None, None, None, 0)
    assert torch.equal(dfreq, torch.zeros(shape.B, 8, dtype=torch.float64, device=device))


def test_positions_of_a_hundred_thousand_keep_fp32_accuracy(device: torch.device) -> None:
    shape, offset = Shape(1, 2, 2, 1, 32, 16), 100_000
    q, k, freq = make_inputs(shape, torch.float32, device)
    tables = make_tables(freq, offset + 2, torch.float32)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *tables, None, None, offset, False)
    assert_rotated(q_out, rotated(q, freq[0], torch.arange(2, device=device) + offset))


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-sequence"])
def test_position_ids_pick_the_rows(rows: int, device: torch.device) -> None:
    shape = Shape(2, SHORT_LENGTH + 1, 2, 1, 16, 8)
    q, k, freq = make_inputs(shape, torch.float64, device)
    ids = torch.randint(0, 190, (rows, shape.L), generator=torch.Generator().manual_seed(1)).to(device)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *make_tables(freq, 192, torch.float64), None, ids, 2, False)
    positions = (ids + 2).expand(2, -1)
    assert_rotated(q_out, rotated(q, freq[0], positions))
    assert_rotated(k_out, rotated(k, freq[0], positions))


@pytest.mark.parametrize("index", [[2, 0, 2], None], ids=["index", "identity"])
def test_every_sequence_reads_its_own_table(index: list[int] | None, device: torch.device) -> None:
    shape = Shape(3, 4, 2, 1, 16, 8)
    q, k, freq = make_inputs(shape, torch.float64, device, tables=3)
    tables = make_tables(freq, 64, torch.float64)
    chosen = None if index is None else torch.tensor(index, device=device)
    q_out, k_out = poisoned(q), poisoned(k)
    launch_rotary(q, k, q_out, k_out, *tables, chosen, None, 0, False)
    freq = freq if index is None else freq[index]
    assert_rotated(q_out, rotated(q, freq, torch.arange(4, device=device)))
    assert_rotated(k_out, rotated(k, freq, torch.arange(4, device=device)))


def test_rows_and_tables_that_do_not_exist_read_nan(device: torch.device) -> None:
    shape = Shape(3, 4, 2, 1, 20, 8)
    q, k, freq = make_inputs(shape, torch.bfloat16, device, tables=2)
    tables = make_tables(freq, 128, torch.bfloat16)
    ids = torch.tensor([[-1, 127, 128, 2**40]], device=device)
    index = torch.tensor([1, 2, -1], device=device)
    q_out, k_out = torch.zeros_like(q), torch.zeros_like(k)
    launch_rotary(q, k, q_out, k_out, *tables, index, ids, 0, False)
    assert_rotated(q_out[:1, 1:2], rotated(q[:1, 1:2], freq[1], ids[0, 1:2]))
    for out, given in ((q_out, q), (k_out, k)):
        assert out[0, [0, 2, 3], :, :16].isnan().all()
        assert out[1:, ..., :16].isnan().all()
        assert torch.equal(out[..., 16:], given[..., 16:])


def backward(
    inputs: Inputs, dq_out: Tensor, dk_out: Tensor, *given: Tensor | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """launch_rotary_bwd for the saved q and k of `inputs`; returns dq, dk, dfreq."""
    dq, dk = poisoned(dq_out), poisoned(dk_out)
    return dq, dk, launch_rotary_bwd(dq_out, dk_out, inputs.q, inputs.k, dq, dk, *given)


def dfreq_terms(dy: Tensor, y: Tensor, positions: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """dfreq [B, R] in fp64 from saved y and dy, and the sum of its terms' magnitudes. positions [L] or [B, L]."""
    (y0, y1), (dy0, dy1) = (x.double()[..., : 2 * pairs].chunk(2, dim=-1) for x in (y, dy))
    weights = positions.double()[..., None, None]
    first, second = weights * dy1 * y0, weights * dy0 * y1
    return (first - second).sum(dim=(1, 2)), (first.abs() + second.abs()).sum(dim=(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_rotates_back_and_gives_dfreq(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    inputs = make_inputs(shape, dtype, device)
    dq_out, dk_out = (torch.cos(37 * x.double()).to(dtype) for x in inputs[:2])
    tables = make_tables(inputs.freq, shape.L + 3, dtype)
    dq, dk, dfreq = backward(inputs, dq_out, dk_out, *tables, None, None, None, 3)
    positions = torch.arange(shape.L, device=device) + 3
    assert_rotated(dq, rotated(dq_out, inputs.freq[0], positions, sign=-1))
    assert_rotated(dk, rotated(dk_out, inputs.freq[0], positions, sign=-1))
    assert dfreq.dtype == torch.float64
    truth, magnitude = (
        of_q + of_k
        for of_q, of_k in zip(
            dfreq_terms(dq_out, inputs.q, positions, shape.R),
            dfreq_terms(dk_out, inputs.k, positions, shape.R),
            strict=True,
        )
    )
    assert ((dfreq - truth).abs() <= (1e-14 if dtype == torch.float64 else 2 * EPS32) * magnitude).all()


def test_dfreq_is_the_gradient_of_the_rotation(device: torch.device) -> None:
    shape = Shape(2, 6, 3, 1, 20, 8)
    q, k, freq = make_inputs(shape, torch.float64, device)
    wanted = freq.expand(2, -1).clone().requires_grad_()
    positions = torch.arange(6, device=device)
    q_out, k_out = (rotated(x, wanted, positions, amplitude=0.7) for x in (q, k))
    dq_out, dk_out = torch.cos(q), torch.sin(k)
    ((q_out * dq_out).sum() + (k_out * dk_out).sum()).backward()
    tables = make_tables(freq, 64, torch.float64, amplitude=0.7)
    saved = Inputs(q_out.detach(), k_out.detach(), freq)
    *_, dfreq = backward(saved, dq_out, dk_out, *tables, None, None, None, 0)
    torch.testing.assert_close(dfreq, wanted.grad, rtol=1e-12, atol=1e-12)


def test_dfreq_keeps_its_digits_far_from_zero(device: torch.device) -> None:
    shape, offset = Shape(1, SHORT_LENGTH + 6, 2, 1, 16, 8), 100_000
    inputs = make_inputs(shape, torch.float32, device)
    # every second token undoes the one before, so all that remains is the distance of one between the two.
    q, k = (x[:, ::2].repeat_interleave(2, dim=1) for x in inputs[:2])
    sign = torch.tensor([1.0, -1.0], device=device).repeat(shape.L // 2)[:, None, None]
    dq_out, dk_out = sign * torch.cos(q), sign * torch.sin(k)
    ids = torch.arange(shape.L, device=device)[None]
    tables = make_tables(inputs.freq, offset + shape.L, torch.float32)
    *_, dfreq = backward(Inputs(q, k, inputs.freq), dq_out, dk_out, *tables, None, None, ids, offset)
    near = ids[0].double()
    of_q, of_k = (dfreq_terms(dy, y, near, shape.R) for dy, y in ((dq_out, q), (dk_out, k)))
    far_magnitude = (of_q[1] + of_k[1]) / near.mean()
    assert ((dfreq - of_q[0] - of_k[0]).abs() <= 4 * EPS32 * far_magnitude).all()


def test_dfreq_weighs_by_the_tables_own_positions(device: torch.device) -> None:
    shape = Shape(2, SHORT_LENGTH + 2, 2, 1, 16, 8)
    inputs = make_inputs(shape, torch.float64, device, tables=3)
    positions = 50 * torch.rand(3, shape.L, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    positions = positions.sort().values.to(device)
    coarse = table_rows(inputs.freq, positions, torch.float64)
    fine = table_rows(inputs.freq, positions.new_zeros(1, 1), torch.float64)
    index = torch.tensor([2, 1], device=device)
    dq_out, dk_out = torch.cos(inputs.q), torch.sin(inputs.k)
    dq, _, dfreq = backward(inputs, dq_out, dk_out, coarse, fine, positions, index, None, 0)
    assert_rotated(dq, rotated(dq_out, inputs.freq[index], positions[index], sign=-1))
    of_q = dfreq_terms(dq_out, inputs.q, positions[index], shape.R)[0]
    of_k = dfreq_terms(dk_out, inputs.k, positions[index], shape.R)[0]
    torch.testing.assert_close(dfreq, of_q + of_k, rtol=1e-12, atol=1e-10)


def test_backward_in_place_gives_the_same_bits(device: torch.device) -> None:
    shape = Shape(1, SHORT_LENGTH + 1, 3, 1, 24, 8)
    inputs = make_inputs(shape, torch.bfloat16, device)
    tables = make_tables(inputs.freq, 128, torch.bfloat16)
    dq_out, dk_out = torch.cos(inputs.q), torch.sin(inputs.k)
    dq, dk, dfreq = backward(inputs, dq_out, dk_out, *tables, None, None, None, 0)
    again = launch_rotary_bwd(dq_out, dk_out, inputs.q, inputs.k, dq_out, dk_out, *tables, None, None, None, 0)
    assert torch.equal(dq_out, dq)
    assert torch.equal(dk_out, dk)
    assert torch.equal(again, dfreq)
