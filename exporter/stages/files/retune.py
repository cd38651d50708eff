"""Trains once more, beside the codes of the written files, and puts the learned values into these files.

This training corrects a file's own quantization errors, so each file is trained by itself, from the same student with
the same text; files that hold the same numbers are one student, trained once. The student in torch, which has no such
errors, stays as recovery left it.

The student is judged as the file would hold it, with scales rounded to float16. The learned values are kept only if
the divergence falls; otherwise the file gets back the values that it was written with, even after an attempt that was
killed.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compressors.model.files.weight_file import StoredTensors
from compressors.model.parallel import is_first, wait_for_all
from compressors.model.sources.student import Student
from compressors.model.sources.weights import WrittenWeights
from compressors.recover.scopes import BlockLength
from compressors.recover.training import Training
from compressors.recover.written_values import learned_values
from exporter.estimating.planned_types import same_numbers
from exporter.file_names import ORIGINAL_VALUES, RECOVERY, RETUNED, RUNG_OVERLAY
from exporter.planning.recovery import after_quantizing_name
from exporter.stages.inputs import open_student, scheduled_blocks, use_threads, written_weights
from exporter.stages.student.recover import Ladder
from exporter.work.stage import StageContext
from exporter.writing.tuning import rewrite

__all__ = ["retune"]


def retune(context: StageContext) -> None:
    """Writes the results of the rungs, and changes tunable values in the written files."""
    plan, work = context.plan, context.work
    use_threads(plan)
    recovered = open_student(plan, work)
    names = plan.recipe.artifacts
    groups = [names] if same_numbers(plan) else [(name,) for name in names]
    results = [_teach(context, recovered, group) for group in groups]
    if is_first():
        context.file(RECOVERY).write_text(json.dumps(results, indent=1), encoding="utf-8")


def _teach(context: StageContext, recovered: Student, artifacts: tuple[str, ...]) -> Mapping[str, Any]:
    """Trains the student in these artifacts, which hold the same numbers, and puts the result into each."""
    plan, work = context.plan, context.work
    rung = plan.recipe.recover.after_quantizing
    assert rung is not None, "the stage is left out of other plans"
    first = artifacts[0]
    folder = context.file(RETUNED[first])
    folder.mkdir(exist_ok=True)
    original = StoredTensors(work.path(first, ORIGINAL_VALUES))
    weights = written_weights(plan, work, recovered.spec)[first]
    ladder = _FileLadder(context, recovered.as_written(weights.with_values(original)), folder, weights, original)
    result = ladder.climb(0, rung, scheduled_blocks(work)[-1])
    values: Mapping[str, torch.Tensor] = original
    if result["accepted"]:
        values = _with(original, StoredTensors(RUNG_OVERLAY.within(folder, number=0)))
    wait_for_all()  # the files are read until here
    if is_first():
        written = written_weights(plan, work, recovered.spec)
        for artifact in artifacts:
            rewrite(written[artifact], values)
    wait_for_all()
    return {**result, "rung": after_quantizing_name(rung, recovered.spec, " and ".join(artifacts))}


class _FileLadder(Ladder):
    """The ladder of a student that a file holds: it learns values of that file.

    Args:
        context: the context of the stage.
        student: the student as the file was written.
        folder: the folder for results.
        weights: the file, opened.
        original: the tunable values of the file as it was written.
    """

    def __init__(
        self,
        context: StageContext,
        student: Student,
        folder: Path,
        weights: WrittenWeights,
        original: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(context, student, folder)
        self._weights = weights
        self._original = original

    def _learned(self, training: Training) -> dict[str, torch.Tensor]:
        return learned_values(training.trained, self._original)

    def _student_with(self, learned: Mapping[str, torch.Tensor]) -> Student:
        return self.student.as_written(self._weights.with_values(_with(self._original, learned)))

    def _block_length(self) -> BlockLength | None:
        return self._weights.block_length


def _with(original: Mapping[str, torch.Tensor], learned: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The original values, some replaced by learned ones; each is read on access."""
    return ChainMap(learned, original)  # type: ignore[arg-type]  # nothing is written to it
