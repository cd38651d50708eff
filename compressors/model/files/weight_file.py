"""One safetensors file, read with plain reads into memory of our own (the library maps files into memory).

A tensor goes from the file into the buffer that the computation uses, and nowhere else. The format: 8 bytes of header
length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compressors.model.files.raw_file import RawFile
from compressors.model.files.safetensors_header import TensorHeader, header_text, parse_header

if TYPE_CHECKING:
    import torch

__all__ = ["StoredTensors", "WeightFile"]


class WeightFile:
    """The tensors of one file by name.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RawFile(path)
        text = header_text(self._file)
        self.header_sha256 = hashlib.sha256(self._file.start(8) + text).hexdigest()
        self.tensors: Mapping[str, TensorHeader] = parse_header(path, text, self._file.size)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its storage dtype, in new memory.

        Raises:
            InputError: the file was changed or cut off since it was opened, or holds numbers that cannot be read.
        """
        import torch

        header = self.tensors[name]
        out = torch.empty(header.shape, dtype=header.storage_type.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        """Fills ``out`` with the tensor's values from the one with flat index ``first`` on.

        Args:
            name: the tensor's name.
            out: a contiguous tensor. If its dtype is not the stored one, a temporary of its size is needed.
            first: flat index of the first value; ``out`` decides how many there are.

        Raises:
            InputError: the file was changed or cut off since it was opened.
        """
        import torch

        header = self.tensors[name]
        assert out.is_contiguous() and first + out.numel() <= math.prod(header.shape), name
        dtype = header.storage_type.dtype
        stored = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        bytes_ = stored.view(-1).view(torch.uint8).numpy().data
        self._file.fill(name, bytes_, header.offset + first * dtype.itemsize)
        if stored is not out:
            out.copy_(stored)


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """A safetensors file as a mapping whose values are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = WeightFile(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __len__(self) -> int:
        return len(self._file.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._file.tensors
