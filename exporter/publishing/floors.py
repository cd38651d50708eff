"""The floors of each file's runtime, from the stages' files: part of a row of report.json's validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compressors.model.predictions.routing_record import RoutingRecord
from exporter.file_names import COST, EVALUATION, ROUTING
from exporter.planning.plan import Plan
from exporter.stages.finished import SAME_WEIGHTS, written_evaluation
from exporter.work.directory import StageRecord, WorkDirectory
from validate.metrics.evaluation import Evaluation
from validate.metrics.floors import floor_figures

__all__ = ["floors_of"]

_COSTS = ("peak_rss_bytes", "load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")


def floors_of(
    artifact: str, evaluation: Evaluation, plan: Plan, work: WorkDirectory, records: Mapping[str, StageRecord]
) -> dict[str, Any]:
    """Returns ``same_weights``, the runtime against torch with the file's numbers, and ``teacher``, the original's.

    Args:
        artifact: ``gguf`` or ``onnx``.
        evaluation: the evaluation of the file in its runtime.
        plan: the plan of the run.
        work: the work directory, with all stages finished.
        records: the records of the stages.
    """
    torch_routing = Evaluation.load(written_evaluation(plan, work, artifact)).routing
    return {
        "same_weights": floor_figures(evaluation, SAME_WEIGHTS, torch_routing),
        "teacher": _teacher(artifact, plan, work, records),
    }


def _teacher(
    artifact: str, plan: Plan, work: WorkDirectory, records: Mapping[str, StageRecord]
) -> dict[str, Any] | None:
    """The original's floor; None if it was not asked for, or none fits; with ``error`` set if the runtime died."""
    floor = plan.teacher_floors.get(artifact)
    if floor is None:
        return None
    stage = f"teacher_{artifact}"
    of_what = {
        "type": floor.weight_type,
        "n_layers": floor.n_layers,
        "of_layers": plan.teacher_spec.n_layers,
        "error": records[stage].crash,
    }
    if records[stage].crash is not None:
        return of_what
    evaluation = Evaluation.load(work.path(stage, EVALUATION))
    cost = json.loads(work.path(stage, COST).read_text(encoding="utf-8")) or {}
    of_what |= {name: cost.get(name) for name in _COSTS}
    return of_what | floor_figures(evaluation, "teacher", RoutingRecord.load(work.path(stage, ROUTING)))
