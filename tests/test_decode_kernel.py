"""The Triton kernels of decoding, by way of the operator's function, against the reference."""

import math
from typing import Any

import decode_cases
import pytest
import torch
from decode_cases import CASES, EMPTY, Case, Step, arguments, assert_close, assert_exact, expected, make_inputs
from torch import Tensor

pytest.importorskip("triton")

from clex_kernels.attention_terms import Tables, Tokens
from clex_kernels.decode import _decode_cuda
from clex_kernels.kernels import decode, decode_combine
from clex_kernels.kernels.launch_tables import DECODE, Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# beyond the CPU's cases, what rows, tiles and ranges make special.
TILED = {
    "groups of four": Case(queries=5, h=8, g=2, kv_end=(130, 64)),
    "more rows than a block": Case(queries=16, h=7, g=1, kv_end=(200, 70), kv_start=(60, 3)),
    "many ranges": Case(kv_end=(1500, 1024, 65, 0), slots=1600, h=2, g=1),
    "ranges in a window": Case(kv_end=(1300, 700), slots=1300, queries=3, h=2, g=1, rule={"window": 600}),
    "new tokens across two ranges": Case(kv_end=(130, 258), slots=258, queries=5, h=2, g=1),
    "pages of 128": Case(page=128, kv_end=(700, 130), kv_start=(140, 0), queries=5, h=2, g=1),
    "pages of 16, many": Case(page=16, kv_end=(700, 130), kv_start=(140, 0), rule={"window": 333}),
    "pages of 1": Case(page=1, kv_end=(150, 37), kv_start=(70, 0)),
    "pages of 24": Case(page=24, kv_end=(300, 37), kv_start=(70, 0), queries=3, h=2, g=1),
    "pages of 80": Case(page=80, kv_end=(300, 37), rule={"window": 90}),
    "quarters of a tile": Case(d=256, r=32, h=2, g=1, kv_end=(200, 64), kv_start=(53, 0), rule={"window": 90}),
    "quarters of a tile, pages of 16": Case(d=256, r=32, h=2, g=1, page=16, kv_end=(200, 64), kv_start=(53, 0)),
    "partly rotated, D 128": Case(d=128, r=16, h=2, g=1),
    "partly rotated, D 256": Case(d=256, r=32, h=2, g=1),
}
ALL = CASES | TILED
FEW = ["more rows than a block", "pages of 48", "softcap and window", "tables by length", "D 96, NeoX-20B", "D 256"]
FEW += ["many ranges", "only q", "only k", "nothing rotated"]


def run(case: Case, step: Step, device: str, **settings: Any) -> list[Tensor]:
    given = Step(*(None if x is None else x.to(device) for x in step))
    out, lse = _decode_cuda(*arguments(case, given, **settings))
    assert [out.dtype, lse.dtype] == [step.q.dtype, torch.promote_types(step.q.dtype, torch.float32)]
    assert out.is_contiguous()
    return [out.cpu(), lse.cpu()]


def made(case: Case, dtype: torch.dtype, ints: torch.dtype = torch.int64) -> Step:
    return decode_cases.make_step(case, make_inputs(case, dtype), dtype, ints)


