"""The mutants themselves: that each can still be made, and that one which survives is told."""

import sys
from pathlib import Path

import pytest
from mutants.lists import MUTANTS
from mutants.mutant import Mutant
from mutants.running import SURVIVED, Outcome, copy_tree, exit_status, render, try_all

TESTS = Path(__file__).parent
ROOT = TESTS.parent

SOURCE = "def double(x):\n    return 2 * x\n\n\ndef halve(x):\n    return x / 2\n"
TEST = (
    "import pytest\nfrom small import double\n\n\n"
    "@pytest.mark.parametrize('x', [1, 2])\ndef test_it_doubles(x):\n    assert double(x) == x + x\n"
)


def test_every_mutant_can_be_made() -> None:
    texts = {mutant.file: (ROOT / mutant.file).read_text() for mutant in MUTANTS}
    counts = {(mutant.name, mutant.file): texts[mutant.file].count(mutant.old) for mutant in MUTANTS}
    assert {key: count for key, count in counts.items() if count != 1} == {}
    assert len(counts) == len(MUTANTS), "two mutants of a file have one name"
    assert [mutant.name for mutant in MUTANTS if mutant.old == mutant.new] == []


def test_the_tests_of_every_mutant_are_there() -> None:
    assert {file for mutant in MUTANTS for file in mutant.tests if not (TESTS / file).exists()} == set()
    assert all(mutant.tests for mutant in MUTANTS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with a module, half of which is tested."""
    (tmp_path / "source" / "tests").mkdir(parents=True)
    (tmp_path / "source" / "clex_kernels").mkdir()
    (tmp_path / "source" / "clex_kernels" / "small.py").write_text(SOURCE)
    (tmp_path / "source" / "tests" / "conftest.py").write_text("import sys\n\nsys.path.insert(0, 'clex_kernels')\n")
    (tmp_path / "source" / "tests" / "test_small.py").write_text(TEST)
    return tmp_path / "source"


def small(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "clex_kernels/small.py", old, new, ("test_small.py",))


def test_a_mutant_that_survives_or_can_not_be_made_is_told(source: Path, tmp_path: Path) -> None:
    mutants = [
        small("noticed", "2 * x", "3 * x"),
        small("survives", "x / 2", "x / 3"),
        small("is nowhere", "x + 2", "x + 3"),
        small("is in two places", "return", "yield"),
        small("does not run", "def halve(x):", "def halve(x:"),
    ]
    noticed, survived, *others = outcomes = try_all(source, tmp_path / "copy", mutants)
    assert noticed.verdict == "noticed"
    assert noticed.failed == ["test_small::test_it_doubles[1]", "test_small::test_it_doubles[2]"]
    assert survived == Outcome(mutants[1], [], SURVIVED)
    for outcome, reason in zip(others, ["got it 0 times", "got it 2 times", "does not run"], strict=True):
        assert reason in outcome.verdict
        assert exit_status([outcome]) == 1
    assert exit_status(outcomes) == exit_status([survived]) == 1
    assert exit_status([noticed]) == 0
    lines = render(outcomes).splitlines()
    assert lines[2] == "| noticed | clex_kernels/small.py | 2: test_it_doubles | noticed |"
    assert lines[3] == "| survives | clex_kernels/small.py | none | SURVIVED |"
    # neither the copy nor what it is a copy of keeps anything.
    assert (source / "clex_kernels" / "small.py").read_text() == SOURCE
    assert (tmp_path / "copy" / "clex_kernels" / "small.py").read_text() == SOURCE


def test_tests_that_fail_without_a_mutant_prove_nothing(source: Path, tmp_path: Path) -> None:
    (source / "clex_kernels" / "small.py").write_text(SOURCE.replace("2 * x", "3 * x"))
    with pytest.raises(RuntimeError, match=r"tests fail without a mutant: test_small::test_it_doubles\[1\]"):
        try_all(source, tmp_path / "copy", [small("anything", "x / 2", "x / 3")])


def test_a_copy_follows_its_source_and_keeps_what_is_built(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy_tree(source, copy)
    file, built = copy / "clex_kernels" / "small.py", copy / "clex_kernels" / "_C.abi3.so"
    before = file.stat().st_mtime_ns
    built.write_text("built")
    (copy / "tests" / "test_gone.py").write_text("")
    copy_tree(source, copy)
    assert file.stat().st_mtime_ns == before
    assert built.exists()
    assert not (copy / "tests" / "test_gone.py").exists()
    file.write_text("left by a run that was killed")
    copy_tree(source, copy)
    assert file.read_text() == SOURCE
    assert "small" not in sys.modules
