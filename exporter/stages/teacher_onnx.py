"""Measures the original, unquantized, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compressors.model.student import Student
from exporter.onnx.writer import write_onnx
from exporter.stage import StageContext
from exporter.stages.teacher import measure_teacher
from validate.onnx_runtime import OnnxRuntimeBackend

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.teacher.measure_teacher`."""
    threads = context.plan.recipe.threads

    def write(teacher: Student, weight_type: str, folder: Path, progress: Callable[[int], None]) -> Path:
        write_onnx(teacher, weight_type, folder, threads=threads, progress=progress)
        return folder

    measure_teacher(context, "onnx", write, lambda path: OnnxRuntimeBackend(path, threads=threads))
