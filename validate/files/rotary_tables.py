"""The tables of cosines and sines in an ONNX graph, beside those that a model's rotary embedding makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.description.rope import Rope
from compressors.model.description.spec import ModelSpec
from compressors.model.files.onnx_graph import external_place
from compressors.model.files.onnx_names import ROTARY_COSINE, ROTARY_SINE
from validate.files.graph_places import Places

__all__ = ["table_symptoms"]

_POSITIONS_AT_ONCE = 4096
_TABLE_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def table_symptoms(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], folder: Path, spec: ModelSpec
) -> Iterator[str]:
    """Checks every table of cosines and of sines that a node rotates with."""
    places = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
    # name -> True if it holds sines, and the embedding of the first layer that uses it
    tables: dict[str, tuple[bool, Rope | None]] = {}
    layers = Places(spec)
    for node in graph.node:
        rope = spec.layers[layers.of(node, is_inside=False)].mixer.rope or spec.rope
        for is_sine, place in enumerate(places.get(node.op_type, ())):
            if len(node.input) > place and node.input[place] in weights:
                tables.setdefault(node.input[place], (bool(is_sine), rope))
    # where the angles depend on a text's length, nodes choose among tables
    for name in (ROTARY_COSINE, ROTARY_SINE):
        if name in weights:
            tables[name] = (name == ROTARY_SINE, spec.rope)
    for name, (is_sine, rope) in tables.items():
        if len(weights[name].dims) != 2 or weights[name].data_type not in _TABLE_TYPES:
            yield f"table {name} is no matrix of floating point numbers"
            continue
        if rope is None:
            yield f"table {name}: the model turns nothing"
            continue
        n_rows = weights[name].dims[0]
        yield from _rotary_symptoms(name, _pieces(weights[name], folder), n_rows, rope, is_sine=is_sine)


def _rotary_symptoms(
    name: str, pieces: Iterator[npt.NDArray[np.floating[Any]]], n_rows: int, rope: Rope, *, is_sine: bool
) -> Iterator[str]:
    """Yields a sentence if a table [positions, width / 2] is not the model's at every position.

    A table for short texts may stand before that for long ones.
    """
    first = 0
    short = rope.switches_after if rope.switches_after is not None and n_rows > rope.switches_after else 0
    of_short, of_long = (rope.inverse_frequencies(n_tokens).double().numpy() for n_tokens in (short, n_rows - short))
    for piece in pieces:
        if piece.shape[1] != len(of_long):
            yield f"table {name} has {piece.shape[1]} columns, the model's head {len(of_long)} pairs"
            return
        rows = np.arange(first, first + len(piece), dtype=np.float64)[:, None]
        angles = np.where(rows < short, rows * of_short, (rows - short) * of_long)
        wanted = rope.attention_factor * (np.sin(angles) if is_sine else np.cos(angles))
        allowed = float(np.finfo(piece.dtype).eps) * 2 + 1e-5 + 4e-7 * angles  # angles are computed in float32
        wrong = ~(np.abs(piece.astype(np.float64) - wanted) <= allowed * max(1.0, rope.attention_factor))
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            yield (
                f"rotary table {name}: {float(piece[row, column]):.5f} at position {first + row}, column {column}, the "
                f"model's is {wanted[row, column]:.5f}"
            )
            return
        first += len(piece)


def _pieces(tensor: onnx.TensorProto, folder: Path) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """Rows of a table, some positions at a time."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    n_rows, width = tensor.dims
    if not tensor.external_data:
        yield onnx.numpy_helper.to_array(tensor)
        return
    place = external_place(folder / "model.onnx", tensor)  # only the folder of this path matters
    for first in range(0, n_rows, _POSITIONS_AT_ONCE):
        count = min(_POSITIONS_AT_ONCE, n_rows - first)
        offset = place.offset + first * width * dtype.itemsize
        yield np.fromfile(place.file, dtype, count * width, offset=offset).reshape(count, width)
