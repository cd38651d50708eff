"""Climbs the recovery ladder: each rung is kept only if the divergence on the selection split falls."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressors.model.files.weight_file import StoredTensors
from compressors.model.parallel import is_first, wait_for_all
from compressors.model.sources.student import Student
from compressors.recover.divergence import Judgement, judge
from compressors.recover.scopes import BlockLength
from compressors.recover.training import Training, TrainingDivergedError, train
from compressors.recover.training_memory import TooLargeError
from exporter.file_names import RATE_RESULT, RECOVERY, RUNG_OVERLAY, RUNG_RESULT, SELECTION_PREDICTIONS
from exporter.planning.rates import rates_for, trial_blocks
from exporter.planning.recipe import RungChoice
from exporter.planning.recovery import schedule_of, scope_of
from exporter.stages.inputs import (
    memory_limit,
    open_student,
    scheduled_blocks,
    teacher_predictions,
    token_blocks,
    use_threads,
)
from exporter.stages.student.training import training_of
from exporter.work.snapshot import Snapshot
from exporter.work.stage import StageContext
from exporter.writing.files import complete_or_absent, write_atomically
from validate.runtimes.backend import scored_positions

__all__ = ["Ladder", "judge_on_selection", "recover"]

_STATE = "training.safetensors"


def recover(context: StageContext) -> None:
    """Writes an overlay for each rung that was kept, and the results of all that were tried."""
    rungs = context.plan.recipe.recover.rungs
    results: list[Mapping[str, Any]] = []
    if rungs:
        use_threads(context.plan)
        ladder = Ladder(context, open_student(context.plan, context.work, "compress"))
        for number, (rung, n_blocks) in enumerate(zip(rungs, scheduled_blocks(context.work), strict=False)):
            results.append(ladder.climb(number, rung, n_blocks))
    if is_first():
        context.file(RECOVERY).write_text(json.dumps(results, indent=1), encoding="utf-8")


def judge_on_selection(
    context: StageContext, student: Student, write: Callable[[int | None], None] | None = None
) -> Judgement:
    """Compares a student with the teacher on the selection split, which no training sees.

    ``write`` is as in :func:`~compressors.recover.divergence.judge`.
    """
    blocks_BT = token_blocks(context.work).selection
    return judge(
        student,
        blocks_BT,
        teacher_predictions(context.plan, context.work, SELECTION_PREDICTIONS),
        scored_positions(blocks_BT.shape[1]),
        limit=memory_limit(context),
        device=torch.device(context.plan.device),
        write=write,
    )


class Ladder:
    """Climbs rungs one after another; ``student`` is the result of the last rung that was kept.

    Args:
        context: context of the stage.
        student: the student that the ladder begins with.
        folder: the folder for the overlays and results of rungs; None: the stage's.
    """

    def __init__(self, context: StageContext, student: Student, folder: Path | None = None) -> None:
        self._context = context
        self._folder = context.output if folder is None else folder
        self.student = student
        self._judgement: Judgement | None = None  # the current student's, once it is known

    def climb(self, number: int, rung: RungChoice, n_blocks: int) -> Mapping[str, Any]:
        """Trains a rung and keeps it if it helps, unless an earlier attempt that was killed has done so."""
        result_path = RUNG_RESULT.within(self._folder, number=number)
        if not result_path.exists():
            tried = self._tried(number, rung, n_blocks)
            if is_first():
                write_atomically(result_path, json.dumps(tried, indent=1))
            wait_for_all()
        self._snapshot(number).remove()
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        if result["accepted"]:
            self.student = self._student_with(StoredTensors(self._overlay(number)))
            self._judgement = Judgement(result["selection_kld_after"], result["selection_perplexity_after"])
        elif is_first():
            self._overlay(number).unlink(missing_ok=True)
        return result

    def _learned(self, training: Training) -> dict[str, torch.Tensor]:
        """The tensors of a training that are kept."""
        return training.overlay()

    def _student_with(self, learned: Mapping[str, torch.Tensor]) -> Student:
        """The student with the tensors that a training learned."""
        return self.student.with_overlay(learned)

    def _block_length(self) -> BlockLength | None:
        """The block lengths of the file that the student was written to; None if it was not."""
        return None

    def _tried(self, number: int, rung: RungChoice, n_blocks: int) -> dict[str, Any]:
        start = time.monotonic()
        before = self._judgement or judge_on_selection(self._context, self.student)
        self._judgement = before
        after: Judgement | None = None
        why: str | None = None
        rates = self._rates(rung, before)
        rate = rates[0]
        try:
            if len(rates) > 1:
                rate = self._best_rate(number, rung, n_blocks, rates)
            after = self._taught(self._overlay(number), rung, n_blocks, rate, self._snapshot(number))
        except (TooLargeError, TrainingDivergedError) as error:
            why = str(error)
        return {
            "rung": scope_of(rung).name_in(self.student.spec),
            "loss": rung.loss,
            "learning_rate": rate,
            "steps": schedule_of(self._context.plan.recipe.recover, rung, n_blocks).n_steps,
            "tokens": n_blocks * token_blocks(self._context.work).calibration.shape[1],
            "selection_kld_before": before.divergence,
            "selection_kld_after": after and after.divergence,
            "selection_perplexity_before": before.perplexity,
            "selection_perplexity_after": after and after.perplexity,
            "accepted": after is not None and after.divergence < before.divergence,
            "why": why,
            "seconds": time.monotonic() - start,
        }

    def _rates(self, rung: RungChoice, before: Judgement) -> Sequence[float]:
        """The rung's rate, or the rates to try for a student of this divergence."""
        if rung.learning_rate is not None:
            return [rung.learning_rate]
        return rates_for(rung.scope, before.divergence, self.student.spec.hidden_size)

    def _best_rate(self, number: int, rung: RungChoice, n_blocks: int, rates: Sequence[float]) -> float:
        """The rate that is best after a few blocks; the first, if there are too few for that."""
        n_tried = trial_blocks(n_blocks, rung.blocks_per_step)
        if n_tried == 0:
            return rates[0]
        divergences = [self._trial(number, rung, n_tried, rate) for rate in rates]
        return rates[divergences.index(min(divergences))]

    def _trial(self, number: int, rung: RungChoice, n_blocks: int, rate: float) -> float:
        """The divergence after a few blocks, kept for a resumed attempt; infinite if training diverges."""
        path = RATE_RESULT.within(self._folder, number=number, rate=rate)
        if not path.exists():
            overlay = path.with_suffix(".safetensors")
            snapshot = Snapshot(path.with_suffix(".snapshot"))
            try:
                divergence = self._taught(overlay, rung, n_blocks, rate, snapshot).divergence
            except TrainingDivergedError:
                divergence = math.inf
            snapshot.remove()
            if is_first():
                write_atomically(path, json.dumps(divergence))
                overlay.unlink(missing_ok=True)
            wait_for_all()
        divergence = float(json.loads(path.read_text(encoding="utf-8")))
        return divergence

    def _taught(self, path: Path, rung: RungChoice, n_blocks: int, rate: float, snapshot: Snapshot) -> Judgement:
        """Trains a rung, writes its tensors to ``path``, and judges the student with them.

        An attempt that was killed while it judged has left them there.

        Raises:
            TooLargeError: the training does not fit the memory.
            TrainingDivergedError: the training gave NaN or infinite values.
        """
        if not path.exists():
            training = training_of(self._context, self.student, rung, n_blocks, rate, self._block_length())
            self._train(training, snapshot)
            if is_first():
                with complete_or_absent(path) as place:
                    save_file(self._learned(training), place)
            wait_for_all()
            del training  # its weights and moments must be gone before another model takes their place
        return judge_on_selection(self._context, self._student_with(StoredTensors(path)))

    def _train(self, training: Training, snapshot: Snapshot) -> None:
        """Runs all steps, from the snapshot on if there is one; what the last one taught needs none."""
        found = snapshot.load()
        if found is not None:
            training.restore(StoredTensors(found[1] / _STATE))

        def save(folder: Path) -> None:
            if is_first():  # it is the same in all processes
                save_file(training.state(), folder / _STATE)

        def keep(training: Training) -> None:
            if training.n_done < training.settings.n_steps:
                snapshot.keep(training.n_done, save)

        with self._context.progress.bar("steps", training.settings.n_steps) as advance:
            advance(training.n_done)
            train(training, progress=advance, after_step=keep)

    def _overlay(self, number: int) -> Path:
        return RUNG_OVERLAY.within(self._folder, number=number)

    def _snapshot(self, number: int) -> Snapshot:
        return Snapshot(self._folder / f"snapshot-{number}")
