"""Runs a stage in a process of its own (:mod:`exporter.pipeline.child_process`)."""

from __future__ import annotations

import json

from exporter.pipeline.child_process import Child, Death, run_child
from exporter.pipeline.progress import restore_terminal
from exporter.pipeline.stage import Outcome, run_stage
from exporter.pipeline.work import WorkDirectory

__all__ = ["Death", "run_in_process"]


def run_in_process(
    work: WorkDirectory, stage: str, group: str | None = None, *, alone: bool = False
) -> Outcome | Death:
    """Runs a stage in a process of its own and returns how that went.

    When waiting is interrupted (KeyboardInterrupt), the process is ended first.

    Args:
        work: of the run.
        stage: its name.
        group: of the processes that share it, if they do.
        alone: no more than another stage is to follow: the server would import more than it saves.
    """
    outcomes: list[Outcome] = []
    child = Child(run_stage, (work, stage, group), alone=alone)
    death = run_child(child, lambda message: outcomes.append(Outcome(**json.loads(message))))
    if not outcomes:
        restore_terminal()
    return outcomes[0] if outcomes else death
