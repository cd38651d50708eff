"""The number of files that a search measures: it is found once from a timed trial and then kept; no clock decides."""

from __future__ import annotations

import json

import torch

from exporter.estimating.estimate import MOST_MEASURED, seconds_of_measuring
from exporter.estimating.machine import measure_speeds
from exporter.file_names import EFFORT
from exporter.work.stage import StageContext
from exporter.writing.files import write_atomically

__all__ = ["n_measured_files"]


def n_measured_files(context: StageContext) -> int:
    """The number of files of each artifact that fit ``--plan-time``; a resumed attempt takes the first one's number."""
    path = context.file(EFFORT)
    if not path.exists():
        plan = context.plan
        assert plan.search is not None, "the recipe stands"
        seconds = seconds_of_measuring(plan, measure_speeds(plan)) * len(plan.recipe.artifacts)
        torch.set_num_threads(plan.recipe.threads)
        write_atomically(path, json.dumps(min(MOST_MEASURED, int(plan.search.plan_seconds / seconds))))
    n_files: int = json.loads(path.read_text(encoding="utf-8"))
    return n_files
