"""Reads files that others wrote, with plain reads into our own memory, and notices changes while they are read.

Files are not mapped into memory: mapped pages count as resident, and after one pass over a 60 GB model the process
would seem to hold all of it.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from compressors.model.errors import InputError
from compressors.model.files.regular_file import not_regular, refuse_special
from compressors.model.names import shown

__all__ = ["FileState", "RawFile", "bytes_read", "instead_of_a_file"]

_read: Counter[Path] = Counter()  # bytes that this process has read, by file
_counting = Lock()


def bytes_read(paths: Iterable[Path]) -> int:
    """The bytes that this process has read of these files, as often as it read them."""
    with _counting:
        return sum(_read[path] for path in paths)


@dataclass(frozen=True)
class FileState:
    """Size and time of a file, which show whether the file was changed."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The file's state now."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def change_to(self, now: FileState) -> str | None:
        """Says what is different now; None if nothing is."""
        if self.size != now.size:
            return f"it had {self.size} bytes and now has {now.size}"
        return None if self == now else "its time of modification has changed"


class RawFile:
    """The bytes of a file.

    Raises:
        InputError: the file cannot be opened, or is not a file: a folder, a pipe, a socket, a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_special(path)
        try:
            # without O_NONBLOCK, opening a pipe waits for somebody who writes into it
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            link = f"; it is a link to {shown(os.readlink(path))}: download the file again" if path.is_symlink() else ""
            raise InputError(f"{path} cannot be opened ({error.strerror}){link}") from None
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} {not_regular(status.st_mode)}")
        self._state = FileState(status.st_size, status.st_mtime_ns)

    @property
    def size(self) -> int:
        """Bytes that the file had when it was opened."""
        return self._state.size

    def start(self, n_bytes: int, offset: int = 0) -> bytes:
        """The bytes from ``offset`` on, fewer if the file ends before: for headers.

        Raises:
            InputError: they cannot be read.
        """
        try:
            return os.pread(self._descriptor, n_bytes, offset)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror})") from None

    def fill(self, name: str, target: memoryview, offset: int) -> None:
        """Fills ``target``, bytes, with those from ``offset`` on.

        Raises:
            InputError: the file was changed or cut off since it was opened; the message names tensor ``name``.
        """
        problem = self._change()
        while problem is None and len(target) > 0:
            try:
                n_read = os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                problem = str(error.strerror)
                break
            if n_read == 0:
                problem = "the file ends too early"
            target, offset = target[n_read:], offset + n_read
            with _counting:
                _read[self.path] += n_read
        if problem is not None:
            raise InputError(
                f"{self.path}: tensor {shown(name)} cannot be read: {problem}. Was the file changed or cut off while "
                "this run was reading it? Put the original back, then start again"
            )

    def _change(self) -> str | None:
        """Says what happened to the file since it was opened; None if nothing did."""
        try:
            return self._state.change_to(FileState.of(self.path))
        except OSError as error:
            return str(error.strerror)


def instead_of_a_file(start: bytes) -> str | None:
    """Says in half a sentence what stands in place of the expected file; None if its first bytes do not tell.

    Args:
        start: the first 200 bytes or more, all of them if the file has fewer.
    """
    if not start:
        return "it is empty: its download was cut off or never began"
    if not start.strip(b"\0"):
        return "it begins with zeros: its download reserved the room and was cut off"
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page: the download gave the page about the file, not the file"
    return None
