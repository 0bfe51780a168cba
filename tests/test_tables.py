"""Factored tables against arbitrary precision, on every instruction set, and for transformers' RoPE types."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from clex_kernels.tables import TILE, RotaryTable, _tables_torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def frequencies(pairs: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def exact(freq: Tensor, positions: list[float], amplitude: float = 1.0) -> Tensor:
    """amplitude * (cos, sin)(position * freq) [L, 2, R] in fp64, from 40 digits."""
    rows = torch.empty(len(positions), 2, len(freq), dtype=torch.float64)
    with mpmath.workdps(40):
        for at, position in enumerate(positions):
            for i, value in enumerate(freq.tolist()):
                angle = mpmath.mpf(position) * mpmath.mpf(value)
                rows[at, 0, i] = float(amplitude * mpmath.cos(angle))
                rows[at, 1, i] = float(amplitude * mpmath.sin(angle))
    return rows


def rows_of(coarse: Tensor, fine: Tensor, positions: list[int]) -> Tensor:
    """What a kernel makes of the table at these positions, [L, 2, R], the product in fp64."""
    at = torch.tensor(positions)
    tile = fine.shape[0]
    c0, s0 = coarse.double()[at // tile].unbind(1)
    c1, s1 = fine.double()[at % tile].unbind(1)
    return torch.stack((c0 * c1 - s0 * s1, s0 * c1 + c0 * s1), dim=1)


def max_error(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected).abs().max().item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 2e-15)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("pairs", [1, 12, 16, 33], ids=lambda pairs: f"R{pairs}")
def test_even_positions_are_exact_up_to_a_million(isa: str, pairs: int, dtype: torch.dtype, bound: float):
    freq = frequencies(pairs)
    table = RotaryTable.from_frequencies(freq, length=2**20, dtype=dtype)
    assert table.length == 2**20
    assert table.tile == TILE
    positions = [0, 1, 63, 64, 4095, 4096, 4097, 123_457, 999_999, 2**20 - 1]
    assert max_error(rows_of(table.coarse, table.fine, positions), exact(freq, positions)) <= bound


def test_every_row_of_a_long_fp32_table_is_exact():
    freq = frequencies(64)
    table = RotaryTable.from_frequencies(freq, length=2**20)
    angle = np.outer(np.arange(0, 2**20, TILE, dtype=np.longdouble), freq.numpy().astype(np.longdouble))
    expected = torch.from_numpy(np.stack((np.cos(angle), np.sin(angle)), axis=1).astype(np.float64))
    assert max_error(table.coarse, expected) <= 6e-8


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 6e-8), (torch.float64, 2.5e-16)], ids=["fp32", "fp64"])
def test_any_positions_are_exact_up_to_two_to_the_31(isa: str, dtype: torch.dtype, bound: float):
    freq = frequencies(19)
    positions = [0.0, 0.25, 1.0 / 3.0, 4095.5, 1e6 - 1, 1e6 / 7, 2.0**24 + 1, 1e8 + 0.125, 2.0**31 - 0.5, 2.0**31, -3.5]
    table = RotaryTable.from_frequencies(freq, positions=torch.tensor(positions, dtype=torch.float64), dtype=dtype)
    assert table.tile == 1
    assert table.length == len(positions)
    assert max_error(rows_of(table.coarse, table.fine, list(range(len(positions)))), exact(freq, positions)) <= bound


def test_angles_next_to_multiples_of_a_quarter_turn_are_exact(isa: str):
    # the multiples of pi/2 that doubles come closest to, where a reduction cancels most.
    positions = [1.0, 355.0, 710.0, 573204.0, 6381956970095103.0 * 2.0**-21, 245850922.0, 411557987.0]
    freq = torch.tensor([1.0, math.pi / 2, 0.5], dtype=torch.float64)
    table = RotaryTable.from_frequencies(
        freq, positions=torch.tensor(positions, dtype=torch.float64), dtype=torch.float64
    )
    assert max_error(table.coarse, exact(freq, positions)) <= 2.5e-16


def test_angles_past_the_fast_reduction_are_exact(isa: str):
    freq = torch.tensor([1.0, 1e-3, 7e5, 1e12], dtype=torch.float64)
    positions = [2.0**40 + 1, 2.0**52 + 1, 1e17]
    where = torch.tensor(positions, dtype=torch.float64)
    for amplitude in (1.0, 1.25):
        table = RotaryTable.from_frequencies(freq, positions=where, amplitude=amplitude, dtype=torch.float64)
        assert max_error(table.coarse, exact(freq, positions, amplitude)) <= 4e-16 * amplitude


def test_evenly_spaced_angles_past_the_fast_reduction_are_exact(isa: str):
    freq = torch.tensor([1.0, 3e9], dtype=torch.float64)
    table = RotaryTable.from_frequencies(freq, length=2**16, dtype=torch.float64)
    positions = [1, 4096, 65535]
    assert max_error(rows_of(table.coarse, table.fine, positions), exact(freq, positions)) <= 2e-15


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_a_bad_frequency_gives_nan_rows_and_spoils_no_other(isa: str, poison: float):
    freq = frequencies(9)
    freq[4] = poison
    others = [i for i in range(9) if i != 4]
    sampled = torch.tensor([0.5, 1e6], dtype=torch.float64)
    for where in ((5000, None), (0, sampled[None])):
        coarse, _ = torch.ops.clex.tables(freq[None], *where, 1.0, torch.float64)
        assert coarse[..., 4].isnan().all()
        clean, _ = torch.ops.clex.tables(freq[None, others], *where, 1.0, torch.float64)
        # which pairs share a vector changes nothing but the rounding of the last bit.
        torch.testing.assert_close(coarse[..., others], clean, rtol=0, atol=4e-16)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 4096, 4097, 10_000], ids=lambda length: f"L{length}")
def test_a_longer_table_begins_with_the_shorter_one(length: int):
    freq = frequencies(8)
    short = RotaryTable.from_frequencies(freq, length=length)
    long = RotaryTable.from_frequencies(freq, length=20_000)
    assert short.coarse.shape == (-(-length // TILE), 2, 8)
    assert torch.equal(short.coarse, long.coarse[: short.coarse.shape[0]])
    assert torch.equal(short.fine, long.fine)


def test_the_number_of_threads_changes_no_bit():
    freq = frequencies(8).expand(3, 8) * torch.tensor([[1.0], [0.7], [0.2]], dtype=torch.float64)
    threads = torch.get_num_threads()
    tables = []
    for count in (1, 2):
        torch.set_num_threads(count)
        tables.append(torch.ops.clex.tables(freq, 200_000, None, 1.0, torch.float32))
    torch.set_num_threads(threads)
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])


def test_amplitude_scales_coarse_rows_alone():
    freq = frequencies(8)
    positions = [0, 77, 5000, 99_999]
    table = RotaryTable.from_frequencies(freq, length=100_000, amplitude=1.3466, dtype=torch.float64)
    plain = RotaryTable.from_frequencies(freq, length=100_000, dtype=torch.float64)
    assert table.amplitude == 1.3466
    assert torch.equal(table.fine, plain.fine)
    assert max_error(rows_of(table.coarse, table.fine, positions), exact(freq, positions, 1.3466)) <= 3e-15


def test_integer_positions_are_taken_as_numbers():
    freq = frequencies(4)
    whole = RotaryTable.from_frequencies(freq, positions=torch.tensor([3, 1, 2**31 - 1]))
    real = RotaryTable.from_frequencies(freq, positions=torch.tensor([3.0, 1.0, 2**31 - 1], dtype=torch.float64))
    assert torch.equal(whole.coarse, real.coarse)
    assert whole.positions.dtype == torch.float64


def test_strided_frequencies_and_positions_are_read_right():
    freq, positions = frequencies(8), torch.rand(10, dtype=torch.float64) * 1e5
    strided = RotaryTable.from_frequencies(freq[::2], positions=positions[::3])
    packed = RotaryTable.from_frequencies(freq[::2].clone(), positions=positions[::3].clone())
    assert torch.equal(strided.coarse, packed.coarse)


def test_plain_torch_tables_agree_with_the_op():
    freq = torch.stack((frequencies(6), frequencies(6, 500.0)))
    positions = torch.rand(2, 11, dtype=torch.float64) * 1e6
    for at in (None, positions, positions[:1]):
        args = (freq, 1000, at, 1.25, torch.float64)
        for got, expected in zip(_tables_torch(*args), torch.ops.clex.tables(*args), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


ROPE_TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
    "longrope": {
        "rope_type": "longrope",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "short_factor": [1.0 + i / 40 for i in range(16)],
        "long_factor": [1.5 + i for i in range(16)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 2048,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("partial", [1.0, 0.5], ids=["whole", "partial"])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_tables_serve_the_rope_types_of_transformers(rope_type: str, partial: float):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=int(4 * partial) or 1,
        head_dim=int(32 / partial),
        max_position_embeddings=16384,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": partial, **ROPE_TYPES[rope_type]},
    )
    rope = LlamaRotaryEmbedding(config)
    # the short and long sets of longrope, dynamic's growth, and all others' one set.
    for length in (257, 20_000):
        cos, sin = rope(torch.zeros(1), torch.arange(length)[None])
        freq, amplitude = rope.inv_freq.double(), rope.attention_scaling
        table = RotaryTable.from_frequencies(freq, length=length, amplitude=amplitude)
        pairs = cos.shape[-1] // 2
        assert table.rotary_dim == cos.shape[-1]
        assert (rope_type in ("yarn", "longrope")) == (table.amplitude > 1)

        positions = list(range(0, length, 51))
        got = rows_of(table.coarse, table.fine, positions)
        assert max_error(got, exact(freq, positions, amplitude)) <= 3e-7 * amplitude
        # their angles are products in fp32.
        theirs = torch.stack((cos[0, positions, :pairs], sin[0, positions, :pairs]), dim=1)
        assert max_error(got, theirs.double()) <= 2e-7 * length


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 6e-8), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
def test_tables_on_a_gpu_agree_with_the_cpu(dtype: torch.dtype, bound: float):
    freq = torch.stack((frequencies(24), frequencies(24, 500.0)))
    for positions in (None, torch.rand(2, 301, dtype=torch.float64) * 1e6, torch.rand(1, 301, dtype=torch.float64)):
        on_gpu = None if positions is None else positions.cuda()
        expected = torch.ops.clex.tables(freq, 10_000, positions, 1.5, dtype)
        got = torch.ops.clex.tables(freq.cuda(), 10_000, on_gpu, 1.5, dtype)
        for ours, theirs in zip(got, expected, strict=True):
            assert max_error(ours.cpu(), theirs.double()) <= 1.5 * bound + torch.finfo(dtype).eps
