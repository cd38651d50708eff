"""Runs stages in the process of a test."""

from __future__ import annotations

from pathlib import Path

from exporter.planning.plan import Plan
from exporter.processes.progress import Progress
from exporter.work.directory import WorkDirectory
from exporter.work.stage import Stage, StageContext


def run_stage(stage: Stage, plan: Plan, work: WorkDirectory) -> Path:
    """Runs a stage where an attempt before may have been; returns its folder, which counts as finished."""
    folder = work.stage(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    stage.run(StageContext.of(stage, plan, work, Progress(silent=True), folder))
    return folder
