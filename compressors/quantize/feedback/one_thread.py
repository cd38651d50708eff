"""Makes results independent of the number of torch's threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute with one thread; a Cholesky factor's last bits depend on their number.

    The setting belongs to the calling thread (``ATen/ParallelOpenMP.cpp``): others that run meanwhile keep theirs.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
