"""Hidden states of many token blocks between two decoder layers, in memory or, when they do not fit, in a file."""

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
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, spill: Path | None = None) -> None:
        self.shape = shape
        self.dtype = dtype
        self.spill = spill
        self._memory = torch.empty(shape, dtype=dtype) if spill is None else None
        self._file = None if spill is None else _nameless_file(spill, shape, dtype)

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
        """Replaces these blocks."""
        if self._memory is not None:
            self._memory[blocks] = states_BTD
            return
        assert self._file is not None
        self._file.write(blocks.start, _as_numpy(states_BTD.to(self.dtype)))

    def groups(self, n_blocks: int) -> Iterator[slice]:
        """Consecutive slices of at most ``n_blocks`` blocks."""
        for start in range(0, len(self), n_blocks):
            yield slice(start, min(start + n_blocks, len(self)))

    def save(self, path: Path) -> None:
        """Writes all values to a file that :meth:`load` reads."""
        file = ArrayFile.create(path, self.shape, _NUMPY_DTYPES[self.dtype])
        for blocks in self.groups(8):
            file.write(blocks.start, _as_numpy(self.read(blocks)))

    def load(self, path: Path) -> None:
        """Takes all values from a file that :meth:`save` wrote.

        Raises:
            InputError: the file cannot be read.
        """
        file = ArrayFile.open(path)
        assert file.shape == self.shape, f"{path} holds {file.shape}, not {self.shape}"
        for blocks in self.groups(8):
            self.write(blocks, torch.from_numpy(file.read(blocks.start, blocks.stop)).view(self.dtype))


# NumPy has no bfloat16: its bits travel as 16-bit integers
_NUMPY_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16}


def _as_numpy(states: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    plain = states.view(torch.int16) if states.dtype == torch.bfloat16 else states
    return plain.contiguous().numpy()


def _nameless_file(folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> ArrayFile:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as file:  # the open file outlives its name
        return ArrayFile.create(Path(file.name), shape, _NUMPY_DTYPES[dtype])
