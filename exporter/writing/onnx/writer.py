"""Writes ``model.onnx`` and ``model.onnx.data``: the graph at once, the weights an expert or a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from compressors.calibration.statistics import Importance
from compressors.model.description.rope import Rope
from compressors.model.description.spec import ModelSpec
from compressors.model.files.integer_blocks import ProductInputs
from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.writing.feedback import StudentFeedback
from exporter.writing.files import replacing
from exporter.writing.layer_by_layer import FilePlan, LayerByLayer
from exporter.writing.onnx.data import Place, weight_pieces
from exporter.writing.onnx.file_size import predict_size
from exporter.writing.onnx.graph import build_model
from exporter.writing.onnx.layout import DATA_FILE, MODEL_FILE, TensorLayout, plan_tensors
from exporter.writing.pieces import Piece, write_pieces
from exporter.writing.resumable import Part, is_published, resuming

__all__ = ["onnx_by_layer", "predict_size", "write_onnx"]


def write_onnx(
    student: Student,
    preset: str,
    folder: Path,
    *,
    encodings: Mapping[str, str] | None = None,
    inputs: ProductInputs = "int8",
    importance: Importance | None = None,
    feedback: StudentFeedback | None = None,
    threads: int,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the student's graph and weights into ``folder``, which is created if it is missing.

    Q4_0 and Q8_0 weights are quantized with ggml's kernels, so a GGUF file of the same types and importance holds the
    same numbers; other blocks by :func:`compressors.quantize.blocks.search_blocks`. The bytes do not depend on
    ``threads``. ``model.onnx`` appears last: a folder without it is unfinished. On any
    failure a model that was there stays as it was.

    Args:
        student: the model to write.
        preset: a name from :data:`exporter.writing.onnx.encodings.PRESETS`.
        folder: the folder of the two files.
        encodings: encodings of units that differ from the preset, as in
            :func:`~exporter.writing.onnx.layout.plan_tensors`.
        inputs: those of the products of 4 bits.
        importance: weighs quantization errors; None weighs all input features alike.
        feedback: chooses the codes so that they compensate each other's errors; None leaves them as kernels and search
            choose them.
        threads: experts or slices that are quantized at a time.
        resume: continue the files that an attempt with the same arguments left in ``folder``, and leave them there
            if this one fails. Without it nothing is left behind.
        progress: is called with the number of bytes written since its last call.

    Raises:
        InputError: there is no such preset, unit or encoding; a weight is not finite or cannot be read; or the disk is
            full.
        UnsupportedError: the operators cannot hold the model.
    """
    layout = plan_tensors(student.spec, preset, encodings, inputs)
    model = build_model(layout)
    graph = model.SerializeToString(deterministic=True)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*weight_pieces(student, layout, importance or {}, feedback), *_rotary_pieces(layout)]
    with replacing(folder / MODEL_FILE) as graph_stream:
        graph_stream.write(graph)
        if resume and is_published(folder / DATA_FILE, pieces):
            return
        with resuming(folder / DATA_FILE, graph, pieces, keep=resume) as file:
            write_pieces(file, pieces, threads=threads, progress=progress)
            (folder / MODEL_FILE).unlink(missing_ok=True)  # an old graph must not be found beside the new weights


def onnx_by_layer(
    student: Student,
    preset: str,
    folder: Path,
    *,
    encodings: Mapping[str, str] | None = None,
    inputs: ProductInputs = "int8",
    importance: Importance | None = None,
    feedback: StudentFeedback | None = None,
    threads: int,
) -> LayerByLayer:
    """The numbers that :func:`write_onnx` would write, one layer at a time, in an empty ``folder``.

    Arguments and errors are those of :func:`write_onnx`.
    """
    layout = plan_tensors(student.spec, preset, encodings, inputs)
    graph = build_model(layout).SerializeToString(deterministic=True)
    plan = FilePlan(
        name=DATA_FILE,
        header=b"",
        pieces=list(weight_pieces(student, layout, importance or {}, feedback)),
        n_bytes=layout.data_bytes,
        beside={MODEL_FILE: graph},
        opened=lambda place: OnnxWeights(place, student.spec),
        finish=None if feedback is None else feedback.forget,
    )
    return LayerByLayer(plan, folder, threads)


def _rotary_pieces(layout: TensorLayout) -> list[Piece]:
    """The rotary caches, which lie behind all weights; none if nothing is turned."""
    caches = [Place(tensor.offset, tensor.n_bytes) for tables in layout.rotaries.values() for tensor in tables]
    if not caches:
        return []
    n_bytes = sum(place.n_bytes for place in caches)
    return [Piece(n_bytes, caches[-1].end, lambda: partial(_rotary_parts, layout.spec, caches))]


def _rotary_parts(spec: ModelSpec, places: Sequence[Place]) -> list[Part]:
    caches = [cache for rope in spec.ropes for cache in _rotary_caches(rope, spec.context_length)]
    return [place.part(cache.numpy()) for place, cache in zip(places, caches, strict=True)]


def _rotary_caches(rope: Rope, context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cosine and sine of every position's angles, float32 [rows, width / 2], as transformers does.

    Each table is that of a text as long as its rows.
    """
    tables = [
        torch.outer(torch.arange(n_tokens, dtype=torch.float32), rope.inverse_frequencies(n_tokens))
        for n_tokens in rope.table_lengths(context_length)
    ]
    angles = torch.cat(tables)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
