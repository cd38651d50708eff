"""Work whose result does not depend on how many threads torch has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread in here; a Cholesky factor's last bits depend on their number.

    The setting belongs to the calling thread (``ATen/ParallelOpenMP.cpp``): others that run meanwhile keep theirs.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
