"""The header of a student's GGUF file, and with it the file's exact size, before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Origin
from exporter.writing.gguf.container import TensorEntry, Value, aligned, render_header, render_values
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata

__all__ = ["file_header", "file_size", "header_without_metadata", "predict_file_size"]


def predict_file_size(
    spec: ModelSpec, source: Origin, mix: str, name: str, types: Mapping[str, str] | None = None
) -> int:
    """Returns the exact size in bytes of the file that would be written for this student.

    ``source`` is the teacher: tokenizer and licence come from there. No weight is read. The errors are those of
    :func:`~exporter.writing.gguf.writer.write_gguf`, apart from the weights'.
    """
    tensors = plan_tensors(spec, mix, types)
    metadata = model_metadata(spec, source, name, mix, types)
    return file_size(file_header(spec, source, metadata, tensors), tensors)


def file_header(
    spec: ModelSpec, source: Origin, metadata: Mapping[str, Value], tensors: tuple[PlannedTensor, ...]
) -> bytes:
    """Returns all bytes before the tensors' data, padding included."""
    metadata = {**metadata, **vocabulary_metadata(source.tokenizer_folder, spec.vocab_size)}
    return render_header(len(metadata), render_values(metadata), _entries(tensors))


def header_without_metadata(tensors: tuple[PlannedTensor, ...]) -> bytes:
    """Returns the header of a file that holds tensors alone, which no runtime can load."""
    return render_header(0, b"", _entries(tensors))


def _entries(tensors: tuple[PlannedTensor, ...]) -> Iterator[TensorEntry]:
    return (TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors)


def file_size(header: bytes, tensors: tuple[PlannedTensor, ...]) -> int:
    """Returns the bytes of the file with this header."""
    return len(header) + sum(aligned(tensor.n_bytes) for tensor in tensors)
