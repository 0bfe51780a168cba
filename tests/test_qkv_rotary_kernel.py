from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("triton")

from tolerance import assert_within_rule

from clex_kernels import reference
from clex_kernels.attention_terms import Tables
from clex_kernels.kernels import qkv_rotary
from clex_kernels.kernels.launch_tables import QKV_ROTARY, ProjectionTile
from clex_kernels.kernels.qkv_rotary import launch_qkv_rotary


class Shape(NamedTuple):
    B: int
    L: int
    C: int
    H: int
    G: int
    D: int
    R: int

    def __str__(self) -> str:
        return "-".join(f"{letter}{size}" for letter, size in self._asdict().items())


SHAPES = [
    # one token.
    Shape(1, 1, 128, 2, 1, 64, 32),
    # Phi-2: heads that fill no tile, C that fills no block, and a last block of rows.
    Shape(2, 35, 72, 3, 1, 80, 16),
    # NeoX-20B.
    Shape(1, 20, 64, 2, 2, 96, 12),
    # sequences that share a block of rows, heads wider than a tile.
    Shape(3, 5, 64, 2, 1, 128, 64),
    # whole heads in a part of a tile.
    Shape(1, 3, 64, 5, 1, 16, 8),
    # an odd tail, of which one column is alone.
    Shape(1, 17, 40, 2, 1, 25, 9),
]


class Inputs(NamedTuple):
    """x [B, L, C], weights and biases of q, k and v, freq [T, R] from 1 down to 1e-4 rad/token."""

    x: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor]
    freq: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: torch.device, tables: int = 1) -> "Inputs":
        generator = torch.Generator().manual_seed(0)
        B, L, C, H, G, D, R = shape

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(device, dtype)

        decay = torch.linspace(0, -4, R, dtype=torch.float64) * (
            1 + torch.arange(tables, dtype=torch.float64)[:, None] / 8
        )
        weights, biases = (tuple(random(heads * D, *size) for heads in (H, G, G)) for size in ((C,), ()))
        return cls(random(B, L, C), weights, biases, (10**decay).to(device))

    def projected(self, dims: int, dtype: torch.dtype | None = None, bias: bool = False) -> list[Tensor]:
        """q, k, v [B, L, heads, D] by torch, before any rotation; in fp64 unless a dtype is given."""
        dtype = dtype or torch.float64
        return [
            functional.linear(self.x.to(dtype), w.to(dtype), b.to(dtype) if bias else None).unflatten(-1, (-1, dims))
            for w, b in zip(self.weights, self.biases, strict=True)
        ]


