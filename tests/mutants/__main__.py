"""`python -m tests.mutants [WORD ...]`: whether the tests notice each of the mutants whose name or file has a WORD.

Prints a table. Exit status 1 if a mutant survives, or can't be tried: its pattern does not stand exactly once in its
file, or what it makes does not build or import.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .lists import MUTANTS
from .running import FORKS, NOTICED, PRELOADED, exit_status, render, try_all

ROOT = Path(__file__).parents[2]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a name or file; none: all mutants")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in f"{m.name} {m.file}" for w in options.words)]
    # not at the top: processes that run tests import this file, and a package that is not theirs.
    from clex_kernels import _C

    widest = ISAS.index(_C.isa())
    mutants = [mutant for mutant in chosen if mutant.isa is None or ISAS.index(mutant.isa) <= widest]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(options.words)} in its name or file and runs on this processor")
    FORKS.set_forkserver_preload(PRELOADED)
    outcomes = try_all(ROOT, ROOT / "build" / "mutants-tree", mutants, tqdm)
    print(render(outcomes))
    noticed = sum(outcome.verdict == NOTICED for outcome in outcomes)
    left = f", {len(chosen) - len(mutants)} not tried: this processor lacks their instructions"
    print(f"{noticed} of {len(outcomes)} mutants noticed{left if len(chosen) > len(mutants) else ''}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
