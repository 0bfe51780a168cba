"""Calls public functions with random arguments and reports what is neither right nor a named refusal.

    python tests/fuzz_calls.py [FUNCTION ...] --seed N --calls M      M calls of each function (default: all)
    python tests/fuzz_calls.py FUNCTION --seed N --only I             call I alone, in this process

A third of the calls are right and must give what fp64 gives; in the others one or two arguments are spoiled. Calls run
in a process of their own, which is killed where one hangs, and whose memory is poisoned: what is not initialised holds
NaN, and what is freed holds rubbish. Exit status 1 if there are findings; each names how to call it again.
"""

import argparse
import faulthandler
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from tempfile import TemporaryFile

import torch
from fuzzing.functions import FUNCTIONS
from fuzzing.judge import Case, judge, spoil
from fuzzing.values import Draw

SECONDS = 20
# enough for torch, and for no absurd size.
MEMORY = 12 << 30


def make(name: str, seed: int, number: int) -> Case:
    draw = Draw(f"{name} {seed} {number}")
    case = FUNCTIONS[name](draw)
    if number % 3:
        spoil(draw, case)
    return case


def run_here(names: list[str], seed: int, first: int, calls: int) -> None:
    """Makes the calls one after the other, each announced before it is made; of the first name from number `first`."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in names:
        for number in range(first if name == names[0] else 0, calls):
            print(f"call {name} {number}", flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            complaint = judge(make(name, seed, number))
            if complaint is not None:
                print(f"finding {complaint}", flush=True)
            faulthandler.cancel_dump_traceback_later()
    print("done", flush=True)


def findings(names: list[str], seed: int, calls: int) -> Iterator[str]:
    """What a child process finds; one that dies is started again behind the call that killed it."""
    name, number = names[0], -1
    while True:
        rest = names[names.index(name) :]
        command = [
            sys.executable,
            __file__,
            *rest,
            "--seed",
            str(seed),
            "--from",
            str(number + 1),
            "--calls",
            str(calls),
        ]
        environment = os.environ | {"MALLOC_PERTURB_": "165"}
        kind = ""
        with TemporaryFile("w+") as errors:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
                for line in child.stdout:
                    kind, _, text = line.strip().partition(" ")
                    if kind == "call":
                        name, number = text.split()[0], int(text.split()[1])
                    elif kind == "finding":
                        yield _report(name, seed, number, text)
            if kind == "done":
                return
            errors.seek(0)
            last = errors.read().strip().splitlines()
        what = "took too long" if any("Timeout" in line for line in last) else f"ended the process ({child.returncode})"
        yield _report(name, seed, number, f"{what}: {' | '.join(last[:6])}")
        if kind == "":
            return


def _report(name: str, seed: int, number: int, complaint: str) -> str:
    try:
        call = str(make(name, seed, number))
    # a call that can't even be written down is still to be reported.
    except Exception as error:
        call = f"{type(error).__name__} while it was made: {error}"
    return f"{name} --seed {seed} --only {number}: {complaint}\n    {call}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help=f"of {', '.join(FUNCTIONS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--only", type=int, help="make this call alone, in this process, with its traceback")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.functions or list(FUNCTIONS)
    if unknown := set(names) - FUNCTIONS.keys():
        parser.error(f"expected some of {', '.join(FUNCTIONS)}, got {', '.join(sorted(unknown))}")
    if arguments.only is not None:
        case = make(names[0], arguments.seed, arguments.only)
        print(case)
        print(judge(case) or "nothing to report")
        case.function(**make(names[0], arguments.seed, arguments.only).arguments)
    elif arguments.first is not None:
        run_here(names, arguments.seed, arguments.first, arguments.calls)
    else:
        count = 0
        for finding in findings(names, arguments.seed, arguments.calls):
            count += 1
            print(finding, flush=True)
        print(f"{count} findings in {arguments.calls} calls of each of {', '.join(names)}")
        sys.exit(bool(count))


if __name__ == "__main__":
    main()
