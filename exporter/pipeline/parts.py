"""The parts of a run: one for each budget, and for each file where GGUF and ONNX do best with different students.

Calibration and sensitivities belong to all parts and are made once. A part is planned, searched, built and measured by
itself, and has a report of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.estimating.sizes import size_label
from exporter.file_names import FOUND, RESULTS
from exporter.planning.job import Job
from exporter.planning.plan import Plan
from exporter.planning.plan_making import make_plan
from exporter.planning.planner import predict_recipe
from exporter.planning.recipe import Recipe
from exporter.planning.recovery import RefusedRung
from exporter.stages.table import OF_ALL_BUDGETS, OF_ALL_FILES
from exporter.work.directory import WorkDirectory, make_folder

__all__ = ["Part", "budget_parts", "found_parts", "result_folder", "save_plans"]


@dataclass(frozen=True)
class Part:
    """One of several parts, or the whole run."""

    name: str  # empty for the whole run
    plan: Plan
    work: WorkDirectory


def budget_parts(job: Job, command: str, work: WorkDirectory) -> list[Part]:
    """A part for each budget; its plan is the one that an earlier attempt of the same job kept, or a new one.

    Raises:
        MoeExportError: a plan cannot be made, or is damaged.
    """
    if len(job.budgets) < 2:
        return [Part("", _kept_plan(work, job) or make_plan(job, command), work)]
    parts = []
    for budget in job.budgets:
        name = size_label(budget)
        of_budget = work.part(name, OF_ALL_BUDGETS)
        plan = _kept_plan(of_budget, job) or make_plan(job.for_budget(budget), command)
        parts.append(Part(name, replace(plan, out=result_folder(work, name)), of_budget))
    return parts


def found_parts(part: Part) -> list[Part]:
    """The parts that a part's search found: the part itself with another recipe, or a part for each file."""
    found = json.loads(part.work.path("search", FOUND).read_text(encoding="utf-8"))
    return [_found(part, entry, alone=len(found["parts"]) == 1) for entry in found["parts"]]


def result_folder(work: WorkDirectory, name: str) -> Path:
    """The folder of a part's output until all parts are there."""
    return work.root.folder / RESULTS / name


def save_plans(parts: Sequence[Part]) -> None:
    """Writes the plans where the processes of stages read them.

    A plan that was kept is written again: it is the same, unless a search was repeated and found something else.
    """
    for part in parts:
        make_folder(part.work.folder)
        part.plan.save(part.work.plan_path)


def _found(part: Part, entry: dict[str, Any], *, alone: bool) -> Part:
    recipe = Recipe.model_validate(entry["recipe"])
    name = part.name if alone else "-".join(filter(None, (part.name, entry["name"])))
    plan = replace(
        part.plan,
        recipe=recipe,
        predictions=predict_recipe(recipe, part.plan.open_source()),
        refused_rungs=tuple(RefusedRung(**refused) for refused in entry["refused_rungs"]),
        deviations=tuple(each for each in part.plan.deviations if each.artifact in recipe.artifacts),
        out=part.plan.out if alone else result_folder(part.work, name),
        search=None,
    )
    return Part(name, plan, part.work.part(f"found-{entry['name']}", OF_ALL_FILES))


def _kept_plan(work: WorkDirectory, job: Job) -> Plan | None:
    """The plan of an unfinished run, which may go on with another ``--out``; None if there is none."""
    return replace(work.plan(), out=job.out.resolve()) if work.plan_path.exists() else None
