"""Runs tasks in several threads, with the same bits for any number of threads.

torch splits a sum over its own threads, so its bits depend on their number. Here each task computes with one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    pass


__all__ = ["in_order", "one_thread_each"]

_Result = TypeVar("_Result")


@contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Makes a pool; in its threads, and in the calling one until it is closed, torch computes with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for all threads that have not used torch yet; the others have a number of their own
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], _Result]], at_once: int) -> Iterator[_Result]:
    """Yields the tasks' results in order; at most ``at_once`` are computed or wait to be taken."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