def count_ranges(case: Case) -> int:
    """Ranges of the kernel's grid."""
    splits = decode_combine.most_splits(case.g, case.queries * case.h // case.g)
    return decode_combine.most_ranges(decode_cases.room(case), case.queries, case.rule.get("window"), splits)


@pytest.mark.parametrize("name", ALL)
def test_values_are_the_references_in_fp64(name: str, device: str) -> None:
    case = ALL[name]
    actual = run(case, made(case, torch.float64, torch.int32), device)
    assert_exact(actual, expected(case, make_inputs(case), torch.float64))


@pytest.mark.parametrize("name", ALL)
def test_whole_tiles_give_the_references_values_in_fp64(
    name: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    # fp64 takes the tiles of fp32 by itself, whose steps are parts of a tile.
    for rows in DECODE.values():
        monkeypatch.setitem(rows, "float32", {512: Tile(32, 64, 8, 1)})
    case = ALL[name]
    assert_exact(run(case, made(case, torch.float64), device), expected(case, make_inputs(case), torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FEW)
def test_values_keep_the_tolerance_rule(name: str, dtype: torch.dtype, device: str) -> None:
    case = ALL[name]
    assert_close(run(case, made(case, dtype), device), case, make_inputs(case, dtype), dtype)


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_any_number_of_ranges_gives_the_same_values(splits: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    case = TILED["ranges in a window"]
    assert count_ranges(case) > 5
    monkeypatch.setattr(decode, "most_splits", lambda groups, rows: splits)
    assert_exact(run(case, made(case, torch.float64), device), expected(case, make_inputs(case), torch.float64))


def test_bounds_may_have_any_stride(device: str) -> None:
    case = Case(kv_end=(150, 37), kv_start=(20, 3), tables=4, train_length=32, lengths=(100, 30))
    step = made(case, torch.float64)
    expected_out = run(case, step, device)
    bounds = {
        name: torch.stack((x, x - 9), dim=1)[:, 0]
        for name in ("kv_end", "kv_start", "lengths")
        for x in [getattr(step, name)]
    }
    for x, y in zip(run(case, step._replace(**bounds), device), expected_out, strict=True):
        assert torch.equal(x, y)
    same = case._replace(kv_end=(37, 37), kv_start=None, lengths=None)
    step = made(same, torch.float64)
    expected_out = run(same, step, device)
    for x, y in zip(run(same, step._replace(kv_end=step.kv_end[:1].expand(2)), device), expected_out, strict=True):
        assert torch.equal(x, y)


def test_there_are_always_programs_for_all_ranges() -> None:
    for splits in (1, 3, 16):
        for capacity in range(0, 3000, 7):
            for length, window in ((1, None), (5, None), (1, 1), (1, 64), (5, 100), (3, 700)):
                low = 0 if window is None else max(0, capacity - length - window + 1)
                tiles = -(-capacity // 64) - low // 64
                size = max(2, -(-tiles // splits))
                assert -(-tiles // size) <= decode_combine.most_ranges(capacity, length, window, splits) <= splits


MIXED = {
    "contiguous": Case(kv_end=(1300, 1, 37, 1024, 0), slots=1400, d=64, r=32, h=2, g=1),
    "head-major, several tokens": Case(kv_end=(700, 4, 515), slots=700, queries=5, head_major=True, h=2, g=1),
    "pages": Case(kv_end=(700, 64, 17), page=48, h=2, g=1),
    "window": Case(kv_end=(700, 64, 525), kv_start=(0, 3, 300), slots=700, rule={"window": 300}, h=2, g=1),
    "tables by length": Case(kv_end=(700, 64, 525), slots=700, tables=4, train_length=200, h=2, g=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_sequence_has_the_bits_it_has_alone_in_a_cache_with_no_room_left(
    name: str, dtype: torch.dtype, device: str
) -> None:
    case = MIXED[name]
    step = made(case, dtype)
    together = run(case, step, device)
    for b, end in enumerate(case.kv_end):
        rows = slice(b, b + 1)
        own = {name: None if x is None else x[rows] for name, x in step._asdict().items() if name[:2] in ("q", "kv")}
        if case.page is None:
            own |= {"k_cache": step.k_cache[rows, :end].clone(), "v_cache": step.v_cache[rows, :end].clone()}
        else:
            own |= {"block_table": step.block_table[rows, : -(-end // case.page)]}
        for x, y in zip(run(case, step._replace(**own), device), together, strict=True):
            assert torch.equal(x, y[rows])


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_gives_nothing(case: Case, device: str) -> None:
    out, lse = run(case, made(case, torch.float32), device)
    assert out.shape == (len(case.kv_end), case.queries, case.h, case.d)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_lse_is_not_made_unless_asked_for(device: str) -> None:
    case = CASES["five tokens"]
    step = made(case, torch.float32)
    out, lse = run(case, step, device, with_lse=False)
    assert lse.shape == (0,)
    assert torch.equal(out, run(case, step, device)[0])


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(
    ("page", "column", "value"),
    [(64, 1, None), (64, 1, -1), (64, 2, None), (16, 1, None), (1, 100, None)],
    ids=["page past the pool", "negative page", "page between", "page of 16", "101st page of 1"],
)
def test_pages_there_are_not_give_nan_for_that_sequence_alone(
    page: int, column: int, value: int | None, device: str
) -> None:
    case = Case(kv_end=(300, 130), page=page, h=2, g=1)
    step = made(case, torch.float32)
    clean = run(case, step, device)
    block_table = step.block_table.clone()
    block_table[0, column] = len(step.k_cache) if value is None else value
    for x, y in zip(run(case, step._replace(block_table=block_table), device), clean, strict=True):
        assert x[0].isnan().all()
        assert torch.equal(x[1], y[1])


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize("rotates", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("what", ["index past the stack", "negative index", "rows past the table", "no rows"])
def test_table_rows_there_are_not_give_nan_for_that_sequence_alone(
    what: str, rotates: tuple[bool, bool], device: str
) -> None:
    case = Case(kv_end=(130, 128), tables=2, index=(1, 0), h=2, g=1, rotate_q=rotates[0], rotate_k=rotates[1])
    step = made(case, torch.float32)
    clean = run(case, step, device)
    if what == "rows past the table":
        step = step._replace(coarse=step.coarse[:, :2].clone())
    elif what == "no rows":
        step = step._replace(coarse=step.coarse[:, :0], kv_end=torch.tensor([130, 0]))
        clean = [torch.zeros_like(clean[0]), torch.full_like(clean[1], -math.inf)]
    else:
        step = step._replace(index=torch.tensor([-1 if what == "negative index" else 2, 0]))
    for x, y in zip(run(case, step, device), clean, strict=True):
        assert x[0].isnan().all()
        assert torch.equal(x[1], y[1])


@pytest.mark.parametrize("bounds", [(1000, 0), (2**40, -(2**40)), (-3, 5), (40, 90), (70, 70)], ids=str)
@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "pages"])
def test_bounds_that_lie_read_and_write_nothing_outside(page: int | None, bounds: tuple[int, int], device: str) -> None:
    case = Case(kv_end=(96, 96), slots=96, page=page, queries=3)
    step = made(case, torch.float64)
    truth = expected(case, make_inputs(case), torch.float64)
    end, start = bounds
    step = step._replace(kv_end=torch.tensor([96, end]), kv_start=torch.tensor([0, start]))
    guarded = torch.full((6, 3, 4, 16), 7.0, dtype=torch.float64, device=device)
    lse = torch.full((6, 4, 3), 7.0, dtype=torch.float64, device=device)
    given = Step(*(None if x is None else x.to(device) for x in step))
    decode.launch_decode(
        *given[:3],
        Tables(given.coarse, given.fine, None, given.index),
        Tokens(kv_start=given.kv_start, kv_end=given.kv_end),
        *(given.block_table, None, decode_cases.make_rule(case), (True, True), guarded[2:4], lse[2:4]),
    )
    for memory in (guarded, lse):
        assert (memory[[0, 1, 4, 5]] == 7).all()
    sees_all = end > 96
    for x, y in zip((guarded, lse), truth, strict=True):
        torch.testing.assert_close(x[2].cpu(), y[0], rtol=1e-12, atol=1e-12)
        if sees_all:
            torch.testing.assert_close(x[3].cpu(), y[1], rtol=1e-12, atol=1e-12)
    if not sees_all:
        assert not guarded[3].any()
        assert (lse[3] == -math.inf).all()


def test_equal_inputs_give_equal_bits(device: str) -> None:
    case = TILED["many ranges"]
    step = made(case, torch.bfloat16)
    for x, y in zip(*(run(case, step, device) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


def test_strides_of_keys_and_values_may_differ(device: str) -> None:
    case = TILED["groups of four"]
    step = made(case, torch.float64)
    clean = run(case, step, device)
    strided = step._replace(
        q=step.q.transpose(1, 2).contiguous().transpose(1, 2),
        k_cache=step.k_cache.transpose(1, 2).contiguous().transpose(1, 2),
        v_cache=torch.stack((step.v_cache,) * 2, dim=1)[:, 1],
    )
    for x, y in zip(run(case, strided, device), clean, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="GiB of a GPU would have to be there")
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_offsets_past_two_to_the_31_are_reached(name: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    # pages that are never touched are free.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = Case(kv_end=(40,), page=16, h=1, g=1)
    step = made(case, torch.bfloat16)
    near = run(case, step, device)
    pool = getattr(step, name)
    far = torch.empty(2**31 + 6 * 256, dtype=torch.bfloat16).as_strided(
        pool.shape, (2**31 // (len(pool) - 1) // 256 * 256 + 256, 16, 16, 1)
    )
    far.copy_(pool)
    step = step._replace(**{name: far, "block_table": step.block_table.to(torch.int32)})
    for x, y in zip(run(case, step, device), near, strict=True):
        assert torch.equal(x, y)
