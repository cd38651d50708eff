"""Opens files that other people name: only regular ones, so that no pipe, device or socket keeps a run waiting."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from compressors.model.errors import InputError

__all__ = ["not_regular", "open_regular", "refuse_special"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def refuse_special(path: Path, said_of: str = "") -> None:
    """Refuses a path that exists and is not a regular file, a folder too. A missing file is left to the caller.

    Args:
        path: the path; links are followed.
        said_of: the beginning of the message, such as ``--text: ``.

    Raises:
        InputError: it is a folder, a pipe, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a null character in the path
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"{said_of}{path} {not_regular(mode)}")


def not_regular(mode: int) -> str:
    """Says what kind of file it is, and what to do: ``is a socket; give a regular file``."""
    return f"is {_KINDS.get(stat.S_IFMT(mode), 'something special')}; give a regular file"


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading bytes.

    Raises:
        InputError: it is something else, or cannot be opened.
    """
    refuse_special(path)
    try:
        # if a pipe has taken its place by now, opening it does not wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return os.fdopen(descriptor, "rb")
