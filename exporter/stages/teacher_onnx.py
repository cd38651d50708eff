"""Measures the original, unquantized, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compressors.model.sources.student import Student
from exporter.pipeline.stage import StageContext
from exporter.stages.teacher import measure_teacher
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.onnx import OnnxRuntimeBackend

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.teacher.measure_teacher`."""
    threads = context.plan.recipe.threads

    def write(teacher: Student, weight_type: str, folder: Path, progress: Callable[[int], None]) -> Path:
        write_onnx(teacher, weight_type, folder, threads=threads, progress=progress)
        return folder

    measure_teacher(context, "onnx", write, lambda path: OnnxRuntimeBackend(path, threads=threads))
