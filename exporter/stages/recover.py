"""Climbs the recovery ladder: each rung is kept only if the divergence on the selection split falls."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressors.model.log_probs import LogProbReader
from compressors.model.parallel import is_first, wait_for_all
from compressors.model.student import Student
from compressors.model.weight_file import StoredTensors
from compressors.recover.divergence import Judgement, judge
from compressors.recover.training import Training, TrainingDivergedError, train
from compressors.recover.training_memory import TooLargeError
from exporter.files import write_atomically
from exporter.recipe import RungChoice
from exporter.recovery import schedule_of, scope_of
from exporter.snapshot import Snapshot
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, StudentFiles, memory_limit, open_student, use_threads
from exporter.stages.schedule import scheduled_blocks
from exporter.stages.training import training_of
from validate.backend import scored_positions

__all__ = ["Ladder", "run"]

_STATE = "training.safetensors"


def run(context: StageContext) -> None:
    """Writes an overlay for each rung that was kept, and what was tried."""
    rungs = context.plan.recipe.recover.rungs
    results: list[Mapping[str, Any]] = []
    if rungs:
        use_threads(context.plan)
        ladder = Ladder(context, open_student(context.plan, context.work, "compress"))
        for number, (rung, n_blocks) in enumerate(zip(rungs, scheduled_blocks(context.work), strict=False)):
            results.append(ladder.climb(number, rung, n_blocks))
    if is_first():
        StudentFiles(context.output).recovery.write_text(json.dumps(results, indent=1), encoding="utf-8")


class Ladder:
    """The student as the last rung that was kept left it, and how it is judged.

    Args:
        context: of the stage, into whose folder each rung's overlay and result go.
        student: where the ladder begins.
    """

    def __init__(self, context: StageContext, student: Student) -> None:
        self._context = context
        self._files = StudentFiles(context.output)
        self.student = student
        self._judgement: Judgement | None = None  # of that student, once it is known

    def climb(self, number: int, rung: RungChoice, n_blocks: int) -> Mapping[str, Any]:
        """Trains a rung and keeps it if it helps, unless an attempt that was killed later did so already."""
        result_path = self._files.rung_result(number)
        if not result_path.exists():
            tried = self._tried(number, rung, n_blocks)
            if is_first():
                write_atomically(result_path, json.dumps(tried, indent=1))
            wait_for_all()
        self._snapshot(number).remove()
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        if result["accepted"]:
            self.student = self.student.with_overlay(StoredTensors(self._files.rung_overlay(number)))
            self._judgement = Judgement(result["selection_kld_after"], result["selection_perplexity_after"])
        elif is_first():
            self._files.rung_overlay(number).unlink(missing_ok=True)
        return result

    def _tried(self, number: int, rung: RungChoice, n_blocks: int) -> dict[str, Any]:
        start = time.monotonic()
        before = self._judgement or self._judge(self.student)
        self._judgement = before
        after, why = self._taught(number, rung, n_blocks)
        accepted = after is not None and after.divergence < before.divergence
        return {
            "rung": scope_of(rung).name_in(self.student.shape),
            "loss": rung.loss,
            "learning_rate": rung.learning_rate,
            "steps": schedule_of(self._context.plan.recipe.recover, rung, n_blocks).n_steps,
            "tokens": n_blocks * Blocks.load(Calibration.of(self._context.work).blocks).calibration.shape[1],
            "selection_kld_before": before.divergence,
            "selection_kld_after": after and after.divergence,
            "selection_perplexity_before": before.perplexity,
            "selection_perplexity_after": after and after.perplexity,
            "accepted": accepted,
            "why": why,
            "seconds": time.monotonic() - start,
        }

    def _taught(self, number: int, rung: RungChoice, n_blocks: int) -> tuple[Judgement | None, str | None]:
        """Leaves what the rung taught in its overlay; how that is judged, or why there is nothing to judge."""
        path = self._files.rung_overlay(number)
        try:
            training = training_of(self._context, self.student, rung, n_blocks)
            self._train(training, number)
        except (TooLargeError, TrainingDivergedError) as error:
            return None, str(error)
        if is_first():
            save_file(training.overlay(), path)
        wait_for_all()
        del training  # its weights and moments must be gone before another model takes their place
        after = self._judge(self.student.with_overlay(StoredTensors(path)))
        return after, None

    def _train(self, training: Training, number: int) -> None:
        """All steps, from the newest snapshot on if there is one."""
        snapshot = self._snapshot(number)
        found = snapshot.load()
        if found is not None:
            training.restore(StoredTensors(found[1] / _STATE))

        def save(folder: Path) -> None:
            if is_first():  # it is the same in all processes
                save_file(training.state(), folder / _STATE)

        with self._context.progress.bar("steps", training.settings.n_steps) as advance:
            advance(training.n_done)
            train(training, progress=advance, after_step=lambda training: snapshot.keep(training.n_done, save))

    def _snapshot(self, number: int) -> Snapshot:
        return Snapshot(self._context.output / f"snapshot-{number}")

    def _judge(self, student: Student) -> Judgement:
        files = Calibration.of(self._context.work)
        blocks_BT = Blocks.load(files.blocks).selection
        return judge(
            student,
            blocks_BT,
            LogProbReader(files.selection_log_probs),
            scored_positions(blocks_BT.shape[1]),
            limit=memory_limit(self._context),
            device=torch.device(self._context.plan.device),
        )
