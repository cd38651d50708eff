"""Measures the original, unquantized, in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compressors.model.sources.student import Student
from exporter.pipeline.stage import StageContext
from exporter.stages.teacher import measure_teacher
from exporter.writing.gguf.writer import write_gguf
from validate.runtimes.llama_cpp import LlamaCppBackend, exact_kv_type

__all__ = ["run"]


def run(context: StageContext) -> None:
    """See :func:`exporter.stages.teacher.measure_teacher`."""
    recipe = context.plan.recipe

    def write(teacher: Student, weight_type: str, folder: Path, progress: Callable[[int], None]) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / "teacher.gguf"
        name, threads = recipe.source.model, recipe.threads
        write_gguf(teacher, weight_type, path, name=name, threads=threads, progress=progress)
        return path

    measure_teacher(
        context,
        "gguf",
        write,
        lambda path: LlamaCppBackend(path, kv_type=exact_kv_type(recipe.budget.kv_type), threads=recipe.threads),
    )
