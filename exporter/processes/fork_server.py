"""Starts multiprocessing's fork server so that it leaves no file, however the run ends.

The server listens on a socket in the folder for temporary files, and a run that is killed would leave it there. So its
name is removed as soon as the server has it, and the run then reaches it through a descriptor of its own
(``/proc/self/fd/N``, Linux).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import current_process
from typing import Any

__all__ = ["ensure_server"]

_DESCRIPTORS = "/proc/self/fd"


def ensure_server(preloaded: Sequence[str]) -> None:
    """Starts the server unless it runs already.

    Args:
        preloaded: the modules that the server imports before it forks, in this order.

    Raises:
        OSError: it cannot listen, for example because the path of the folder for temporary files is too long.
    """
    server: Any = forkserver._forkserver  # its address is a private attribute
    multiprocessing.set_forkserver_preload(list(preloaded))
    before = server._forkserver_address
    with tempfile.TemporaryDirectory(prefix="moe-export-") as folder, _sockets_in(folder):
        forkserver.ensure_running()
        if server._forkserver_address == before:
            return
        descriptor = os.open(server._forkserver_address, os.O_PATH | os.O_CLOEXEC)
        server._forkserver_address = f"{_DESCRIPTORS}/{descriptor}"
    if before is not None and before.startswith(_DESCRIPTORS):  # left by a server that died
        os.close(int(before.rpartition("/")[2]))


@contextmanager
def _sockets_in(folder: str) -> Iterator[None]:
    """While it lasts, multiprocessing makes its sockets in this folder."""
    settings: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]
    before = settings.get("tempdir")
    settings["tempdir"] = folder
    try:
        yield
    finally:
        settings["tempdir"] = before
