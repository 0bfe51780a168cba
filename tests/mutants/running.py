"""Breaks one thing at a time in a copy of the tree, builds that, and asks the tests.

The copy is kept, so that only what a mutant touches is compiled. What it changed is put back with its old time stamps,
the object files and the extension too: the next build finds them up to date.
"""

import filecmp
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from .mutant import Mutant

# what tests need, as far as it is there.
PARTS = ("csrc", "clex_kernels", "tests", "benchmarks", "examples", "setup.py", "pyproject.toml", "README.md")
BUILT = ("build", "clex_kernels/_C.abi3.so")
# failures of a mutant after which its tests stop.
ENOUGH = 3
NOTICED, SURVIVED = "noticed", "SURVIVED"
# processes begin as copies of one that has imported what all need, which takes longer than most tests.
FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["pytest", "torch", "torch._dynamo", "torch._inductor", "torch.onnx", "triton", "torchdiffeq"]
SECONDS = 900


class Outcome(NamedTuple):
    """What became of a mutant: the tests that failed, and a verdict, "noticed" if all is well."""

    mutant: Mutant
    failed: list[str]
    verdict: str


class Answer(NamedTuple):
    """How a run of tests ended: names of those that failed, whether any could not even begin, and what was printed."""

    failed: list[str]
    broken: bool
    text: str


def copy_tree(source: Path, target: Path) -> None:
    """Makes the parts of `target` those of `source`; only files that differ are written, and get a new time stamp."""
    wanted = set()
    for part in PARTS:
        paths = [source / part, *(source / part).rglob("*")] if (source / part).exists() else []
        for path in (path for path in paths if path.is_file() and not is_made(path)):
            copy = target / path.relative_to(source)
            wanted.add(copy)
            if copy.is_file() and filecmp.cmp(path, copy, shallow=False):
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for part in PARTS:
        for path in [path for path in (target / part).rglob("*") if path.is_file() and not is_made(path)]:
            if path not in wanted:
                path.unlink()


def is_made(path: Path) -> bool:
    """Whether a file comes of building or running."""
    return "__pycache__" in path.parts or path.suffix == ".so"


def build(tree: Path) -> str | None:
    """Builds the extension in place; what went wrong, or None."""
    if not (tree / "setup.py").exists():
        return None
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=SECONDS)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


def run_tests(tree: Path, files: Sequence[str], enough: int | None = ENOUGH) -> Answer:
    """Runs test files of a tree until `enough` tests have failed."""
    report, printed = tree / "report.xml", tree / "report.txt"
    report.unlink(missing_ok=True)
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", f"--junitxml={report}"]
    arguments += [f"--maxfail={enough}"] if enough else []
    process = FORKS.Process(target=be_pytest, args=(tree, printed, [*arguments, *(f"tests/{file}" for file in files)]))
    process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return Answer([], True, f"longer than {SECONDS} s")
    text = printed.read_text(errors="replace")[-4000:] if printed.exists() else ""
    if process.exitcode < 0:
        return Answer([f"killed by signal {-process.exitcode}"], False, text)
    if not report.exists():
        return Answer([], True, text)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sorted({name_of(case) for case in cases if case.find("failure") is not None})
    # a file that can't be imported, or a fixture that fails, says nothing about what was broken.
    broken = any(case.find("error") is not None for case in cases) or (process.exitcode != 0 and not failed)
    return Answer(failed, broken, text)


def be_pytest(tree: Path, printed: Path, arguments: list[str]) -> None:
    """A process of its own: pytest in a tree, whose package comes before any that is installed."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    # byte code could outlive the mutant that it is of.
    sys.dont_write_bytecode = True
    import pytest

    sys.exit(pytest.main(arguments))


def name_of(case: ElementTree.Element) -> str:
    """A test's name, its parameters included."""
    return f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"


@contextmanager
def mutated(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The tree with the mutant in it; afterwards as it was, what was built included."""
    path = tree / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: expected {mutant.old!r} exactly once, got it {text.count(mutant.old)} times")
    saved = tree.with_name(tree.name + "-saved")
    shutil.rmtree(saved, ignore_errors=True)
    # the file last: killed before that, the next run finds it different and builds anew.
    parts = (*BUILT, mutant.file) if mutant.file.startswith("csrc/") else (mutant.file,)
    kept = [part for part in parts if (tree / part).exists()]
    for part in kept:
        move_copy(tree / part, saved / part)
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        yield
    finally:
        for part in kept:
            move_copy(saved / part, tree / part)


def move_copy(source: Path, target: Path) -> None:
    """Copies a file or folder in place of another, with its time stamps."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # a new file: a process may still have the old extension in its memory.
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


def try_mutant(tree: Path, mutant: Mutant) -> Outcome:
    """Whether the mutant's tests notice it."""
    try:
        with mutated(tree, mutant):
            if mutant.file.startswith("csrc/") and (problem := build(tree)):
                return Outcome(mutant, [], f"does not build: {problem}")
            answer = run_tests(tree, mutant.tests)
    except ValueError as error:
        return Outcome(mutant, [], str(error))
    if answer.failed:
        return Outcome(mutant, answer.failed, NOTICED)
    return Outcome(mutant, [], f"does not run: {answer.text}" if answer.broken else SURVIVED)


def try_all(
    source: Path,
    tree: Path,
    mutants: Sequence[Mutant],
    progress: Callable[[Iterable[Mutant]], Iterable[Mutant]] = iter,
) -> list[Outcome]:
    """Every mutant in a copy of `source` in `tree`, once the tests pass there without one."""
    copy_tree(source, tree)
    if problem := build(tree):
        raise RuntimeError(f"the tree does not build without a mutant: {problem}")
    files = sorted({file for mutant in mutants for file in mutant.tests})
    answer = run_tests(tree, files, enough=None)
    if answer.failed or answer.broken:
        raise RuntimeError(f"tests fail without a mutant: {', '.join(answer.failed)}\n{answer.text}")
    return [try_mutant(tree, mutant) for mutant in progress(mutants)]


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 if every mutant was noticed."""
    return int(any(outcome.verdict != NOTICED for outcome in outcomes))


def render(outcomes: Sequence[Outcome]) -> str:
    """A table, a line per mutant."""
    rows = [("mutant", "file", "tests that notice", "verdict")]
    for mutant, failed, verdict in outcomes:
        count = f"{len(failed)}{' or more' if len(failed) >= ENOUGH else ''}"
        # parameters say less than names do.
        names = list(dict.fromkeys(re.sub(r"\[.*", "", name.split("::")[-1]) for name in failed))
        rows.append((mutant.name, mutant.file, f"{count}: {', '.join(names[:2])}" if failed else "none", verdict))
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ("---",) * 4, *rows[1:]))
