"""Files that are complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from compressors.model.errors import InputError

__all__ = [
    "check_free_space",
    "complete_or_absent",
    "flush",
    "flush_folder",
    "not_written",
    "replacing",
    "sha256_of",
    "storage_error",
    "write_at",
    "write_atomically",
    "write_note",
]

_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room or have the quota raised",
    errno.EFBIG: "have larger files allowed (ulimit -f, or another file system)",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing and reading that replaces ``path`` once it is complete and on the disk.

    On an error it is removed, and ``path`` stays as it was.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with _replacing(path) as file:
            yield file
    except OSError as error:
        raise not_written(path, error) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that it is complete or absent.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_note(path: Path, text: str) -> None:
    """Does the same for a file that belongs to another, whose writer reports failures.

    Raises:
        OSError: the file cannot be written.
    """
    with _replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Gives a place beside ``path`` to write to; its content replaces ``path`` at the end.

    Raises:
        InputError: ``path`` cannot be replaced.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        try:
            flush(partial)
            partial.replace(path)
        except OSError as error:
            raise not_written(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def check_free_space(folder: Path, n_bytes: int) -> None:
    """Refuses to begin writing without enough space.

    Raises:
        InputError: the folder is missing, or has less than ``n_bytes`` free.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: nothing can be written there")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise InputError(
            f"{folder} needs {n_bytes} bytes, but only {free} are free there; make room or choose another --out"
        )


def not_written(path: Path, error: OSError, n_bytes_left: int | None = None, *, goes_on: bool = True) -> InputError:
    """Makes the error for a file that could not be written.

    Args:
        path: the file, or its folder.
        error: the system's error.
        n_bytes_left: the bytes of the file that are still to be written, if known.
        goes_on: True if the same command would continue the work of this one.
    """
    advice, reason = _ADVICE.get(error.errno or 0), error.strerror or str(error) or type(error).__name__
    if advice is None:
        return InputError(f"{path} cannot be written ({reason})")
    folder = path if path.is_dir() else path.parent
    rest = "any more files" if folder == path else f"the rest of {path.name}"
    left = "" if n_bytes_left is None else f": {n_bytes_left} more bytes are needed"
    free = f", {shutil.disk_usage(folder).free} are free" if folder.is_dir() else ""
    return InputError(
        f"{folder} cannot take {rest} ({reason}){left}{free}; {advice} and run the same command again"
        + (", it goes on where it stopped" if goes_on else "")
    )


def storage_error(error: Exception, place: Path, *, goes_on: bool = True) -> InputError | None:
    """Makes the error for a file that could not be written or read; None if ``error`` is about something else.

    Libraries written in Rust put the system's error into their message; NumPy only says that bytes are left.

    Args:
        error: an error of the system or a library.
        place: the folder that was written to, in case the error does not name the file.
        goes_on: True if the same command would continue the work of this one.
    """
    if isinstance(error, OSError):
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else place
        if error.errno is None and re.search(r"requested and \d+ written|free space", str(error)):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if error.errno not in _ADVICE:
            return InputError(f"{path}: {error.strerror or error}")
        return not_written(path, error, goes_on=goes_on)
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        return None
    return not_written(place, OSError(int(number[1]), os.strerror(int(number[1]))), goes_on=goes_on)


def flush_folder(folder: Path) -> None:
    """Flushes every file below a folder, and the folders, to disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Flushes one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, offset: int, data: memoryview) -> int:
    """Writes all of the data at this place of an open file; returns how many bytes that were."""
    rest = data.cast("B")
    while rest:  # the system may take less than it is given
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
    return data.nbytes


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
