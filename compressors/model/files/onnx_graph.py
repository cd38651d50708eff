"""Reads graphs that somebody else wrote, and finds the places of their weights' values."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has none
from onnx import TensorProto

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown

__all__ = ["ExternalPlace", "external_place", "read_graph"]

_LARGEST = 2**31 - 1  # bytes; protobuf's own limit


@dataclass(frozen=True)
class ExternalPlace:
    """The place of a weight's values outside of the graph."""

    file: Path
    offset: int  # bytes


def read_graph(path: Path) -> onnx.GraphProto:
    """Reads a graph without the values that lie in other files.

    Raises:
        InputError: the file cannot be opened, or is not an ONNX model with a graph; a name is not text, or a weight has
            another number of values than its shape says, or lies outside of the graph's folder.
    """
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} is not an ONNX model: it has {file.size:,} bytes, and none can have more than 2 GiB")
    try:
        model = onnx.ModelProto.FromString(file.start(_LARGEST))
    except DecodeError as error:
        raise InputError(
            f"{path} is truncated or no model (no readable ONNX graph: {error}); export it again"
        ) from None
    graph: onnx.GraphProto = model.graph
    if not graph.node and not graph.initializer:
        raise InputError(f"{path} is truncated or no model (no readable ONNX graph: it is empty); export it again")
    _check_names(path, graph)
    for weight in graph.initializer:
        _check_weight(path, weight)
    return graph


def _check_names(path: Path, graph: onnx.GraphProto) -> None:
    """Refuses names that are not UTF-8, for which protobuf gives bytes."""
    named = [value.name for values in (graph.input, graph.output, graph.initializer) for value in values]
    for node in graph.node:
        named += [node.op_type, *node.input, *node.output]
        if not node.output:
            raise InputError(f"{path}: a node of type {shown(node.op_type)} has no output; export it again")
    wrong = next((name for name in named if not isinstance(name, str)), None)
    if wrong is not None:
        raise InputError(f"{path}: the name {shown(wrong)} is no UTF-8; export it again")


def _check_weight(path: Path, weight: onnx.TensorProto) -> None:
    """Refuses a weight whose number of values is not that of its shape."""
    name, dims = f"{path}: tensor {shown(weight.name)}", list(weight.dims)
    if any(length < 0 for length in dims) or len(dims) > _MOST_DIMENSIONS:
        raise InputError(f"{name} has dimensions {shown(dims)}, which no tensor has; export it again")
    if weight.data_type not in TensorProto.DataType.values() or weight.data_type == TensorProto.UNDEFINED:
        raise InputError(f"{name} is of type number {weight.data_type}, which ONNX does not have; export it again")
    n_values, value_bytes = prod(dims), _VALUE_BYTES.get(weight.data_type)
    if weight.external_data:
        place = external_place(path, weight)
        size = RawFile(place.file).size
        if value_bytes is not None and place.offset + n_values * value_bytes > size:
            raise InputError(f"{place.file} is truncated: tensor {shown(weight.name)} ends after the file does")
        return
    if weight.raw_data:
        n_stored = None if value_bytes is None else len(weight.raw_data) / value_bytes
    else:
        fields = (weight.float_data, weight.int32_data, weight.int64_data, weight.double_data, weight.uint64_data)
        n_stored = None if value_bytes is None else max(map(len, fields))
    if n_stored is not None and n_stored != n_values:
        raise InputError(f"{name} of shape {dims} has another number of values ({n_stored:g}); export it again")


_MOST_DIMENSIONS = 8
_VALUE_BYTES: dict[int, int] = {
    **dict.fromkeys((TensorProto.UINT8, TensorProto.INT8, TensorProto.BOOL), 1),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 2),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 4),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 8),
}
"""The bytes of a value by type; texts and types that pack values into a byte are left to the runtime."""


def external_place(graph_file: Path, weight: onnx.TensorProto) -> ExternalPlace:
    """Returns the place of a weight's ``external_data`` (``onnx.proto``: location, offset; paths are relative).

    Raises:
        InputError: the weight names no place, or one outside of the graph's folder.
    """
    # protobuf gives bytes where a text is not UTF-8
    said = {str(entry.key): str(entry.value) for entry in weight.external_data}
    location, offset = PurePosixPath(said.get("location", "")), said.get("offset") or "0"
    name = f"{graph_file}: tensor {shown(weight.name)}"
    if len(said) < len(weight.external_data) or len(str(location)) > _LONGEST_NAME:
        raise InputError(f"{name} names no file for its values, or too long a name; export it again")
    if not location.name or location.is_absolute() or ".." in location.parts or not str(location).isprintable():
        raise InputError(
            f"{name} lies in {shown(said.get('location'))}, which is no file in the graph's folder; export it again"
        )
    if not offset.isascii() or not offset.isdecimal() or len(offset) > _MOST_DIGITS:
        raise InputError(f"{name} begins at byte {shown(offset)} of its file, which is no number; export it again")
    return ExternalPlace(graph_file.parent / location, int(offset))


_LONGEST_NAME = 200
_MOST_DIGITS = 18  # the most digits of an offset
