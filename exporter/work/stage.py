"""A stage, as it declares itself, and its inputs.

A stage opens the files that it declares and no others: its work folder refuses everything else, in every run. So the
declarations (:mod:`exporter.stages.table`) decide the order of stages, and which are repeated after a change.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.file_names import StageFile
from exporter.planning.plan import Plan
from exporter.processes.progress import Progress
from exporter.work.directory import Reads, UndeclaredFileError, WorkDirectory

__all__ = ["Stage", "StageContext", "files_of"]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline; its code is the function of its name in a module of ``exporter.stages``.

    Raise ``version`` by hand whenever the stage's outputs change for the same inputs.
    """

    name: str
    module: str  # its module below exporter.stages
    version: int
    what: str  # its description for the user
    reads: Reads = frozenset()
    writes: tuple[StageFile, ...] = ()
    rewrites: Reads = frozenset()  # files of other stages that it changes
    takes: Reads = frozenset()
    """Files that it reads and can make itself. They become its own where no stage to come reads them: it finds them in
    its folder, and removes each as soon as it was used."""
    is_helped_by: Reads = frozenset()  # files that it may open, and whose content changes none of its results
    choices: tuple[str, ...] = ()  # parts of the recipe, or of the plan, that its outputs depend on
    resumes: bool = False  # it continues with the files of a killed attempt
    shared: bool = False  # all processes of a team take part
    crash_is_a_finding: bool = False  # it runs an external runtime, whose death is a result

    def depends_on(self, other: Stage) -> bool:
        """True if the other one writes or changes a file that this one reads."""
        return any(stage == other.name or (stage, file) in other.rewrites for stage, file in self.reads)

    def run(self, context: StageContext) -> None:
        """Runs the stage's code in this process."""
        code = getattr(importlib.import_module(f"exporter.stages.{self.module}"), self.name)
        code(context)


@dataclass(frozen=True)
class StageContext:
    """The inputs of a stage."""

    stage: Stage
    plan: Plan
    work: WorkDirectory  # opens the files that the stage declares
    output: Path  # the folder to write into
    progress: Progress

    @classmethod
    def of(
        cls, stage: Stage, plan: Plan, work: WorkDirectory, progress: Progress, output: Path | None = None
    ) -> StageContext:
        """The inputs of a stage that writes into its unfinished folder, or into another one."""
        folder = work.partial(stage.name) if output is None else output
        return cls(stage, plan, work.opening(stage.reads | stage.is_helped_by), folder, progress)

    def file(self, file: StageFile, **values: Any) -> Path:
        """The place of a file that the stage writes.

        Raises:
            UndeclaredFileError: the stage does not declare it.
        """
        if file not in self.stage.writes:
            raise UndeclaredFileError(f"stage {self.stage.name} writes {file.name}, which it does not declare")
        return file.within(self.output, **values)

    def run_inside(self, stage: Stage, plan: Plan, work: WorkDirectory) -> None:
        """Runs another stage within this one, in a work folder below its own; it finishes like any stage."""
        context = StageContext.of(stage, plan, work, self.progress)
        context.output.mkdir(parents=True, exist_ok=True)
        stage.run(context)
        context.output.rename(work.stage(stage.name))


def files_of(stage: str, *files: StageFile) -> Reads:
    """Declares that these files of a stage are read."""
    return frozenset((stage, file) for file in files)
