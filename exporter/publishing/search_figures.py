"""The report's figures of the files that a search considered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from compressors.model.description.spec import ModelSpec
from exporter.file_names import FOUND
from exporter.planning.compression import described_compression
from exporter.planning.recipe import CompressChoice, FileChoice, Recipe
from exporter.work.directory import WorkDirectory

__all__ = ["described_types", "named_types", "search_figures"]

_MOST_TYPES = 4


def search_figures(work: WorkDirectory, teacher: ModelSpec, recipe: Recipe) -> list[dict[str, Any]]:
    """The candidates of a finished search, as data for JSON; none if there was no search."""
    path = work.path("search", FOUND)
    if not path.exists():
        return []
    candidates = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    return [
        _figures(candidate, teacher, recipe) for candidate in candidates if candidate["artifact"] in recipe.artifacts
    ]


def named_types(choice: FileChoice) -> str:
    """Names the types: the mix, or ``types by tensor, mostly IQ3_S``."""
    if not choice.tensors:
        return choice.mix
    (most, _), *_ = Counter(choice.tensors.values()).most_common()
    return f"types by tensor, mostly {most}"


def described_types(choice: FileChoice) -> str:
    """Describes the types: the mix, or the numbers of tensors that have each of the most common types."""
    if not choice.tensors:
        return choice.mix
    counts = Counter(choice.tensors.values()).most_common()
    named = [f"{count} {name}" for name, count in counts[:_MOST_TYPES]]
    rest = sum(count for _, count in counts[_MOST_TYPES:])
    return ", ".join([*named, f"{rest} others"] if rest else named)


def _figures(candidate: Mapping[str, Any], teacher: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    artifact, compress = candidate["artifact"], CompressChoice.model_validate(candidate["compress"])
    choice, chosen = FileChoice.model_validate(candidate["choice"]), recipe.file(artifact)
    return {
        "format": artifact,
        "keeps": described_compression(compress, teacher),
        "types": described_types(choice),
        "bytes": candidate["n_bytes"],
        "predicted": candidate["predicted"],
        "measured": candidate["measured"],
        "is_baseline": candidate["is_baseline"],
        "is_chosen": (compress, choice.mix, choice.tensors) == (recipe.compress, chosen.mix, chosen.tensors),
    }
