"""Chooses the experts that survive."""

from __future__ import annotations

import json

from compressors.model.student import ExpertMap
from compressors.prune import prune_by_reap
from compressors.statistics import load_statistics
from exporter.stage import StageContext
from exporter.stages.artifacts import Calibration, StudentFiles

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes the expert map from the statistics."""
    choice = context.plan.recipe.compress
    if choice.method == "none":
        experts = ExpertMap.identity(context.plan.teacher_shape)
    else:
        experts = prune_by_reap(load_statistics(Calibration.of(context.work).statistics), choice.experts)
    StudentFiles(context.output).expert_map.write_text(json.dumps(experts.to_json()), encoding="utf-8")
