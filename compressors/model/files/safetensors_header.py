"""The header of a safetensors file: which tensors it holds, and where. Everything that the library refuses is refused.

The format (``safetensors/src/tensor.rs``): 8 bytes of the header's length, a JSON header, then the tensors' bytes, one
after the other, without holes, to the file's end. A name that stands there twice is refused too: the library takes one.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from compressors.model.errors import InputError
from compressors.model.files.json_file import parse_json
from compressors.model.files.raw_file import RawFile, instead_of_a_file
from compressors.model.files.storage_type import StorageType
from compressors.model.names import shown

__all__ = ["LARGEST_HEADER", "TensorHeader", "damaged", "header_text", "parse_header", "read_header"]

LARGEST_HEADER = 100_000_000
"""The library's own limit, in bytes."""

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
_BITS |= {"F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}
_TOO_LARGE = 2**64


class TensorHeader(NamedTuple):
    """One tensor's entry in a file: place, format and shape, without its values. Large models have 20,000 of them."""

    file: Path
    name: str  # in the file
    format: str  # as the file calls it: BF16, F8_E4M3, I8 ...
    shape: tuple[int, ...]
    offset: int  # the place of its first byte in the file
    n_bytes: int  # on disk

    @property
    def storage_type(self) -> StorageType:
        """The format, if its values can be read.

        Raises:
            InputError: torch or this tool does not know such numbers.
        """
        if self.format not in StorageType.__members__:
            raise _unreadable(self.file, self.name, self.format)
        return StorageType[self.format]


def header_text(file: RawFile) -> bytes:
    """The JSON of a file's header.

    Raises:
        InputError: the file is truncated or not safetensors.
    """
    length = file.start(8)
    n_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or not 0 < n_bytes <= min(LARGEST_HEADER, file.size - 8):
        raise damaged(file.path, instead_of_a_file(file.start(200)) or "its header is not whole")
    return file.start(n_bytes, offset=8)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Reads the header of a file.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    file = RawFile(path)
    return parse_header(path, header_text(file), file.size)


def parse_header(path: Path, text: bytes, file_size: int) -> dict[str, TensorHeader]:
    """Parses the JSON of a header.

    Args:
        path: the file, for messages and for the entries.
        text: the header, without its length.
        file_size: bytes of the whole file.

    Raises:
        InputError: the text is not a header, or does not fit the file.
    """
    if not text.lstrip(b" \t\r\n").startswith(b"{"):
        raise damaged(path, "its header is no JSON object")
    problem = f"{path} is truncated or not a safetensors file: its header is not JSON"
    header = parse_json(text, problem, unique=lambda name: damaged(path, f"{shown(name)} is there twice"))
    _check_metadata(path, header.pop("__metadata__", None))
    first_byte = 8 + len(text)
    tensors = {name: _entry(path, name, entry, first_byte) for name, entry in header.items()}
    end = first_byte
    for tensor in sorted(tensors.values(), key=attrgetter("offset", "n_bytes")):
        if tensor.offset + tensor.n_bytes > file_size:
            raise damaged(path, f"tensor {shown(tensor.name)} ends after the file does")
        if tensor.offset != end:
            what = "begins inside another one" if tensor.offset < end else "does not begin where the one before ends"
            raise damaged(path, f"tensor {shown(tensor.name)} {what}")
        end = tensor.offset + tensor.n_bytes
    if end != file_size:
        raise damaged(path, f"{file_size - end:,} bytes at its end belong to no tensor")
    return tensors


def damaged(path: Path, why: str) -> InputError:
    """The error for a file that is not what its name says."""
    return InputError(f"{path} is truncated or not a safetensors file ({why}); download it again")


def _unreadable(path: Path, name: str, stored: str) -> InputError:
    readable = ", ".join(StorageType.__members__)
    return InputError(f"{path}: tensor {shown(name)} has dtype {shown(stored)}; only {readable} can be read")


def _entry(path: Path, name: str, entry: Any, first_byte: int) -> TensorHeader:
    try:
        stored, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged(path, f"the entry of tensor {shown(name)} is damaged") from None
    if isinstance(stored, str) and stored not in _BITS:
        raise _unreadable(path, name, stored)
    whole = isinstance(shape, list) and _are_sizes([start, end, *shape])
    n_bytes = _n_bytes(shape, _BITS[stored]) if whole and isinstance(stored, str) else None
    if n_bytes is None or n_bytes != end - start:
        raise damaged(path, f"the entry of tensor {shown(name)} is damaged")
    return TensorHeader(path, name, stored, tuple(shape), first_byte + start, n_bytes)


def _are_sizes(numbers: list[Any]) -> bool:
    return {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < _TOO_LARGE


def _n_bytes(shape: list[int], bits: int) -> int | None:
    """Bytes of a tensor; None where the library's 64-bit numbers overflow, or the last byte is not full."""
    n_bits = 1
    for factor in (*shape, bits):
        n_bits *= factor
        if n_bits >= _TOO_LARGE:
            return None
    return None if n_bits % 8 else n_bits // 8


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise damaged(path, "its __metadata__ are no texts")
