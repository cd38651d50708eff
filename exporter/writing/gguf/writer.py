"""Writes a student as one GGUF file, streaming: a few experts or slices of larger matrices are held at a time.

Or one layer of it after the other, for the numbers to be measured without the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from compressors.calibration.statistics import Importance
from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.student import Student
from exporter.writing.feedback import StudentFeedback
from exporter.writing.gguf.file_size import file_header, file_size, header_without_metadata, predict_file_size
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.weights import weight_pieces
from exporter.writing.layer_by_layer import FilePlan, LayerByLayer
from exporter.writing.pieces import Piece, write_pieces
from exporter.writing.resumable import is_published, resuming

__all__ = ["gguf_by_layer", "predict_file_size", "write_gguf"]

_NAME_BY_LAYER = "weights.gguf"


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
    header = file_header(student.spec, student.source, metadata, tensors)
    pieces = [Piece(len(header), len(header), lambda: lambda: [(0, memoryview(header))])]
    pieces += weight_pieces(student, tensors, len(header), importance or {}, feedback)
    assert pieces[-1].end == file_size(header, tensors), f"{path}: {pieces[-1].end} bytes planned"
    if resume and is_published(path, pieces):
        return
    with resuming(path, header, pieces, keep=resume) as file:
        write_pieces(file, pieces, threads=threads, progress=progress)


def gguf_by_layer(
    student: Student,
    mix: str,
    folder: Path,
    *,
    types: Mapping[str, str] | None = None,
    importance: Importance | None = None,
    feedback: StudentFeedback | None = None,
    threads: int,
) -> LayerByLayer:
    """The numbers of the file that :func:`write_gguf` would write, one layer at a time, in an empty ``folder``.

    Arguments and errors are those of :func:`write_gguf`.
    """
    tensors = plan_tensors(student.spec, mix, types)
    header = header_without_metadata(tensors)
    plan = FilePlan(
        name=_NAME_BY_LAYER,
        header=header,
        pieces=list(weight_pieces(student, tensors, len(header), importance or {}, feedback)),
        n_bytes=file_size(header, tensors),
        beside={},
        opened=lambda place: GgufWeights(place / _NAME_BY_LAYER, student.spec),
        finish=None if feedback is None else feedback.forget,
    )
    return LayerByLayer(plan, folder, threads)
