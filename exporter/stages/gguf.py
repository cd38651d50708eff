"""Writes the GGUF file."""

from __future__ import annotations

from exporter.gguf.metadata import gguf_file_name
from exporter.gguf.writer import predict_file_size, write_gguf
from exporter.stage import StageContext
from exporter.stages.artifacts import importance_of, open_student
from exporter.stages.feedback import feedback_for, writer_threads

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Quantizes the student with what the calibration text says about the inputs of its matrices."""
    plan = context.plan
    choice, name = plan.recipe.file("gguf"), plan.recipe.source.model
    student = open_student(plan, context.work, "recover")
    total = predict_file_size(student.shape, plan.source, choice.mix, name)
    with (
        feedback_for(context, student, choice.quantizer) as feedback,
        context.progress.bar("bytes", total) as advance,
    ):
        write_gguf(
            student,
            choice.mix,
            context.output / gguf_file_name(name, student.shape, choice.mix),
            importance=importance_of(student, context.work),
            feedback=feedback,
            name=name,
            threads=writer_threads(plan, student.shape, choice.quantizer),
            resume=True,
            progress=advance,
        )
