"""A student that a search considers: built, judged, trained a little, and its tensors' sensitivities measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressors.model.running.arithmetic import dtype_of
from compressors.model.sources.student import Student
from compressors.sensitivity import TypeTable, UnitPlan
from compressors.sensitivity.gathering import gather_sensitivities
from compressors.sensitivity.matrices import Sensitivities
from compressors.sensitivity.measuring import measured_table
from exporter.file_names import SENSITIVITIES, TRIAL
from exporter.planning.recipe import CompressChoice
from exporter.searching.ladder import TRIAL_BLOCKS, ladder_for
from exporter.searching.structures import whole
from exporter.stages.inputs import importance_of, memory_limit, open_student
from exporter.stages.student.recover import Ladder, judge_on_selection
from exporter.stages.table import COMPRESS, OF_THE_RUN, RECOVER
from exporter.stages.teacher.sensitivity import watched_blocks
from exporter.work.directory import WorkDirectory
from exporter.work.stage import StageContext
from exporter.writing.files import flush_folder, write_atomically

__all__ = ["Trial"]

_FIGURES_VERSION = 4  # of the original's figures: raise it together with the version of the stage search


def _place_of_original(work: WorkDirectory) -> Path:
    """The folder in which all parts of a run find the original's figures, as long as its sensitivities are the same."""
    record = work.record("sensitivity")
    assert record is not None, "the stage comes before"
    return work.place("sensitivity") / f"original-{_FIGURES_VERSION}-{record.fingerprint[:12]}"


@dataclass(frozen=True)
class Trial:
    """A structure that is considered, in a folder of its own; finished work there is not repeated."""

    context: StageContext  # its work is the trial's, and its plan gives the structure
    compress: CompressChoice

    @property
    def is_original(self) -> bool:
        """True if nothing is changed; everything is then known."""
        return self.compress == whole(self.context.plan.teacher_spec)

    @classmethod
    def of(cls, context: StageContext, choice: CompressChoice, number: int) -> Trial:
        """The trial of a structure; number 0 is the original."""
        recipe = context.plan.recipe.model_copy(update={"compress": choice})
        folder = _place_of_original(context.work) if number == 0 else context.file(TRIAL, number=number)
        work = context.work.within(folder, OF_THE_RUN)
        plan = replace(context.plan, recipe=recipe)
        return cls(replace(context, plan=plan, work=work, output=folder), choice)

    def student(self) -> Student:
        """The compressed model after a short trial of recovery."""
        work = self.context.work
        if not work.stage("compress").exists():
            self.context.run_inside(COMPRESS, self.context.plan, work)
        if not self.is_original and not work.stage("recover").exists():
            self._teach()
        return open_student(self.context.plan, work)

    def _teach(self) -> None:
        """Climbs the rungs of the final run for a short while; rungs that do not help are not kept."""
        plan = self.context.plan
        choice, _ = ladder_for(self.compress, plan)
        plan = replace(plan, recipe=plan.recipe.model_copy(update={"recover": choice}))
        context = StageContext.of(RECOVER, plan, self.context.work, self.context.progress)
        context.output.mkdir(parents=True, exist_ok=True)
        ladder = Ladder(context, open_student(plan, context.work, "compress"))
        for number, rung in enumerate(choice.rungs):
            ladder.climb(number, rung, min(rung.blocks, TRIAL_BLOCKS))
        context.output.rename(self.context.work.stage("recover"))

    def divergence(self) -> float:
        """The divergence from the original on the selection split, unquantized: nats."""
        return 0.0 if self.is_original else self._remembered("divergence", lambda: self.judged(self.student()))

    def judged(self, student: Student, write: Callable[[int | None], None] | None = None) -> float:
        """The divergence of a student of this structure on the selection split: nats.

        Args:
            student: the student.
            write: as in :func:`~compressors.recover.divergence.judge`.
        """
        return judge_on_selection(self.context, student, write).divergence

    def table(
        self, units: Callable[[Student], Sequence[UnitPlan]], name: str, known: TypeTable | None = None
    ) -> TypeTable:
        """The costs of each type of each unit, measured once.

        Args:
            units: gives the units of the student.
            name: distinguishes tables of the same structure.
            known: a table of the same units whose types are not measured again.
        """
        path = self.context.output / f"table-{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            student = self.student()
            table = measured_table(
                student,
                units(student),
                self._sensitivities(student),
                importance_of(student, self.context.plan, self.context.work),
                threads=self.context.plan.recipe.threads,
                known=known,
            )
            write_atomically(path, json.dumps(table.to_json()))
        return TypeTable.from_json(json.loads(path.read_text(encoding="utf-8")))

    def remove(self) -> None:
        """Removes the student and its sensitivities; its figures stay."""
        work = self.context.work
        for folder in (work.stage("compress"), work.stage("recover"), self._own_sensitivities):
            shutil.rmtree(folder, ignore_errors=True)

    def _sensitivities(self, student: Student) -> Sensitivities:
        tied = student.spec.tied_embeddings
        if self.is_original:
            return Sensitivities(self.context.work.path("sensitivity", SENSITIVITIES), tied)
        folder = self._own_sensitivities
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            gather_sensitivities(
                student,
                watched_blocks(self.context.work),
                unfinished,
                dtype=dtype_of(self.context.plan.recipe.arithmetic),
                limit=memory_limit(self.context),
                device=torch.device(self.context.plan.device),
            )
            flush_folder(unfinished)
            unfinished.rename(folder)
        return Sensitivities(folder, tied)

    @property
    def _own_sensitivities(self) -> Path:
        return self.context.output / "sensitivity"

    def _remembered(self, what: str, measure: Callable[[], float]) -> float:
        path: Path = self.context.output / f"{what}.json"
        if not path.exists():
            write_atomically(path, json.dumps(measure()))
        value: float = json.loads(path.read_text(encoding="utf-8"))
        return value
