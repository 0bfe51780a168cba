"""What threads share: the table cache under ThreadSanitizer, and what a module gives; and the list of tests for ASan.

tests/sanitizers/address.py and thread.py run by themselves what takes longer.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ropes import CONFIG, make_rope, solved
from sanitizers import address, thread

from clex_kernels.modules import ClexRotaryEmbedding

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are built, if g++ can."""
    path = tmp_path_factory.mktemp("tsan")
    if refusal := thread.refusal(path):
        pytest.skip(f"g++ has no ThreadSanitizer: {refusal}")
    return path


def test_eight_threads_race_for_nothing_in_the_table_cache(folder: Path) -> None:
    done = thread.run(thread.build("table_cache_threads", folder), "40000")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("0 failures\n")


def test_a_lookup_without_its_lock_is_found_out(folder: Path) -> None:
    source = (thread.ROOT / "csrc" / "table_cache.cpp").read_text()
    lock, after = "  const std::lock_guard lock(mutex_);\n", "  TableCacheStats stats = stats_;\n"
    assert source.count(lock + after) == 1
    csrc = folder / "csrc"
    csrc.mkdir()
    (csrc / "table_cache.cpp").write_text(source.replace(lock + after, after))
    for name in ("table_cache.h", "isa.h"):
        (csrc / name).write_text((thread.ROOT / "csrc" / name).read_text())
    done = thread.run(thread.build("table_cache_threads", folder, csrc), "4000")
    assert done.returncode == 66, done.stderr[-4000:]
    assert "data race" in done.stderr
    assert "TableCache::stats" in done.stderr


def use(rope: ClexRotaryEmbedding, seed: int, expected: dict[int, torch.Tensor], wrong: list[str]) -> None:
    """Random calls of a module that others use as well."""
    generator = torch.Generator().manual_seed(seed)
    lengths = list(expected)
    for kind, which in torch.randint(0, 1000, (150, 2), generator=generator).tolist():
        length = lengths[which % len(lengths)]
        if kind % 10 == 0:
            rope.invalidate()
        elif kind % 10 < 3:
            # grows with max_length, and holds the tables of all t.
            stack = rope.stack(length)
            for t, freq in enumerate(stack.freq, start=1):
                if stack.length < length or not torch.equal(freq, expected[t * CONFIG.train_length]):
                    wrong.append(f"stack({length}) at t = {t}")
        else:
            table = rope(length)
            if table.length < length or not torch.equal(table.freq, expected[length]):
                wrong.append(f"rope({length})")
            elif not torch.equal(table.coarse, fresh_rows(table.freq, table.length)):
                wrong.append(f"rows of rope({length})")


def fresh_rows(freq: torch.Tensor, length: int) -> torch.Tensor:
    return torch.ops.clex.tables(freq[None], length, None, 1.0, torch.float32)[0][0]


@pytest.mark.filterwarnings("ignore:.*past train_length")
def test_eight_threads_get_right_tables_from_one_module_however_it_is_dropped_and_grown() -> None:
    limit = CONFIG.train_length * CONFIG.max_factor
    lengths = [*range(CONFIG.train_length, limit + 1, CONFIG.train_length), 2 * limit, 3 * limit]
    # each by a module of its own, which has nothing cached.
    expected = {length: make_rope()(length).freq for length in lengths}
    for length, freq in expected.items():
        truth = solved(make_rope(), min(length, limit) / CONFIG.train_length)[0]
        torch.testing.assert_close(freq, truth, rtol=1e-10, atol=0)
    rope, wrong = ClexRotaryEmbedding(CONFIG, cache_bytes=40_000), []
    rope.load_state_dict(make_rope().state_dict())
    rope.eval()
    run_together(8, lambda seed: use(rope, seed, expected, wrong), wrong)
    assert wrong == []
    stats = rope.cache_stats()
    assert stats.hits > 0
    assert stats.evictions > 0
    assert stats.invalidations > 8


def run_together(count: int, work: Callable[[int], None], wrong: list[str]) -> None:
    """`work` by that many threads; what they raise is wrong too, and would be lost."""

    def guarded(number: int) -> None:
        try:
            work(number)
        # of any kind: a thread's failure reaches no test by itself.
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


def test_the_tests_of_the_build_with_asan_are_there() -> None:
    assert [name for name in address.TESTS if not (TESTS / name).exists()] == []
