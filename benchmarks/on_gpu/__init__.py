"""What `make gpu` does on a machine with CUDA: checks of every kernel, timings beside rivals and floors, and tuning."""

import sys
from pathlib import Path

# the tolerance rule, and attention's reference called as users call it, lie with the tests, which are no package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
