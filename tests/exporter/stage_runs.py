"""Runs stages in the process of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from exporter.pipeline import running
from exporter.pipeline.stage_process import Outcome
from exporter.planning.plan import Plan
from exporter.processes.progress import Count, Progress
from exporter.stages.table import ALL_STAGES
from exporter.work.directory import WorkDirectory
from exporter.work.stage import Stage, StageContext


def run_stage(stage: Stage, plan: Plan, work: WorkDirectory) -> Path:
    """Runs a stage where an attempt before may have been; returns its folder, which counts as finished."""
    folder = work.stage(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    stage.run(StageContext.of(stage, plan, work, Progress(), folder))
    return folder


@contextmanager
def torch_left_as_it_was() -> Iterator[None]:
    """Stages, which have a process of their own, set torch up as they like."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


@contextmanager
def stages_in_this_process() -> Iterator[None]:
    """While it lasts, runs execute their stages here, where libraries and ggml's tables are ready for all of them."""
    with torch_left_as_it_was(), mock.patch.object(running, "run_in_process", _run_here):
        yield


def _run_here(work: WorkDirectory, name: str, _group: None, *, alone: bool, count: Count) -> Outcome:
    (stage,) = (stage for stage in ALL_STAGES if stage.name == name)
    stage.run(StageContext.of(stage, work.plan(), work, Progress(count)))
    return Outcome(peak_rss_bytes=1)
