"""Data parallelism: each process of a torch.distributed group works on its own token blocks, and sums are shared.

Without a group there is one process, and everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed

__all__ = ["is_first", "n_processes", "reduce_max", "reduce_sum", "share", "wait_for_all"]


def n_processes() -> int:
    """Processes in the group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """True if this process is the one that writes the files that all have in common."""
    return _rank() == 0


def share(n_items: int) -> list[int]:
    """Returns this process's share of ``n_items``: every n-th, so that each process gets some of every domain."""
    return list(range(_rank(), n_items, n_processes()))


def reduce_sum(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by its sum over all processes."""
    _reduce(tensors, distributed.ReduceOp.SUM)


def reduce_max(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces each tensor by its maximum over all processes."""
    _reduce(tensors, distributed.ReduceOp.MAX)


def wait_for_all() -> None:
    """Waits until every process has called this."""
    if distributed.is_initialized():
        distributed.barrier()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _reduce(tensors: Iterable[torch.Tensor], operation: distributed.ReduceOp.RedOpType) -> None:
    if not distributed.is_initialized():
        return
    for tensor in tensors:
        if distributed.get_backend() == "nccl":  # it sees GPU memory only
            on_gpu = tensor.cuda()
            distributed.all_reduce(on_gpu, op=operation)
            tensor.copy_(on_gpu)
        else:
            distributed.all_reduce(tensor, op=operation)
