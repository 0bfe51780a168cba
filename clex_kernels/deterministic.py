"""Equal bits at any number of CPU threads, where torch.use_deterministic_algorithms(True) asks for them.

The package's own C++ has them always: its work is cut by shapes alone. Torch's products (MKL) and its attention are cut
among the threads there are, and what they sum in which order depends on that, and on where a thread's memory lies: one
thread has one order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_products() -> Iterator[None]:
    """Under torch.use_deterministic_algorithms(True), torch's CPU operators that are called within run on one thread.

    Other threads keep theirs.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
