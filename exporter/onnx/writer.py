"""Writes ``model.onnx`` and ``model.onnx.data``: the graph at once, the weights an expert or a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.model.integer_blocks import BlockType, IntegerBlocks
from compressors.model.onnx_blocks import from_q4_0, from_q8_0, pack
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.quantize import GGMLQuantizationType, quantize_rows, search_blocks
from compressors.statistics import Importance
from exporter.files import replacing
from exporter.onnx.encodings import Encoding
from exporter.onnx.graph import build_model
from exporter.onnx.layout import DATA_FILE, MODEL_FILE, TensorLayout, WeightPlan, plan_tensors
from exporter.pieces import Piece, row_slices, write_pieces
from exporter.resumable import Part, is_published, resuming

__all__ = ["predict_size", "with_context", "write_onnx"]

_UNPACKED = {GGMLQuantizationType.Q4_0: from_q4_0, GGMLQuantizationType.Q8_0: from_q8_0}


def with_context(shape: MoeShape, context_length: int | None) -> MoeShape:
    """The model with a shorter context, which its rotary caches are made for; None keeps the model's own.

    Raises:
        InputError: the context is longer than the model's, or not positive.
    """
    if context_length is None:
        return shape
    if not 0 < context_length <= shape.context_length:
        raise InputError(
            f"a context of {context_length} tokens is asked for; the model has 1 to {shape.context_length}"
        )
    return replace(shape, context_length=context_length)


def predict_size(
    shape: MoeShape,
    preset: str,
    context_length: int | None = None,
    encodings: Mapping[str, str] | None = None,
) -> int:
    """Bytes of ``model.onnx`` and ``model.onnx.data`` together, exactly; reads no weight.

    Args:
        shape: the model.
        preset: a name from :data:`exporter.onnx.encodings.PRESETS`.
        context_length: tokens that the rotary caches cover; None for the model's own maximum.
        encodings: of units that differ from the preset, as :func:`~exporter.onnx.layout.plan_tensors` takes them.

    Raises:
        InputError: there is no such preset, unit or encoding, or the context does not fit the model.
        UnsupportedError: the operators cannot hold the model so.
    """
    layout = plan_tensors(with_context(shape, context_length), preset, encodings)
    return layout.data_bytes + int(build_model(layout).ByteSize())


def write_onnx(
    student: Student,
    preset: str,
    folder: Path,
    *,
    encodings: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    context_length: int | None = None,
    threads: int,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the student's graph and weights into ``folder``, which is made if it is missing.

    Q4_0 and Q8_0 weights are quantized with ggml's kernels, so a GGUF file of the same types and importance holds the
    same numbers; other blocks by :func:`compressors.quantize.blocks.search_blocks`. The bytes do not depend on
    ``threads``. ``model.onnx`` appears last: a folder without it is unfinished. On any
    failure a model that was there stays as it was.

    Args:
        student: the model to write.
        preset: a name from :data:`exporter.onnx.encodings.PRESETS`.
        folder: where the two files go.
        encodings: of units that differ from the preset, as :func:`~exporter.onnx.layout.plan_tensors` takes them.
        importance: weighs quantization errors; None weighs all input features alike.
        context_length: tokens that the rotary caches cover; None for the model's own maximum.
        threads: experts or slices that are quantized at a time.
        resume: go on with what an attempt with the same arguments left in ``folder``, and leave what is written there
            if this one fails. Without it nothing is left behind.
        progress: is called with the number of bytes written since its last call.

    Raises:
        InputError: no such preset, unit, encoding or context; a weight is not finite or cannot be read; the disk is
            full.
        UnsupportedError: the operators cannot hold the model so.
    """
    layout = plan_tensors(with_context(student.shape, context_length), preset, encodings)
    model = build_model(layout)
    graph = model.SerializeToString(deterministic=True)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = list(_plan_pieces(student, layout, importance or {}))
    with replacing(folder / MODEL_FILE) as graph_stream:
        graph_stream.write(graph)
        if resume and is_published(folder / DATA_FILE, pieces):
            return
        with resuming(folder / DATA_FILE, graph, pieces, keep=resume) as file:
            write_pieces(file, pieces, threads=threads, progress=progress)
            (folder / MODEL_FILE).unlink(missing_ok=True)  # an old graph must not be found beside the new weights


def _plan_pieces(student: Student, layout: TensorLayout, importance: Importance) -> Iterator[Piece]:
    """The weights in the file's order, whole experts and slices of other matrices, then the rotary caches."""
    for weight in layout.weights:
        if weight.roles[0].is_expert:
            *n_experts, rows_each, _ = weight.shape  # a dense feed-forward is the only expert
            for expert in range(prod(n_experts)):
                places = _places(weight, slice(expert * rows_each, (expert + 1) * rows_each))
                yield _piece(places, partial(_read_expert, student, weight, expert, importance, places))
        else:
            for rows in row_slices(prod(weight.shape[:-1]), weight.shape[-1]):
                places = _places(weight, rows)
                yield _piece(places, partial(_read_rows, student, weight, rows, importance, places))
    caches = [_Place(tensor.offset, tensor.n_bytes) for tensor in (layout.rotary_cosine, layout.rotary_sine)]
    yield _piece(caches, lambda: partial(_rotary_parts, layout.shape, caches))


