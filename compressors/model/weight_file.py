"""One safetensors file, read with plain reads into memory of our own (the library maps files into memory).

A tensor goes from the file into the buffer that will be computed with, and nowhere else. The format: 8 bytes of header
length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressors.model.errors import InputError
from compressors.model.raw_file import RawFile

__all__ = ["StoredTensors", "TensorHeader", "WeightFile"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies, without its values."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file

    @property
    def n_bytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile:
    """The tensors of one file by name.

    Raises:
        InputError: the file is missing, truncated or not safetensors, or holds a dtype we do not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RawFile(path)
        header, self.header_sha256 = self._read_header()
        self.tensors: Mapping[str, TensorHeader] = {
            name: self._tensor_header(name, entry) for name, entry in header.items() if name != "__metadata__"
        }

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in its storage dtype, in new memory.

        Raises:
            InputError: the file was changed or cut off since it was opened.
        """
        header = self.tensors[name]
        out = torch.empty(header.shape, dtype=header.dtype)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor, first: int = 0) -> None:
        """Fills ``out`` with the tensor's values from the one with flat index ``first`` on.

        Args:
            name: which tensor.
            out: a contiguous tensor. Another dtype than the stored one costs a temporary of its size.
            first: flat index of the first value; ``out`` decides how many there are.

        Raises:
            InputError: the file was changed or cut off since it was opened.
        """
        header = self.tensors[name]
        assert out.is_contiguous() and first + out.numel() <= math.prod(header.shape), name
        stored = out if out.dtype == header.dtype else torch.empty_like(out, dtype=header.dtype)
        bytes_ = stored.view(-1).view(torch.uint8).numpy().data
        self._file.fill(name, bytes_, header.offset + first * header.dtype.itemsize)
        if stored is not out:
            out.copy_(stored)

    def _read_header(self) -> tuple[Mapping[str, Any], str]:
        length = self._file.start(8)
        n_bytes = int.from_bytes(length, "little")
        if len(length) < 8 or not 0 < n_bytes <= min(_LARGEST_HEADER, self._file.size - 8):
            raise self._damaged("its header is not whole")
        text = self._file.start(n_bytes, offset=8)
        try:
            header = json.loads(text)
        except ValueError:
            raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        self._first_byte = 8 + n_bytes
        return header, hashlib.sha256(length + text).hexdigest()

    def _tensor_header(self, name: str, entry: Any) -> TensorHeader:
        try:
            dtype, shape = entry["dtype"], tuple(int(length) for length in entry["shape"])
            start, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"the entry of tensor {name} is damaged") from None
        if dtype not in _DTYPES:
            raise InputError(f"{self.path}: tensor {name} has dtype {dtype}; only {', '.join(_DTYPES)} can be read")
        header = TensorHeader(self.path, _DTYPES[dtype], shape, self._first_byte + start)
        if start < 0 or min(shape, default=0) < 0 or header.n_bytes != end - start:
            raise self._damaged(f"the entry of tensor {name} is damaged")
        if self._first_byte + end > self._file.size:
            raise self._damaged(f"tensor {name} ends after the file does")
        return header

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self.path} is truncated or not a safetensors file ({why}); download it again")


class StoredTensors(Mapping[str, torch.Tensor]):
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
