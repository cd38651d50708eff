"""Writes the GGUF file."""

from __future__ import annotations

from pathlib import Path

from compressors.model.sources.gguf import GgufWeights
from compressors.model.sources.student import Student
from exporter.pipeline.stage import StageContext
from exporter.planning.recipe import FileChoice
from exporter.stages.artifacts import ORIGINAL_VALUES, importance_of, open_student
from exporter.stages.feedback import feedback_for, writer_threads
from exporter.writing.gguf.metadata import gguf_file_name
from exporter.writing.gguf.writer import predict_file_size, write_gguf
from exporter.writing.tuning import keep_values

__all__ = ["run", "write"]


def run(context: StageContext) -> None:
    """Writes the recipe's file."""
    recipe, student = context.plan.recipe, open_student(context.plan, context.work, "recover")
    path = write(context, student, recipe.file("gguf"), context.output)
    if recipe.recover.after_quantizing is not None:
        keep_values(GgufWeights(path, student.spec), student.spec, context.output / ORIGINAL_VALUES)


def write(context: StageContext, student: Student, choice: FileChoice, folder: Path) -> Path:
    """Quantizes a student with what the calibration text says about the inputs of its matrices; returns the file."""
    plan, name = context.plan, context.plan.recipe.source.model
    path = folder / gguf_file_name(name, student.spec, choice.mix, choice.tensors)
    total = predict_file_size(student.spec, plan.source, choice.mix, name, choice.tensors)
    with (
        feedback_for(context, student, choice.quantizer, folder) as feedback,
        context.progress.bar("bytes", total) as advance,
    ):
        write_gguf(
            student,
            choice.mix,
            path,
            types=choice.tensors,
            importance=importance_of(student, plan, context.work),
            feedback=feedback,
            name=name,
            threads=writer_threads(plan, student.spec, choice.quantizer),
            resume=True,
            progress=advance,
        )
    return path
