"""Decides which stages a plan needs, in order, and whether a finished one is still valid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile

from exporter.file_names import StageFile
from exporter.planning.compression import shrinks
from exporter.planning.plan import Plan
from exporter.stages.table import (
    ALL_STAGES,
    CALIBRATE,
    GGUF,
    OF_THE_REPORT,
    ONNX,
    PARETO,
    RETUNE,
    SEARCH,
    SENSITIVITY,
    STUDENT,
    TEACHER_GGUF,
    TEACHER_ONNX,
    VALIDATE_GGUF,
    VALIDATE_ONNX,
)
from exporter.work.directory import Reads
from exporter.work.input_state import SourceState
from exporter.work.stage import Stage

__all__ = ["fingerprints", "needless", "needs", "pareto_stages", "reads_of", "search_stages", "stages_of", "taken"]


def stages_of(plan: Plan) -> tuple[Stage, ...]:
    """The stages that build a plan's recipe, without the search, each after those that it needs."""
    recipe = plan.recipe
    wanted = {
        SENSITIVITY: recipe.chooses_codes,
        SEARCH: False,
        PARETO: False,
        GGUF: recipe.gguf is not None,
        VALIDATE_GGUF: recipe.gguf is not None,
        ONNX: recipe.onnx is not None,
        VALIDATE_ONNX: recipe.onnx is not None,
        RETUNE: recipe.recover.after_quantizing is not None,
        STUDENT: recipe.save_student,
        TEACHER_GGUF: "gguf" in plan.teacher_floors and recipe.gguf is not None,
        TEACHER_ONNX: "onnx" in plan.teacher_floors and recipe.onnx is not None,
    }
    return tuple(stage for stage in ALL_STAGES if wanted.get(stage, True))


def search_stages(plan: Plan) -> tuple[Stage, ...]:
    """The stages that find the recipe of a plan that leaves it open."""
    assert plan.search is not None, "its recipe stands"
    return (CALIBRATE, SENSITIVITY, SEARCH)


def pareto_stages() -> tuple[Stage, ...]:
    """The stages that measure a curve of divergence against bytes."""
    return (CALIBRATE, SENSITIVITY, PARETO)


def needs(stage: Stage) -> tuple[str, ...]:
    """The names of the stages whose files a stage reads, and of those that change such files before it."""
    earlier = takewhile(lambda other: other.name != stage.name, ALL_STAGES)
    return tuple(other.name for other in earlier if stage.depends_on(other))


def needless(plan: Plan, done: Sequence[Stage], to_come: Sequence[Stage]) -> dict[str, list[StageFile]]:
    """The files of stages that are done, by stage, which no stage to come reads, nor the report."""
    needed = OF_THE_REPORT.union(*(reads_of(stage, plan) for stage in to_come))
    return {
        stage.name: [file for file in stage.writes if file.name and (stage.name, file) not in needed] for stage in done
    }


def reads_of(stage: Stage, plan: Plan) -> Reads:
    """The files that a stage reads in a run of this plan.

    A writer reads the inputs of the original's layers only to choose codes for a student with the same layers.
    """
    if not stage.takes or plan.search is not None:  # a search may still find that they are needed
        return stage.reads
    chooses_codes = plan.recipe.file(stage.name).quantizer != "kernel"
    return (
        stage.reads
        if chooses_codes and not shrinks(plan.recipe.compress, plan.teacher_spec)
        else stage.reads - stage.takes
    )


def taken(plan: Plan, stage: Stage, to_come: Sequence[Stage]) -> Reads:
    """The files that become a stage's own, because no stage to come reads them."""
    return (reads_of(stage, plan) & stage.takes).difference(*(reads_of(other, plan) for other in to_come))


def fingerprints(plan: Plan, stages: Sequence[Stage], source: SourceState) -> dict[str, str]:
    """Returns for each stage a digest of all that its outputs depend on, including the stages it needs."""
    digests: dict[str, str] = {}
    for stage in stages:
        digests[stage.name] = _fingerprint(stage, plan, source, digests)
    return digests


def _fingerprint(stage: Stage, plan: Plan, source: SourceState, earlier: Mapping[str, str]) -> str:
    recipe, needed = plan.recipe.model_dump(), needs(stage)
    parts = {
        "stage": [stage.name, stage.version],
        "choices": {name: recipe[name] if name in recipe else getattr(plan, name) for name in stage.choices},
        "needs": [earlier[name] for name in needed if name in earlier],
        "source": asdict(source) if not needed else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
