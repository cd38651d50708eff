"""The outputs of finished stages that the report asks for too; reading them takes no torch."""

from __future__ import annotations

import json
from pathlib import Path

from compressors.model.sources.student import Student
from exporter.estimating.planned_types import same_numbers
from exporter.file_names import (
    EXPERT_MAP,
    GGUF_FILE,
    ONNX_FOLDER,
    OVERLAY,
    RUNG_OVERLAY,
    SCHEDULE,
    SUMMARY,
    WRITTEN_EVALUATION,
)
from exporter.planning.plan import Plan
from exporter.work.directory import WorkDirectory

__all__ = [
    "SAME_WEIGHTS",
    "artifact_path",
    "heldout_domains",
    "open_student",
    "scheduled_blocks",
    "student_of_files",
    "whose_numbers",
    "written_evaluation",
]

SAME_WEIGHTS = "same_weights"
"""The name of torch with the same weights in a runtime's evaluation."""


def heldout_domains(work: WorkDirectory) -> list[str]:
    """The domain of each held-out chunk: the name of the file that it is from."""
    domains: list[str] = json.loads(work.path("calibrate", SUMMARY).read_text(encoding="utf-8"))["heldout_domains"]
    return domains


def open_student(plan: Plan, work: WorkDirectory, stage: str = "recover") -> Student:
    """The student as a stage left it: ``compress``, or ``recover``, the last to change it.

    Raises:
        InputError: a file is missing or damaged.
    """
    taught = work.paths("recover", RUNG_OVERLAY) if stage == "recover" else []
    overlays = [*reversed(taught), *work.paths("compress", OVERLAY)]  # the first that has a tensor wins
    return Student.load(plan.open_source(), work.path("compress", EXPERT_MAP), overlays)


def student_of_files(plan: Plan, work: WorkDirectory) -> Student:
    """The student without the values that were changed, for which the files' own values stand.

    Raises:
        InputError: the map of experts is missing or damaged.
    """
    return Student.load(plan.open_source(), work.path("compress", EXPERT_MAP))


def scheduled_blocks(work: WorkDirectory) -> list[int]:
    """The numbers of blocks that the schedule gives to everything that the recipe trains."""
    blocks: list[int] = json.loads(work.path("schedule", SCHEDULE).read_text(encoding="utf-8"))["blocks"]
    return blocks


def artifact_path(work: WorkDirectory, artifact: str) -> Path:
    """The GGUF file, or the folder of the ONNX model, as its stage wrote it."""
    if artifact == "onnx":
        return work.path(artifact, ONNX_FOLDER)
    (path,) = work.paths(artifact, GGUF_FILE)
    return path


def written_evaluation(plan: Plan, work: WorkDirectory, artifact: str) -> Path:
    """Torch's evaluation with an artifact's numbers."""
    return work.path("validate_written", WRITTEN_EVALUATION, artifact=whose_numbers(plan, artifact))


def whose_numbers(plan: Plan, artifact: str) -> str:
    """The artifact with whose file torch computed for this one: files with the same numbers share a pass."""
    return "gguf" if same_numbers(plan) else artifact
