"""Writes the ONNX folder."""

from __future__ import annotations

from compressors.model.onnx_weights import OnnxWeights
from exporter.onnx.clients import write_client_files
from exporter.onnx.writer import predict_size, write_onnx
from exporter.stage import StageContext
from exporter.stages.artifacts import ORIGINAL_VALUES, importance_of, open_student
from exporter.tuning import keep_values

__all__ = ["FOLDER", "run"]

FOLDER = "onnx"


def run(context: StageContext) -> None:
    """Writes graph, weights, and what onnxruntime-genai and optimum want beside them."""
    plan = context.plan
    weight_type = plan.recipe.onnx or ""
    student = open_student(plan, context.work, "recover")
    folder = context.output / FOLDER
    with context.progress.bar("bytes", predict_size(student.shape, weight_type)) as advance:
        write_onnx(
            student,
            weight_type,
            folder,
            importance=importance_of(student, context.work),
            context_length=None,
            threads=plan.recipe.threads,
            resume=True,
            progress=advance,
        )
    if plan.recipe.recover.after_quantizing is not None:
        keep_values(OnnxWeights(folder, student.shape), student.shape, context.output / ORIGINAL_VALUES)
    # onnxruntime-genai allocates a cache of max_length at once: the budget counts the recipe's context
    write_client_files(student, folder, max_length=plan.recipe.budget.context)
