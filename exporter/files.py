"""Files that are complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from compressors.model.errors import InputError

__all__ = ["check_free_space", "flush", "flush_folder", "replacing", "write_atomically"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing and reading, that takes ``path``'s place once it is whole and on the disk.

    On an error nothing is left of it, and what was at ``path`` stays as it was.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that it is complete or absent."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def check_free_space(folder: Path, n_bytes: int) -> None:
    """Refuses to begin what cannot end.

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
