"""Chooses the experts that survive."""

from __future__ import annotations

import json

from compressors.model.student import ExpertMap
from compressors.prune import prune_by_reap
from exporter.stage import StageContext
from exporter.stages.artifacts import Calibration, StudentFiles

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes the expert map from the statistics."""
    choice = context.plan.recipe.compress
    if choice.method == "none":
        experts = ExpertMap.identity(context.plan.teacher_shape)
    else:
        statistics = Calibration.of(context.work).layer_statistics(context.plan.teacher_shape.n_layers)
        experts = prune_by_reap(statistics, choice.experts)
    StudentFiles(context.output).expert_map.write_text(json.dumps(experts.to_json()), encoding="utf-8")
