"""Searches for the best file of each artifact that fits the budget, and writes the recipes that make them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from exporter.parts import FOUND
from exporter.planning.effort import n_measured_files
from exporter.planning.ladder import ladder_for, rung_beside_codes
from exporter.planning.search import Candidate, Search
from exporter.recipe import Recipe
from exporter.stage import StageContext
from exporter.stages.artifacts import use_threads

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes what was found: a recipe for the files that share a student, and all that was looked at."""
    use_threads(context.plan)
    n_measured = n_measured_files(context)
    search = Search(context, n_measured)
    best = {artifact: search.best(artifact) for artifact in context.plan.recipe.artifacts}
    parts = [_part(context, files) for files in _by_student(best)]
    found = {"parts": parts, "candidates": [_plain(candidate) for candidate in search.candidates]}
    (context.output / FOUND).write_text(json.dumps(found, indent=1), encoding="utf-8")
    search.remove_trials()


def _by_student(best: Mapping[str, Candidate]) -> Iterator[dict[str, Candidate]]:
    """The files of each structure."""
    for compress in dict.fromkeys(candidate.compress for candidate in best.values()):
        yield {artifact: found for artifact, found in best.items() if found.compress == compress}


def _part(context: StageContext, files: Mapping[str, Candidate]) -> dict[str, Any]:
    plan = context.plan
    compress = next(iter(files.values())).compress
    recover, refused = ladder_for(compress, plan)
    recipe: Recipe = plan.recipe.model_copy(
        update={
            "compress": compress,
            "recover": recover,
            "gguf": files["gguf"].choice if "gguf" in files else None,
            "onnx": files["onnx"].choice if "onnx" in files else None,
        }
    )
    expected = max(candidate.expected for candidate in files.values())
    beside = recover.model_copy(update={"after_quantizing": rung_beside_codes(recipe, plan, expected)})
    return {
        "name": "-".join(files),
        "recipe": recipe.model_copy(update={"recover": beside}).model_dump(),
        "refused_rungs": [asdict(rung) for rung in refused],
    }


def _plain(candidate: Candidate) -> dict[str, Any]:
    return asdict(candidate) | {
        "compress": candidate.compress.model_dump(),
        "choice": candidate.choice.model_dump(),
    }
