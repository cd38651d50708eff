"""A weight file that is read with plain reads into memory of our own, and watched while it is read.

Files are not mapped into memory: mapped pages count as resident, and after one pass over a 60 GB model the process
would seem to hold all of it.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from compressors.model.errors import InputError
from compressors.model.regular_file import refuse_special

__all__ = ["FileState", "RawFile"]


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the one that was opened."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The file's state now."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def change_to(self, now: FileState) -> str | None:
        """What is different now, for a person; None if nothing is."""
        if self.size != now.size:
            return f"it had {self.size} bytes and now has {now.size}"
        return None if self == now else "its time of modification is another"


class RawFile:
    """The bytes of a file.

    Raises:
        InputError: the file cannot be opened, or is a folder, a pipe or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_special(path)
        try:
            self._state = FileState.of(path)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path} cannot be opened ({error.strerror})") from None
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def size(self) -> int:
        """Bytes that the file had when it was opened."""
        return self._state.size

    def start(self, n_bytes: int, offset: int = 0) -> bytes:
        """The bytes from ``offset`` on, fewer if the file ends before: for headers."""
        return os.pread(self._descriptor, n_bytes, offset)

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
        if problem is not None:
            raise InputError(
                f"{self.path}: tensor {name} cannot be read: {problem}. Was the file changed or cut off while this "
                "run was reading it? Put the original back, then start again"
            )

    def _change(self) -> str | None:
        """What happened to the file since it was opened, None if nothing did."""
        try:
            return self._state.change_to(FileState.of(self.path))
        except OSError as error:
            return str(error.strerror)