@dataclass(frozen=True)
class _Place:
    """Some bytes of the data file."""

    offset: int
    n_bytes: int

    def part(self, values: npt.NDArray[np.generic]) -> Part:
        """The values as bytes, with the offset where they belong."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        assert data.nbytes == self.n_bytes, f"{data.nbytes} bytes for a place of {self.n_bytes}"
        return self.offset, data


def _places(weight: WeightPlan, rows: slice) -> list[_Place]:
    """Finds the places of some rows of a weight: of its codes, and of its scales if it has any."""
    places = []
    for tensor in weight.tensors:
        row_bytes = tensor.n_bytes // prod(weight.shape[:-1])
        places.append(_Place(tensor.offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes))
    return places


def _piece(places: Sequence[_Place], read: Callable[[], Callable[[], list[Part]]]) -> Piece:
    """The last of the places ends where the piece does: scales lie behind their codes."""
    return Piece(sum(place.n_bytes for place in places), places[-1].offset + places[-1].n_bytes, read)


@dataclass(frozen=True)
class _Matrix:
    """Rows of one role, with what weighs their columns."""

    values_RN: torch.Tensor  # storage dtype
    importance_N: torch.Tensor | None
    name: str


def _read_expert(
    student: Student, weight: WeightPlan, expert: int, importance: Importance, places: Sequence[_Place]
) -> Callable[[], list[Part]]:
    """Reads one expert; what it returns quantizes it."""
    assert weight.layer is not None
    matrices = []
    for role in weight.roles:
        values_RN = student.expert(role, weight.layer, expert)
        weights = importance.get((role, weight.layer))
        name = f"{weight.codes.name}[{expert}] ({role})"
        matrices.append(_Matrix(values_RN, None if weights is None else weights[expert], name))
    return partial(_encode, matrices, weight.encoding, places)


def _read_rows(
    student: Student, weight: WeightPlan, rows: slice, importance: Importance, places: Sequence[_Place]
) -> Callable[[], list[Part]]:
    """Reads rows of a weight that is no expert's; a norm is a matrix of one row."""
    (role,) = weight.roles
    if len(weight.shape) == 1:
        values_RN = student.tensor(role, weight.layer)[None]
    else:
        values_RN = student.rows(role, weight.layer, rows)
    matrix = _Matrix(values_RN, importance.get((role, weight.layer)), weight.codes.name)
    return partial(_encode, [matrix], weight.encoding, places)


def _encode(matrices: Sequence[_Matrix], encoding: Encoding, places: Sequence[_Place]) -> list[Part]:
    """Quantizes; rows of several matrices alternate."""
    if encoding.blocks is None:
        float32 = [quantize_rows(matrix.values_RN, GGMLQuantizationType.F32, name=matrix.name) for matrix in matrices]
        return [places[0].part(_alternating(float32))]
    quantized = [_blocks(matrix, encoding, encoding.blocks) for matrix in matrices]
    codes = _alternating([pack(blocks.codes_RN, blocks.bits) for blocks in quantized])
    scales = _alternating([blocks.scales_RK.astype(np.float16) for blocks in quantized])
    return [places[0].part(codes), places[1].part(scales)]


def _blocks(matrix: _Matrix, encoding: Encoding, blocks: BlockType) -> IntegerBlocks:
    """Codes and scales by ggml's kernel where there is one, else by our search."""
    if encoding.ggml_type is not None:
        rows = quantize_rows(matrix.values_RN, encoding.ggml_type, matrix.importance_N, name=matrix.name)
        return _UNPACKED[encoding.ggml_type](rows)
    return search_blocks(matrix.values_RN, blocks.bits, blocks.block_size, matrix.importance_N, name=matrix.name)


def _alternating(rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The first rows of all matrices, then the second, and so on."""
    return rows[0] if len(rows) == 1 else np.stack(rows, axis=1).reshape(-1, rows[0].shape[1])


def _rotary_parts(shape: MoeShape, places: Sequence[_Place]) -> list[Part]:
    caches = _rotary_caches(shape)
    return [place.part(cache.numpy()) for place, cache in zip(places, caches, strict=True)]


def _rotary_caches(shape: MoeShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, float32 [rows, head_dim / 2], as transformers computes them.

    Each table is that of a text as long as its rows.
    """
    tables = [
        torch.outer(torch.arange(n_tokens, dtype=torch.float32), shape.rope.inverse_frequencies(n_tokens))
        for n_tokens in shape.rope.table_lengths(shape.context_length)
    ]
    angles = torch.cat(tables)
    return angles.cos() * shape.rope.attention_factor, angles.sin() * shape.rope.attention_factor