def make_tables(freq: Tensor, length: int, dtype: torch.dtype, index: Tensor | None = None) -> Tables:
    """Tables of positions 0, 1, 2, ..., with as few whole tiles of 64 as hold `length`."""
    positions = (64.0 * torch.arange(-(-length // 64)), torch.arange(64.0))
    rows = (torch.stack(reference.tables(freq[:, None], p.to(freq)[None]), dim=-2).squeeze(1) for p in positions)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    coarse, fine = (row[..., : freq.shape[1]].to(kept).contiguous() for row in rows)
    return Tables(coarse, fine, None, index)


def rotated(y: Tensor, freq: Tensor, positions: Tensor) -> Tensor:
    """freq [R] or [B, R], positions [L] or [B, L]."""
    return reference.rotary(y, *reference.tables(freq, positions))


def assert_results(
    outs: tuple[Tensor, Tensor, Tensor],
    inputs: Inputs,
    positions: Tensor,
    freq: Tensor | None = None,
    bias: bool = False,
) -> None:
    """outs = q and k rotated, and v, in fp64, by freq [R] or [B, R] (None: the only ones)."""
    freq = inputs.freq[0] if freq is None else freq
    q, k, v = inputs.projected(outs[0].shape[3], bias=bias)
    assert_near(outs[0], rotated(q, freq, positions))
    assert_near(outs[1], rotated(k, freq, positions))
    assert_near(outs[2], v)


def poisoned(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v full of NaN."""
    sizes = ((shape.B, shape.L, heads, shape.D) for heads in (shape.H, shape.G, shape.G))
    return tuple(torch.full(size, torch.nan, dtype=dtype, device=device) for size in sizes)


def assert_near(actual: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projects_and_rotates_q_and_k(shape: Shape, device: torch.device) -> None:
    inputs = Inputs.random(shape, torch.float64, device)
    outs = poisoned(shape, torch.float64, device)
    tables = make_tables(inputs.freq, shape.L + 7, torch.float64)
    launch_qkv_rotary(inputs.x, inputs.weights, inputs.biases, outs, None, tables, None, 7)
    assert_results(outs, inputs, torch.arange(shape.L, device=device) + 7, bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_errs_no_more_than_torch(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    inputs = Inputs.random(shape, dtype, device)
    outs = poisoned(shape, dtype, device)
    tables = make_tables(inputs.freq, shape.L, dtype)
    launch_qkv_rotary(inputs.x, inputs.weights, inputs.biases, outs, None, tables, None, 0)
    positions = torch.arange(shape.L, device=device)
    expected = zip(inputs.projected(shape.D, dtype, bias=True), inputs.projected(shape.D, bias=True), strict=True)
    for i, (in_dtype, truth) in enumerate(expected):
        if i < 2:
            in_dtype, truth = (rotated(y, inputs.freq[0], positions) for y in (in_dtype, truth))
        assert_within_rule(outs[i], in_dtype, truth)


def every_tile() -> dict[ProjectionTile, int]:
    """The tiles of all tables, but for warps and stages, and a number of rows that each serves."""
    found: dict[ProjectionTile, int] = {}
    for tiles in (tiles for kinds in QKV_ROTARY.values() for tiles in kinds.values()):
        for fewer, tile in zip((0, *tiles), tiles.values(), strict=False):
            found.setdefault(tile._replace(num_warps=4, num_stages=1), fewer + 2)
    return found


@pytest.mark.parametrize(("tile", "rows"), every_tile().items())
def test_every_tile_gives_the_same(
    tile: ProjectionTile, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, rows // 2, 32, 3, 1, 64, 20)
    inputs = Inputs.random(shape, torch.float64, device)
    outs = poisoned(shape, torch.float64, device)
    tables = make_tables(inputs.freq, shape.L, torch.float64)
    monkeypatch.setattr(qkv_rotary, "find_entry", lambda *_: tile)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, None, 0)
    assert_results(outs, inputs, torch.arange(shape.L, device=device))


def test_more_rows_than_a_group_has_are_all_served(device: torch.device) -> None:
    shape = Shape(1, 9 * 128 + 1, 16, 2, 1, 32, 16)
    inputs = Inputs.random(shape, torch.float64, device)
    outs = poisoned(shape, torch.float64, device)
    tables = make_tables(inputs.freq, shape.L, torch.float64)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, None, 0)
    assert_results(outs, inputs, torch.arange(shape.L, device=device))


def test_keys_are_kept_raw_rotated_or_both(device: torch.device) -> None:
    shape = SHAPES[1]
    inputs = Inputs.random(shape, torch.float64, device)
    tables = make_tables(inputs.freq, shape.L, torch.float64)
    rotates = {"plain": (False, False), "raw": (True, False), "rotated": (False, True), "both": (True, False)}
    outs = {}
    for name, rotate in rotates.items():
        q, k, v = poisoned(shape, torch.float64, device)
        k_rotated = torch.full_like(k, torch.nan) if name == "both" else None
        launch_qkv_rotary(inputs.x, inputs.weights, None, (q, k, v), k_rotated, tables, None, 0, rotate)
        outs[name] = {"q": q, "k": k, "v": v, "k_rotated": k_rotated}
    for actual, truth in zip(outs["plain"].values(), inputs.projected(shape.D), strict=False):
        assert_near(actual, truth)
    positions = torch.arange(shape.L, device=device)
    assert_near(outs["raw"]["q"], rotated(outs["plain"]["q"], inputs.freq[0], positions))
    assert_near(outs["rotated"]["k"], rotated(outs["plain"]["k"], inputs.freq[0], positions))
    assert torch.equal(outs["both"]["k_rotated"], outs["rotated"]["k"])
    for name, like in (("raw", "plain"), ("both", "plain")):
        assert torch.equal(outs[name]["k"], outs[like]["k"])
    assert torch.equal(outs["both"]["q"], outs["raw"]["q"])
    assert torch.equal(outs["rotated"]["q"], outs["plain"]["q"])
    assert all(torch.equal(out["v"], outs["plain"]["v"]) for out in outs.values())


def test_packed_weights_and_outputs_give_the_same_bits(device: torch.device) -> None:
    shape = SHAPES[1]
    inputs = Inputs.random(shape, torch.bfloat16, device)
    tables = make_tables(inputs.freq, shape.L, torch.bfloat16)
    outs = poisoned(shape, torch.bfloat16, device)
    launch_qkv_rotary(inputs.x, inputs.weights, inputs.biases, outs, None, tables, None, 0)
    heads = (shape.H, shape.G, shape.G)
    packed = torch.full((shape.B, shape.L, sum(heads), shape.D + 8), torch.nan, dtype=torch.bfloat16, device=device)
    columns = [n * shape.D for n in heads]
    weights, biases = (torch.cat(parts).split(columns) for parts in (inputs.weights, inputs.biases))
    launch_qkv_rotary(inputs.x, weights, biases, packed[..., : shape.D].split(heads, dim=2), None, tables, None, 0)
    assert torch.equal(packed[..., : shape.D], torch.cat(outs, dim=2))
    assert packed[..., shape.D :].isnan().all()


def test_strided_rows_are_read_and_nothing_between_them(device: torch.device) -> None:
    shape = Shape(2, 9, 40, 2, 1, 16, 4)
    inputs = Inputs.random(shape, torch.float64, device)
    # tokens before sequences, rows with a gap, of x as of q, and heads before tokens.
    memory = torch.full((shape.L + 2, shape.B, shape.C + 3), torch.nan, dtype=torch.float64, device=device)
    x = memory[1:-1, :, : shape.C].transpose(0, 1)
    x.copy_(inputs.x)
    _, k, v = poisoned(shape, torch.float64, device)
    q_memory = torch.full((shape.B, shape.H, shape.L + 1, shape.D + 5), torch.nan, dtype=torch.float64, device=device)
    q = q_memory[:, :, 1:, : shape.D].transpose(1, 2)
    gaps = zip(inputs.weights, (6, 0, 3), strict=True)
    weights = tuple(functional.pad(w, (0, gap), value=torch.nan)[:, : shape.C] for w, gap in gaps)
    tables = make_tables(inputs.freq, shape.L, torch.float64)
    launch_qkv_rotary(x, weights, None, (q, k, v), None, tables, None, 0)
    assert_results((q, k, v), inputs, torch.arange(shape.L, device=device))
    assert q_memory[:, :, 0].isnan().all()
    assert q_memory[..., shape.D :].isnan().all()


def test_offsets_past_two_to_the_31_are_reached(device: torch.device) -> None:
    # every stride fits 32 bits, the third token's and head's offset do not; pages in between are never touched.
    shape = Shape(1, 3, 32, 3, 1, 16, 8)
    inputs = Inputs.random(shape, torch.bfloat16, device)
    x, q = (torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, q = x.as_strided((1, 3, 32), (32, 2**30, 1)), q.as_strided((1, 3, 3, 16), (48, 16, 2**30, 1))
    x.copy_(inputs.x)
    outs = poisoned(shape, torch.bfloat16, device)
    tables = make_tables(inputs.freq, shape.L, torch.bfloat16)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, None, 0)
    launch_qkv_rotary(x, inputs.weights, None, (q, *outs[1:]), None, tables, None, 0)
    assert torch.equal(q, outs[0])


@pytest.mark.parametrize("index", [[2, 0, 2], None], ids=["index", "identity"])
def test_rows_of_a_block_read_the_tables_of_their_sequences(index: list[int] | None, device: torch.device) -> None:
    shape = SHAPES[3]
    inputs = Inputs.random(shape, torch.float64, device, tables=3)
    chosen = None if index is None else torch.tensor(index, device=device)
    outs = poisoned(shape, torch.float64, device)
    tables = make_tables(inputs.freq, 64, torch.float64, chosen)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, None, 0)
    freq = inputs.freq if index is None else inputs.freq[index]
    assert_results(outs, inputs, torch.arange(shape.L, device=device), freq)


@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-sequence"])
def test_position_ids_pick_the_rows(rows: int, device: torch.device) -> None:
    shape = Shape(2, 21, 32, 2, 1, 16, 8)
    inputs = Inputs.random(shape, torch.float64, device)
    ids = torch.randint(0, 190, (rows, shape.L), generator=torch.Generator().manual_seed(1)).to(device)
    outs = poisoned(shape, torch.float64, device)
    tables = make_tables(inputs.freq, 192, torch.float64)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, ids, 2)
    assert_results(outs, inputs, (ids + 2).expand(2, -1))


def test_rows_and_tables_that_do_not_exist_read_nan(device: torch.device) -> None:
    shape = Shape(3, 4, 32, 2, 1, 20, 8)
    inputs = Inputs.random(shape, torch.float64, device, tables=2)
    ids = torch.tensor([[-1, 127, 128, 2**40]], device=device)
    tables = make_tables(inputs.freq, 128, torch.float64, torch.tensor([1, 2, -1], device=device))
    outs = tuple(torch.zeros_like(out) for out in poisoned(shape, torch.float64, device))
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, tables, ids, 0)
    truth = inputs.projected(shape.D)
    assert_near(outs[2], truth[2])
    for out, y in zip(outs[:2], truth[:2], strict=True):
        assert_near(out[:1, 1:2], rotated(y[:1, 1:2], inputs.freq[1], ids[0, 1:2]))
        assert out[0, [0, 2, 3], :, :16].isnan().all()
        assert out[1:, ..., :16].isnan().all()
        assert_near(out[..., 16:], y[..., 16:])


def test_a_table_of_given_positions_is_read_row_by_row(device: torch.device) -> None:
    shape = Shape(1, 6, 32, 1, 1, 16, 8)
    inputs = Inputs.random(shape, torch.float64, device)
    positions = 50 * torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    cos, sin = (y[..., : shape.R] for y in reference.tables(inputs.freq[0], positions))
    coarse = torch.stack((cos, sin), dim=-2)[None]
    fine = torch.stack((torch.ones_like(inputs.freq), torch.zeros_like(inputs.freq)), dim=-2)[None]
    outs = poisoned(shape, torch.float64, device)
    launch_qkv_rotary(inputs.x, inputs.weights, None, outs, None, Tables(coarse, fine), None, 2)
    assert_results(outs, inputs, positions[2:])


@pytest.mark.parametrize("shape", [Shape(0, 3, 32, 2, 1, 16, 8), Shape(2, 0, 32, 2, 1, 16, 8)], ids=str)
def test_without_rows_nothing_is_launched(shape: Shape, device: torch.device) -> None:
    inputs = Inputs.random(shape, torch.float32, device)
    tables = make_tables(inputs.freq, 64, torch.float32)
    launch_qkv_rotary(inputs.x, inputs.weights, None, poisoned(shape, torch.float32, device), None, tables, None, 0)
