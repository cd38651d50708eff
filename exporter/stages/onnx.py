"""Writes the ONNX folder."""

from __future__ import annotations

from exporter.onnx.clients import write_client_files
from exporter.onnx.writer import predict_size, write_onnx
from exporter.stage import StageContext
from exporter.stages.artifacts import importance_of, open_student

__all__ = ["FOLDER", "run"]

FOLDER = "onnx"


def run(context: StageContext) -> None:
    """Writes graph, weights, and what onnxruntime-genai and optimum want beside them."""
    plan = context.plan
    choice = plan.recipe.file("onnx")
    student = open_student(plan, context.work, "recover")
    folder = context.output / FOLDER
    with context.progress.bar("bytes", predict_size(student.shape, choice.mix)) as advance:
        write_onnx(
            student,
            choice.mix,
            folder,
            importance=importance_of(student, context.work),
            context_length=None,
            threads=plan.recipe.threads,
            resume=True,
            progress=advance,
        )
    # onnxruntime-genai allocates a cache of max_length at once: the budget counts the recipe's context
    write_client_files(student, folder, max_length=plan.recipe.budget.context)
