"""Writes the GGUF file."""

from __future__ import annotations

from compressors.model.gguf_weights import GgufWeights
from exporter.gguf.metadata import gguf_file_name
from exporter.gguf.writer import predict_file_size, write_gguf
from exporter.stage import StageContext
from exporter.stages.artifacts import ORIGINAL_VALUES, importance_of, open_student
from exporter.tuning import keep_values

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Quantizes the student with the importance matrix of the calibration text."""
    plan = context.plan
    weight_type, name = plan.recipe.gguf or "", plan.recipe.source.model
    student = open_student(plan, context.work, "recover")
    path = context.output / gguf_file_name(name, student.shape, weight_type)
    total = predict_file_size(student.shape, plan.source, weight_type, name)
    with context.progress.bar("bytes", total) as advance:
        write_gguf(
            student,
            weight_type,
            path,
            importance=importance_of(student, context.work),
            name=name,
            threads=plan.recipe.threads,
            resume=True,
            progress=advance,
        )
    if plan.recipe.recover.after_quantizing is not None:
        keep_values(GgufWeights(path, student.shape), student.shape, context.output / ORIGINAL_VALUES)
