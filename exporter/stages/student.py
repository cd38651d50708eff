"""Writes the student as a checkpoint that stock transformers loads."""

from __future__ import annotations

from exporter.pipeline.stage import StageContext
from exporter.stages.artifacts import open_student
from exporter.writing.hf_checkpoint import write_checkpoint

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Routers in float32, everything else in the source's dtype."""
    student = open_student(context.plan, context.work)
    with context.progress.bar("layers", student.spec.n_layers) as advance:
        write_checkpoint(student, context.output / "student", resume=True, progress=advance)
