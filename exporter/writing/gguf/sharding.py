"""Cuts a GGUF file into several, as llama.cpp's ``llama-gguf-split`` does: llama.cpp loads all of them from the first.

The first has all metadata, every one has its number and their count (``tools/gguf-split/gguf-split.cpp``). A tensor is
never cut, and tensors keep their order.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from gguf.constants import GGUFValueType

from compressors.model.files.gguf.gguf_file import GgufEntry, GgufFile
from compressors.model.files.gguf.gguf_split import COUNT_KEY, NUMBER_KEY, TENSORS_KEY
from exporter.writing.gguf.container import TensorEntry, Value, aligned, render_header, render_values

__all__ = ["shard_gguf"]

_COPIED_BYTES = 16 << 20  # at a time


def shard_gguf(source: Path, folder: Path, most_bytes: int) -> list[Path]:
    """Writes the parts of a file into a folder; none, if the file is no larger than a part may be.

    Args:
        source: the file.
        folder: takes the parts, whose names end in ``-00001-of-00003.gguf``.
        most_bytes: the size of a part. Only one that holds a single, larger tensor is larger.

    Returns:
        The parts in their order.

    Raises:
        InputError: the file is damaged.
        OSError: a part cannot be written.
    """
    if source.stat().st_size <= most_bytes:
        return []
    file = GgufFile(source)
    metadata = {key: Value(encoded) for key, encoded in file.stored_values("").items()}
    shares = _shares(list(file.tensors.values()), metadata, most_bytes)
    parts = []
    for number, entries in enumerate(shares):
        part = folder / f"{source.stem}-{number + 1:05}-of-{len(shares):05}.gguf"
        header = _header(number, len(shares), len(file.tensors), metadata if number == 0 else {}, entries)
        _write_part(file, entries, header, part)
        parts.append(part)
    return parts


def _shares(entries: Sequence[GgufEntry], metadata: Mapping[str, Value], most_bytes: int) -> list[list[GgufEntry]]:
    """The tensors of each part: as many as fit beside its header, and at least one."""
    shares: list[list[GgufEntry]] = [[]]
    header_bytes = len(render_values(metadata)) + _FIXED_BYTES
    data_bytes = 0
    for entry in entries:
        header_bytes += _directory_bytes(entry)
        data_bytes += aligned(entry.n_bytes)
        if shares[-1] and aligned(header_bytes) + data_bytes > most_bytes:
            shares.append([])
            header_bytes, data_bytes = _FIXED_BYTES + _directory_bytes(entry), aligned(entry.n_bytes)
        shares[-1].append(entry)
    return shares


def _directory_bytes(entry: GgufEntry) -> int:
    """The bytes of a tensor's line in the directory: name, number of dimensions, dimensions, type and place."""
    return 8 + len(entry.name.encode()) + 4 + 8 * len(entry.shape) + 4 + 8


def _header(
    number: int, count: int, n_tensors: int, metadata: Mapping[str, Value], entries: Sequence[GgufEntry]
) -> bytes:
    own = {
        NUMBER_KEY: Value(struct.pack("<IH", GGUFValueType.UINT16, number)),
        TENSORS_KEY: Value(struct.pack("<Ii", GGUFValueType.INT32, n_tensors)),
        COUNT_KEY: Value(struct.pack("<IH", GGUFValueType.UINT16, count)),
    }
    values = {**metadata, **own}
    directory = (TensorEntry(entry.name, entry.shape, entry.ggml_type, entry.n_bytes) for entry in entries)
    return render_header(len(values), render_values(values), directory)


_FIXED_BYTES = len(_header(0, 0, 0, {}, ()))
"""Bytes of a header without metadata and tensors."""


def _write_part(file: GgufFile, entries: Sequence[GgufEntry], header: bytes, path: Path) -> None:
    with path.open("wb") as part:
        part.write(header)
        for entry in entries:
            rows = prod(entry.shape[:-1])
            step = max(1, _COPIED_BYTES // entry.row_bytes)
            for first in range(0, rows, step):
                part.write(file.read_rows(entry, first, min(step, rows - first)).data)
            part.write(bytes(aligned(entry.n_bytes) - entry.n_bytes))
