"""Graphs that somebody else wrote: read, and where their weights' values lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has none

from compressors.model.errors import InputError
from compressors.model.names import shown
from compressors.model.raw_file import RawFile

__all__ = ["ExternalPlace", "external_place", "read_graph"]

_LARGEST = 2**31 - 1  # bytes; protobuf's own limit


@dataclass(frozen=True)
class ExternalPlace:
    """Where a weight's values lie outside of the graph."""

    file: Path
    offset: int  # bytes


def read_graph(path: Path) -> onnx.GraphProto:
    """Reads a graph without the values that lie in other files.

    Raises:
        InputError: the file cannot be opened, or is no ONNX model with a graph.
    """
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} is no ONNX model: it has {file.size:,} bytes, and none can have more than 2 GiB")
    try:
        model = onnx.ModelProto.FromString(file.start(_LARGEST))
    except DecodeError as error:
        raise InputError(f"{path} is no readable ONNX graph ({error}); export it again") from None
    graph: onnx.GraphProto = model.graph
    if not graph.node and not graph.initializer:
        raise InputError(f"{path} is no readable ONNX graph (there is nothing in it); export it again")
    for weight in graph.initializer:
        if any(length < 0 for length in weight.dims):
            raise InputError(f"{path}: tensor {shown(weight.name)} has a negative dimension; export it again")
    return graph


def external_place(graph_file: Path, weight: onnx.TensorProto) -> ExternalPlace:
    """Where the values of a weight with ``external_data`` lie (``onnx.proto``: location, offset; paths are relative).

    Raises:
        InputError: it does not say so, or names a place outside of the graph's folder.
    """
    # protobuf gives bytes where a text is no UTF-8
    said = {str(entry.key): str(entry.value) for entry in weight.external_data}
    location, offset = PurePosixPath(said.get("location", "")), said.get("offset") or "0"
    name = f"{graph_file}: tensor {shown(weight.name)}"
    if not location.name or location.is_absolute() or ".." in location.parts or not str(location).isprintable():
        raise InputError(
            f"{name} lies in {shown(said.get('location'))}, which is no file in the graph's folder; export it again"
        )
    if not offset.isascii() or not offset.isdecimal() or len(offset) > _MOST_DIGITS:
        raise InputError(f"{name} begins at byte {shown(offset)} of its file, which is no number; export it again")
    return ExternalPlace(graph_file.parent / location, int(offset))


_MOST_DIGITS = 18  # of an offset
