"""Writes a student as one GGUF file, streaming: a few experts or slices of larger matrices are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from compressors.model.families import Role
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.quantize import quantize_rows, row_bytes
from compressors.statistics import Importance
from exporter.gguf.container import TensorEntry, Value, aligned, render_header, render_values
from exporter.gguf.layout import GgufTensor, plan_tensors
from exporter.gguf.metadata import model_metadata
from exporter.gguf.vocabulary import vocabulary_metadata
from exporter.pieces import Piece, row_slices, write_pieces
from exporter.resumable import Part, is_published, resuming

__all__ = ["predict_file_size", "write_gguf"]


def predict_file_size(
    shape: MoeShape, source_folder: Path, mix: str, name: str, types: Mapping[str, str] | None = None
) -> int:
    """Exact size in bytes of the file that :func:`write_gguf` would write for a student of this shape.

    ``source_folder`` is the teacher's checkpoint: tokenizer and licence come from there. No weight is read.
    The errors are those of :func:`write_gguf`, apart from the weights'.
    """
    tensors = plan_tensors(shape, mix, types)
    metadata = model_metadata(shape, source_folder, name, mix, types)
    return _file_size(_header(shape, source_folder, metadata, tensors), tensors)


def write_gguf(
    student: Student,
    mix: str,
    path: Path,
    *,
    types: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    name: str,
    threads: int,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes ``path``; a file that was there stays as it was until the new one is complete.

    The bytes depend on the student, the types, the importance and the name, not on the number of threads.

    Args:
        student: the model to write.
        mix: a name from :data:`exporter.gguf.mixes.MIXES`.
        path: the file.
        types: by tensor name, the name of another type than the mix gives (:func:`~exporter.gguf.layout.plan_tensors`).
        importance: weighs quantization errors; None weighs all input features alike.
        name: of the model, for ``general.name``.
        threads: experts or slices that are quantized at a time.
        resume: go on with what an attempt with the same arguments left beside ``path``, and leave what is written
            there if this one fails. Without it nothing is left behind.
        progress: is called with the number of bytes written since its last call.

    Raises:
        InputError: a weight is not finite, a type does not fit its tensor, the tokenizer is damaged, or the disk is
            full.
        UnsupportedError: llama.cpp cannot represent the model.
    """
    tensors = plan_tensors(student.shape, mix, types)
    metadata = model_metadata(student.shape, student.source.folder, name, mix, types)
    header = _header(student.shape, student.source.folder, metadata, tensors)
    pieces = [Piece(len(header), len(header), lambda: lambda: [(0, memoryview(header))])]
    for rows in _plan_rows(student, tensors, len(header)):
        pieces.append(Piece(rows.n_bytes, rows.offset + rows.n_bytes, partial(_read, student, rows, importance or {})))
    assert pieces[-1].end == _file_size(header, tensors), f"{path}: {pieces[-1].end} bytes planned"
    if resume and is_published(path, pieces):
        return
    with resuming(path, header, pieces, keep=resume) as file:
        write_pieces(file, pieces, threads=threads, progress=progress)


def _header(
    shape: MoeShape, source_folder: Path, metadata: Mapping[str, Value], tensors: tuple[GgufTensor, ...]
) -> bytes:
    metadata = {**metadata, **vocabulary_metadata(source_folder, shape.vocab_size)}
    entries = (TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors)
    return render_header(len(metadata), render_values(metadata), entries)


def _file_size(header: bytes, tensors: tuple[GgufTensor, ...]) -> int:
    return len(header) + sum(aligned(tensor.n_bytes) for tensor in tensors)


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one matrix, and where the file holds them. A norm is a matrix of one row."""

    tensor: GgufTensor
    expert: int | None
    rows: slice
    offset: int
    padding: int  # zeros after them, which the tensor's last rows have

    @property
    def n_bytes(self) -> int:
        """Their bytes in the file, padding included."""
        n_rows: int = self.rows.stop - self.rows.start
        return n_rows * row_bytes(self.tensor.ggml_type, self.tensor.row_length) + self.padding


def _plan_rows(student: Student, tensors: tuple[GgufTensor, ...], offset: int) -> Iterator[_Rows]:
    """Everything after the header, in the file's order: whole experts, and slices of other matrices."""
    for tensor in tensors:
        n_rows, padding = prod(tensor.shape[:-1]), aligned(tensor.n_bytes) - tensor.n_bytes
        if tensor.role.is_expert:
            step = n_rows // student.shape.n_experts
            slices = [slice(first, first + step) for first in range(0, n_rows, step)]
        else:  # rows of one head stay together: they may have to be permuted
            slices = row_slices(n_rows, tensor.row_length, multiple=student.shape.head_dim)
        for number, rows in enumerate(slices):
            expert = number if tensor.role.is_expert else None
            at = offset + rows.start * row_bytes(tensor.ggml_type, tensor.row_length)
            yield _Rows(tensor, expert, rows, at, padding if rows.stop == n_rows else 0)
        offset += aligned(tensor.n_bytes)


def _read(student: Student, rows: _Rows, importance: Importance) -> Callable[[], list[Part]]:
    """Reads the values, in storage dtype; what it returns quantizes them."""
    tensor = rows.tensor
    if tensor.values is not None:
        return partial(_quantize, rows, torch.tensor(tensor.values)[None], None, tensor.name)
    weights = importance.get((tensor.role, tensor.layer))
    if rows.expert is None:
        values_RN = _matrix_rows(student, tensor, rows.rows)
    else:
        assert tensor.layer is not None
        values_RN = student.expert(tensor.role, tensor.layer, rows.expert)
        weights = None if weights is None else weights[rows.expert]
    return partial(_quantize, rows, values_RN, weights, student.name(tensor.role, tensor.layer, rows.expert))


def _quantize(rows: _Rows, values_RN: torch.Tensor, weights_N: torch.Tensor | None, name: str) -> list[Part]:
    data = quantize_rows(values_RN, rows.tensor.ggml_type, weights_N, name=name).data
    return [(rows.offset, data), (rows.offset + data.nbytes, memoryview(bytes(rows.padding)))]


def _matrix_rows(student: Student, tensor: GgufTensor, rows: slice) -> torch.Tensor:
    """Rows of a tensor that is not an expert's, in storage dtype and llama.cpp's order."""
    if len(tensor.shape) == 1:
        return student.tensor(tensor.role, tensor.layer)[None]
    values_RN = student.rows(tensor.role, tensor.layer, rows)
    if student.family.gguf.rotary_is_interleaved and tensor.role in (Role.QUERY, Role.KEY):
        return _interleave_rotary_rows(values_RN, len(values_RN) // student.shape.head_dim)
    return values_RN


def _interleave_rotary_rows(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Puts the rows of each head that one rotation mixes, i and i + head_dim / 2, side by side.

    ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``.
    """
    n_rows, n_inputs = weight.shape
    return weight.reshape(n_heads, 2, n_rows // n_heads // 2, n_inputs).transpose(1, 2).reshape(n_rows, n_inputs)
