"""An array on disk that is read and written a few rows at a time, with plain reads and writes.

A memory map would be shorter, but its pages count as resident memory for as long as the system lets them stay. The
format is NumPy's ``.npy``.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError

__all__ = ["ArrayFile"]


class ArrayFile:
    """Rows of fixed shape and dtype. Open one with :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[np.generic], offset: int, flags: int):
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self._offset = offset
        self._row_bytes = prod(shape[1:]) * dtype.itemsize
        self._descriptor = os.open(path, flags)
        weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def create(cls, path: Path, shape: Sequence[int], dtype: npt.DTypeLike) -> ArrayFile:
        """Creates a file of this shape, all zeros; it takes space on disk as rows are written."""
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            file.truncate(offset + prod(shape) * np.dtype(dtype).itemsize)
        return cls(path, tuple(shape), np.dtype(dtype), offset, os.O_RDWR)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> ArrayFile:
        """Opens an existing file.

        Raises:
            InputError: it is missing, damaged or cut off.
        """
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                offset = file.tell()
            missing = offset + prod(shape) * dtype.itemsize - path.stat().st_size
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error})") from None
        if missing > 0:
            raise InputError(f"{path} cannot be read ({missing} bytes are missing at its end)")
        return cls(path, shape, dtype, offset, os.O_RDWR if writable else os.O_RDONLY)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Reads rows start..stop into new memory.

        Raises:
            InputError: the file was cut off since it was opened.
        """
        out = np.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        target, offset = out.reshape(-1).view(np.uint8).data, self._offset + start * self._row_bytes
        while target:
            n_read = os.preadv(self._descriptor, [target], offset)
            if n_read == 0:
                raise InputError(f"{self.path} cannot be read (it was cut off while this run was reading it)")
            target, offset = target[n_read:], offset + n_read
        return out

    def write(self, start: int, rows: npt.NDArray[np.generic]) -> None:
        """Writes these rows from row ``start`` on.

        Raises:
            OSError: the disk is full or failed; the error names the file.
        """
        assert rows.dtype == self.dtype and rows.shape[1:] == self.shape[1:], (rows.dtype, rows.shape)
        assert start + len(rows) <= len(self), f"{start} + {len(rows)} rows in {self.path}"
        source = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = self._offset + start * self._row_bytes
        while source:
            try:
                n_written = os.pwrite(self._descriptor, source, offset)
            except OSError as error:  # a full disk: the system knows the descriptor only
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            source, offset = source[n_written:], offset + n_written
