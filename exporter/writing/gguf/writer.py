"""Writes a student as one GGUF file, streaming: a few experts or slices of larger matrices are held at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from compressors.calibration.statistics import Importance
from compressors.model.description.spec import ModelSpec
from compressors.model.sources.source import Origin
from compressors.model.sources.student import Student
from exporter.writing.feedback import StudentFeedback
from exporter.writing.gguf.container import TensorEntry, Value, aligned, render_header, render_values
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from exporter.writing.gguf.weights import weight_pieces
from exporter.writing.pieces import Piece, write_pieces
from exporter.writing.resumable import is_published, resuming

__all__ = ["predict_file_size", "write_gguf"]


def predict_file_size(
    spec: ModelSpec, source: Origin, mix: str, name: str, types: Mapping[str, str] | None = None
) -> int:
    """Returns the exact size in bytes of the file that :func:`write_gguf` would write for this student.

    ``source`` is the teacher: tokenizer and licence come from there. No weight is read.
    The errors are those of :func:`write_gguf`, apart from the weights'.
    """
    tensors = plan_tensors(spec, mix, types)
    metadata = model_metadata(spec, source, name, mix, types)
    return _file_size(_header(spec, source, metadata, tensors), tensors)


def write_gguf(
    student: Student,
    mix: str,
    path: Path,
    *,
    types: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    feedback: StudentFeedback | None = None,
    name: str,
    threads: int,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes ``path``; a file that was there stays as it was until the new one is complete.

    The bytes depend on the student, the types, importance, feedback and the name, not on the number of threads.

    Args:
        student: the model to write.
        mix: a name from :data:`exporter.writing.gguf.mixes.MIXES`.
        path: the file.
        types: by tensor name, the name of another type than the mix gives
            (:func:`~exporter.writing.gguf.layout.plan_tensors`).
        importance: weighs quantization errors; None weighs all input features alike.
        feedback: chooses the codes of most types again, so that they compensate each other's errors; None leaves them
            as the kernels choose them.
        name: the model's name, for ``general.name``.
        threads: experts or slices that are quantized at a time.
        resume: continue the files that an attempt with the same arguments left beside ``path``, and leave them there
            if this one fails. Without it nothing is left behind.
        progress: is called with the number of bytes written since its last call.

    Raises:
        InputError: a weight is not finite, a type does not fit its tensor, the tokenizer is damaged, or the disk is
            full.
        UnsupportedError: llama.cpp cannot represent the model.
    """
    tensors = plan_tensors(student.spec, mix, types)
    metadata = model_metadata(student.spec, student.source, name, mix, types)
    header = _header(student.spec, student.source, metadata, tensors)
    pieces = [Piece(len(header), len(header), lambda: lambda: [(0, memoryview(header))])]
    pieces += weight_pieces(student, tensors, len(header), importance or {}, feedback)
    assert pieces[-1].end == _file_size(header, tensors), f"{path}: {pieces[-1].end} bytes planned"
    if resume and is_published(path, pieces):
        return
    with resuming(path, header, pieces, keep=resume) as file:
        write_pieces(file, pieces, threads=threads, progress=progress)


def _header(
    spec: ModelSpec, source: Origin, metadata: Mapping[str, Value], tensors: tuple[PlannedTensor, ...]
) -> bytes:
    metadata = {**metadata, **vocabulary_metadata(source.tokenizer_folder, spec.vocab_size)}
    entries = (TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors)
    return render_header(len(metadata), render_values(metadata), entries)


def _file_size(header: bytes, tensors: tuple[PlannedTensor, ...]) -> int:
    return len(header) + sum(aligned(tensor.n_bytes) for tensor in tensors)
