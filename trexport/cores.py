"""A core for each piece of work, instead of all cores for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_threaded_torch() -> Iterator[int]:
    """Torch's operations on one thread each, for pools whose threads would else wait for each other, spinning.

    Yields:
        The number of threads that torch had.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
