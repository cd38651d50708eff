"""Searches for the best file of each artifact that fits the budget, and writes the recipes that make them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from exporter.file_names import FOUND
from exporter.planning.recipe import Recipe
from exporter.searching.effort import n_measured_files
from exporter.searching.ladder import ladder_for, rung_beside_codes
from exporter.searching.search import Candidate, Search
from exporter.stages.inputs import use_threads
from exporter.work.stage import StageContext

__all__ = ["search"]


def search(context: StageContext) -> None:
    """Writes the results: a recipe for the files that share a student, and all candidates."""
    use_threads(context.plan)
    n_measured = n_measured_files(context)
    searching = Search(context, n_measured)
    best = {artifact: searching.best(artifact) for artifact in context.plan.recipe.artifacts}
    why = {artifact: _why(candidate, searching.candidates) for artifact, candidate in best.items()}
    parts = [_part(context, files, why) for files in _by_student(best)]
    found = {"parts": parts, "candidates": [_plain(candidate) for candidate in searching.candidates]}
    context.file(FOUND).write_text(json.dumps(found, indent=1), encoding="utf-8")
    searching.remove_trials()


def _by_student(best: Mapping[str, Candidate]) -> Iterator[dict[str, Candidate]]:
    """The files of each structure."""
    for compress in dict.fromkeys(candidate.compress for candidate in best.values()):
        yield {artifact: found for artifact, found in best.items() if found.compress == compress}


def _part(context: StageContext, files: Mapping[str, Candidate], why: Mapping[str, str]) -> dict[str, Any]:
    plan = context.plan
    compress = next(iter(files.values())).compress
    recover, refused = ladder_for(compress, plan)
    recipe: Recipe = plan.recipe.model_copy(
        update={
            "compress": compress,
            "recover": recover,
            **dict.fromkeys(("gguf", "onnx")),
            **{name: file.choice.model_copy(update={"why": why[name]}) for name, file in files.items()},
        }
    )
    expected = max(candidate.expected for candidate in files.values())
    beside = recover.model_copy(update={"after_quantizing": rung_beside_codes(recipe, plan, expected)})
    return {
        "name": "-".join(files),
        "recipe": recipe.model_copy(update={"recover": beside}).model_dump(),
        "refused_rungs": [asdict(rung) for rung in refused],
    }


def _why(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """The reason of a choice, for whoever reads the recipe."""
    of_file = [candidate for candidate in candidates if candidate.artifact == chosen.artifact]
    measured = [candidate for candidate in of_file if candidate.measured is not None]
    if chosen.measured is None:
        return f"the lowest predicted divergence of {len(of_file)} files: {chosen.predicted:.4f} nats"
    which = f"the lowest divergence of {len(measured)} files" if len(measured) > 1 else "the divergence of the one file"
    text = f"{which} measured on the selection split: {chosen.measured:.4f} nats"
    mixes = [candidate for candidate in measured if candidate.is_baseline]
    if not mixes:
        return text
    best = min(mixes, key=lambda candidate: candidate.expected)
    return f"{text}; of llama-quantize's mixes {best.choice.mix} is next, {best.expected:.4f}"


def _plain(candidate: Candidate) -> dict[str, Any]:
    return asdict(candidate) | {
        "compress": candidate.compress.model_dump(),
        "choice": candidate.choice.model_dump(),
    }
