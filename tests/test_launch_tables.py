from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from clex_kernels.kernels import launch_tables  # noqa: E402
from clex_kernels.kernels.launch_tables import (  # noqa: E402
    ANY,
    ARCHITECTURES,
    ATTENTION_BWD_DFREQ,
    ATTENTION_FWD,
    DECODE_COMBINE,
    Tile,
    architecture_of,
    constants_of,
    find_entry,
)

TABLES = {
    name: table
    for name, table in vars(launch_tables).items()
    if isinstance(table, dict) and set(table) == set(ARCHITECTURES)
}
HALF, SINGLE, DOUBLE = (
    torch.empty(1, device="meta", dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64)
)


def use_gpu(monkeypatch: pytest.MonkeyPatch, target: GPUTarget) -> None:
    driver = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.parametrize(
    ("arch", "architecture"),
    [
        (75, "sm_120"),
        (80, "sm_80"),
        (86, "sm_120"),
        (87, "sm_80"),
        (89, "sm_120"),
        (90, "sm_90"),
        (100, "sm_100"),
        (103, "sm_100"),
        (120, "sm_120"),
        (121, "sm_120"),
        ("gfx942", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_a_gpu_is_served_by_what_it_resembles(
    arch: int | str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu(monkeypatch, GPUTarget("hip" if isinstance(arch, str) else "cuda", arch, 32))
    assert architecture_of(HALF) == architecture
    assert architecture_of(torch.empty(1)) == "sm_80"


def test_meta_tensors_need_no_gpu_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=fail))
    assert architecture_of(HALF) == "sm_80"
    with pytest.raises(RuntimeError, match="no GPU"):
        architecture_of(SimpleNamespace(device=SimpleNamespace(type="cuda")))


def test_every_architecture_has_every_kind_and_rising_sizes() -> None:
    assert len(TABLES) == 12
    for name, table in TABLES.items():
        kinds = ["float32"] if table in (ATTENTION_BWD_DFREQ, DECODE_COMBINE) else ["half", "float32"]
        for rows in table.values():
            assert list(rows) == kinds, name
            for entries in rows.values():
                assert list(entries) == sorted(entries), name
                assert len(set(map(type, entries.values()))) == 1, name
                sizes = [n for entry in entries.values() for at, n in entry._asdict().items() if at != "num_stages"]
                assert all(n & (n - 1) == 0 for n in sizes), name


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_entry_of_the_smallest_size_that_suffices_is_found(
    architecture: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_tables, "architecture_of", lambda _: architecture)
    tables = TABLES[name][architecture]
    for kind, x in (("half", HALF), ("float32", SINGLE), ("float32", DOUBLE)):
        if kind not in tables:
            continue
        fewer = 0
        for most, entry in tables[kind].items():
            assert find_entry(TABLES[name], x, fewer + 1) is entry
            assert find_entry(TABLES[name], x, most) is entry
            fewer = most
        with pytest.raises(
            ValueError, match=rf"expected a size of at most {most} .*{architecture}, {kind}.* {most + 1}$"
        ):
            find_entry(TABLES[name], x, most + 1)


def test_entries_name_their_constants() -> None:
    entry = ATTENTION_FWD["sm_80"]["half"][128]
    assert isinstance(entry, Tile)
    assert constants_of(entry) == {"BLOCK_L": 128, "BLOCK_S": 64, "num_warps": 8, "num_stages": 2}
    assert ANY > 2**30
