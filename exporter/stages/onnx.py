"""Writes the ONNX folder."""

from __future__ import annotations

from pathlib import Path

from compressors.model.sources.onnx import OnnxWeights
from compressors.model.sources.student import Student
from exporter.pipeline.stage import StageContext
from exporter.planning.recipe import FileChoice
from exporter.stages.artifacts import ORIGINAL_VALUES, importance_of, open_student
from exporter.stages.feedback import feedback_for, writer_threads
from exporter.writing.onnx.clients import write_client_files
from exporter.writing.onnx.writer import predict_size, write_onnx
from exporter.writing.tuning import keep_values

__all__ = ["FOLDER", "run", "write"]

FOLDER = "onnx"


def run(context: StageContext) -> None:
    """Writes the recipe's graph and weights, and what onnxruntime-genai and optimum want beside them."""
    recipe, student = context.plan.recipe, open_student(context.plan, context.work, "recover")
    folder = write(context, student, recipe.file("onnx"), context.output)
    if recipe.recover.after_quantizing is not None:
        keep_values(OnnxWeights(folder, student.spec), student.spec, context.output / ORIGINAL_VALUES)
    # onnxruntime-genai allocates a cache of max_length at once: the budget counts the recipe's context
    write_client_files(student, folder, max_length=recipe.budget.context)


def write(context: StageContext, student: Student, choice: FileChoice, place: Path) -> Path:
    """Writes graph and weights of a student into a folder in ``place``; returns the folder."""
    folder = place / FOLDER
    total = predict_size(student.spec, choice.mix, encodings=choice.tensors)
    with (
        feedback_for(context, student, choice.quantizer, place) as feedback,
        context.progress.bar("bytes", total) as advance,
    ):
        write_onnx(
            student,
            choice.mix,
            folder,
            encodings=choice.tensors,
            importance=importance_of(student, context.plan, context.work),
            feedback=feedback,
            threads=writer_threads(context.plan, student.spec, choice.quantizer),
            resume=True,
            progress=advance,
        )
    return folder
