"""Ends processes that must not outlive the one that started them, however that one ended."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = ["end_with_creator", "end_with_parent"]

_SECONDS_BETWEEN_LOOKS = 0.2


def end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent is gone, and at once if it is gone already.

    ``parent`` is an argument, because the parent may be gone before this process can ask for its number.
    """
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def end_with_creator() -> None:
    """Ends this process as soon as the one that started it with :mod:`multiprocessing` is gone.

    That is not always its parent: the parent of a fork server's children is the server.
    """
    import multiprocessing  # the runtimes' processes, which start often, do without

    creator = multiprocessing.parent_process()
    assert creator is not None, "for processes of multiprocessing"
    if not creator.is_alive():
        os._exit(1)
    threading.Thread(target=_outlive, args=(creator,), daemon=True).start()


def _outlive(creator: BaseProcess) -> None:
    creator.join()
    os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
