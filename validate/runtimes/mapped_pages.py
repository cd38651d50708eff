"""Holds this process to a limit while its runtime maps a file that is larger.

A runtime that maps a file keeps each page that it has read in its resident size until memory is short. When the process
comes near its limit, the mapped pages of its files are let go: the kernel may keep them in its cache, and the runtime
finds them again, there or on the disk, when it reads them. What it computes is the same.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["bytes_with_all_pages", "hold_to", "let_go", "rest"]

_SECONDS = 0.01  # loading a file that the system has in its cache, a runtime maps some hundred MB meanwhile
_SHARE = 0.8  # of the limit at which pages go
_LEAST_SHARE = 0.1  # of the limit that mapped pages must take, or nothing is gained
_MADV_DONTNEED = 4  # <bits/mman-linux.h>: the pages of a file's mapping are read again when they are needed
_STATM, _MAPS, _SMAPS = (Path("/proc/self", name) for name in ("statm", "maps", "smaps"))


_limit: int | None = None
_thread: threading.Thread | None = None


def hold_to(n_bytes: int | None) -> None:
    """Lets mapped pages of files go from now on, whenever the resident size comes near ``n_bytes``.

    Another call changes the limit. Without ``/proc``, outside of Linux, nothing is done: the kernel decides there.

    Args:
        n_bytes: the most that the process may have resident; None: there is no limit.
    """
    global _limit, _thread  # a process has one resident size
    _limit = n_bytes
    if n_bytes is not None and _STATM.exists() and (_thread is None or not _thread.is_alive()):
        _thread = threading.Thread(target=_hold, daemon=True, name="mapped pages")
        _thread.start()


def _hold() -> None:
    wait, page = threading.Event(), os.sysconf("SC_PAGE_SIZE")
    let_go()  # takes what memory it needs now: while the kernel reads a file into a mapping, mmap(2) waits
    while not wait.wait(_SECONDS):
        limit = _limit
        if limit is None:
            continue
        _, resident, shared, *_ = (int(pages) * page for pages in _STATM.read_bytes().split())
        if resident > _SHARE * limit and shared > _LEAST_SHARE * limit:
            let_go()


def let_go() -> None:
    """Lets the pages of all files that are mapped for reading go; they are read again when they are needed."""
    madvise = _madvise()
    # line by line, in little memory: see _hold
    with _MAPS.open("rb") as lines:
        for line in lines:
            if b" r--s " in line and (mapping := _mapped_file(line)):
                madvise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(len(mapping)), _MADV_DONTNEED)


def rest() -> None:
    """Lets mapped pages go before this process waits for another, which has their memory then, if there is a limit."""
    if _limit is not None and _STATM.exists():
        let_go()


def bytes_with_all_pages() -> int:
    """The resident size that this process would have with all pages of the files that it maps; 0 without ``/proc``."""
    if not _SMAPS.exists():
        return 0
    total, mapping = 0, None
    for line in _SMAPS.read_bytes().splitlines():
        name, value, *_ = line.split(maxsplit=2)
        if not name.endswith(b":"):
            mapping = _mapped_file(line)
            total += len(mapping or ())
        elif name == b"Rss:" and mapping is None:
            total += int(value) * 1024
    return total


def _mapped_file(line: bytes) -> range | None:
    """The addresses of a read-only, shared mapping of a file, from its line: its pages are the file's own."""
    addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
    if permissions != b"r--s" or not path or not path[0].startswith(b"/"):
        return None
    start, end = (int(address, 16) for address in addresses.split(b"-"))
    return range(start, end)


@functools.cache
def _madvise() -> Callable[[ctypes.c_void_p, ctypes.c_size_t, int], int]:
    return ctypes.CDLL(None).madvise
