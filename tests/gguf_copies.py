"""Copies of GGUF files with other metadata, and in parts: inputs that no honest converter writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

__all__ = ["Stored", "Typed", "copy_gguf", "split_gguf"]

Typed = tuple[Any, GGUFValueType]
"""A value and the kind that it is written as."""


Stored = tuple[npt.NDArray[Any], GGMLQuantizationType]
"""The stored bytes of a tensor's rows, and their type."""


def copy_gguf(
    source: Path, target: Path, changes: Mapping[str, Typed | None], tensors: Mapping[str, Stored] | None = None
) -> None:
    """Writes a copy whose metadata has these values, and some other tensors, new ones last; None leaves a key out."""
    reader = GGUFReader(source)
    writer = _writer(reader, target, changes)
    for tensor in reader.tensors:
        data, ggml_type = (tensors or {}).get(tensor.name, (tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, data, raw_dtype=ggml_type)
    there = {tensor.name for tensor in reader.tensors}
    for name, (data, ggml_type) in (tensors or {}).items():
        if name not in there:
            writer.add_tensor(name, data, raw_dtype=ggml_type)
    _write(writer)


def split_gguf(source: Path, prefix: Path, n_parts: int) -> list[Path]:
    """Writes a copy in parts, as ``llama-gguf-split`` does: the first holds all metadata."""
    reader = GGUFReader(source)
    paths = [prefix.with_name(f"{prefix.name}-{n:05}-of-{n_parts:05}.gguf") for n in range(1, n_parts + 1)]
    shares = np.array_split(np.arange(len(reader.tensors)), n_parts)
    for number, (path, tensors) in enumerate(zip(paths, shares, strict=True)):
        keys: dict[str, Typed | None] = {
            "split.no": (number, GGUFValueType.UINT16),
            "split.count": (n_parts, GGUFValueType.UINT16),
            "split.tensors.count": (len(reader.tensors), GGUFValueType.INT32),
        }
        writer = _writer(reader, path, keys) if number == 0 else GGUFWriter(path, "")
        if number > 0:
            writer.kv_data[0].clear()
            for key, typed in keys.items():
                assert typed is not None
                writer.add_key_value(key, *typed)
        for index in tensors.tolist():
            tensor = reader.tensors[index]
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        _write(writer)
    return paths


def _writer(reader: GGUFReader, target: Path, changes: Mapping[str, Typed | None]) -> GGUFWriter:
    writer = GGUFWriter(target, "")
    writer.kv_data[0].clear()  # it writes an architecture of its own accord
    values: dict[str, tuple[Any, ...] | None] = {
        name: (field.contents(), *field.types[:2]) for name, field in reader.fields.items() if "GGUF." not in name
    }
    for key, entry in (values | dict(changes)).items():
        if entry is not None:
            value, kind, *items = entry
            writer.add_key_value(key, value, kind, *items)
    return writer


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
