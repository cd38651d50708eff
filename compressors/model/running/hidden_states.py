"""Hidden states of many token blocks between two decoder layers, in memory or, when they do not fit, in a file.

A snapshot of states that lie in a file is that file, under another name: it stays as it is, and the next layer's
outputs go into a new one. So there are never more than two such files, the newest snapshot and the states in use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from compressors.model.files.array_file import ArrayFile

__all__ = ["HiddenStates"]


class HiddenStates:
    """[B, T, D] of float32 or bfloat16, read and written by token blocks.

    Args:
        shape: (B, T, D).
        dtype: float32 or bfloat16.
        spill: a folder for an unnamed file with the values, which vanishes with the process; None: they stay in memory.
        named: the file has a name, so that it can become a snapshot; whoever owns the folder removes it.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path | None = None, *, named: bool = False
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.spill = spill
        self._named = named
        self._memory = torch.empty(shape, dtype=dtype) if spill is None else None
        self._file = None if spill is None else _new_file(spill, shape, dtype, named=named)
        self._is_snapshot = False  # the file is one: it must stay as it is
        self._next: ArrayFile | None = None  # takes the place of a snapshot when all blocks are written
        self._n_next = 0  # blocks that it has

    @property
    def n_bytes(self) -> int:
        """Size of all values."""
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, blocks: slice) -> torch.Tensor:
        """Returns these blocks: [b, T, D]; change them by :meth:`write` only."""
        if self._memory is not None:
            return self._memory[blocks]
        assert self._file is not None
        return torch.from_numpy(self._file.read(blocks.start, blocks.stop)).view(self.dtype)

    def write(self, blocks: slice, states_BTD: torch.Tensor) -> None:
        """Replaces these blocks. After a snapshot, reads give its values until all blocks are replaced, each once."""
        if self._memory is not None:
            self._memory[blocks] = states_BTD
            return
        assert self._file is not None
        rows = _as_numpy(states_BTD.to(self.dtype))
        if not self._is_snapshot:
            self._file.write(blocks.start, rows)
            return
        if self._next is None:
            assert self.spill is not None
            self._next, self._n_next = _new_file(self.spill, self.shape, self.dtype, named=True), 0
        self._next.write(blocks.start, rows)
        self._n_next += len(rows)
        if self._n_next == len(self):
            self._file, self._next, self._is_snapshot = self._next, None, False

    def groups(self, n_blocks: int) -> Iterator[slice]:
        """Consecutive slices of at most ``n_blocks`` blocks."""
        for start in range(0, len(self), n_blocks):
            yield slice(start, min(start + n_blocks, len(self)))

    def save(self, path: Path) -> None:
        """Puts all values into a file that :meth:`load` reads: a copy, or the file that they lie in, if it is named."""
        if self._named and self._file is not None and not self._is_snapshot:
            self._file.path.rename(path)
            self._is_snapshot = True
            return
        file = ArrayFile.create(path, self.shape, _NUMPY_DTYPES[self.dtype])
        for blocks in self.groups(8):
            file.write(blocks.start, _as_numpy(self.read(blocks)))

    def load(self, path: Path) -> None:
        """Takes all values from a file that :meth:`save` wrote; one in a file uses that, and leaves it as it is.

        Raises:
            InputError: the file cannot be read.
        """
        file = ArrayFile.open(path)
        assert file.shape == self.shape, f"{path} holds {file.shape}, not {self.shape}"
        if self._named and self._file is not None:
            self._file.path.unlink()
            self._file, self._is_snapshot = file, True
            return
        for blocks in self.groups(8):
            self.write(blocks, torch.from_numpy(file.read(blocks.start, blocks.stop)).view(self.dtype))


# NumPy has no bfloat16: its bits travel as 16-bit integers
_NUMPY_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16}


def _as_numpy(states: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    plain = states.view(torch.int16) if states.dtype == torch.bfloat16 else states
    return plain.contiguous().numpy()


def _new_file(folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, named: bool) -> ArrayFile:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=not named) as file:
        # without a name, the open file outlives it
        return ArrayFile.create(Path(file.name), shape, _NUMPY_DTYPES[dtype])
