"""Damaged output folders: report.json, SHA256SUMS, and the files that they name."""

from __future__ import annotations

import json
import random
from pathlib import Path

from exporter.publishing.published import changed_files, read_report
from exporter.validation.references import Reference
from exporter.validation.validated_file import Expectation
from tests.fuzz.places import damaged_bytes, something_else
from tests.fuzz.values import NAMES, VALUES, damaged_json
from validate.files.model_file import find_model_file

__all__ = ["damage_published", "read_published"]


def damage_published(rng: random.Random, folder: Path) -> None:
    """Damages one of the folder's files."""
    kind = rng.random()
    if kind < 0.08:
        something_else(rng, folder / rng.choice(("report.json", "SHA256SUMS", "model.gguf", "recipe.yaml")))
    elif kind < 0.25:
        path = folder / "SHA256SUMS"
        path.write_bytes(_damaged_sums(rng, path.read_bytes()))
    else:
        path = folder / "report.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        if kind < 0.5:
            path.write_bytes(damaged_json(rng, report))
            return
        for _ in range(rng.choice((1, 1, 2))):
            *way, last = rng.choice(_READ)
            node = report
            for key in way:
                node = node[key] if isinstance(node, (dict, list)) and node else {}
            if isinstance(node, (dict, list)) and node:
                node[last] = rng.choice((*VALUES, *NAMES))
        path.write_text(json.dumps(report), encoding="utf-8")


_READ: tuple[tuple[str | int, ...], ...] = (
    *(("artifacts",), ("artifacts", 0), ("artifacts", 0, "path"), ("job",), ("job", "model"), ("job", "revision")),
    *(("source",), ("source", "identity"), ("source", "n_layers"), ("recipe",), ("recipe", "compress", "edit")),
    *(("recipe", "text", "heldout_chunks_per_file"), ("student", "dense"), ("student", "expert_map"), ("recovery",)),
    *(("student", "expert_map", "teacher_experts"), ("student", "expert_map", "layers"), ("text", "heldout", "sha256")),
    *(("student", "expert_map", "layers", 0), ("student", "expert_map", "layers", 0, "groups"), ("validation",)),
    *(("student", "expert_map", "layers", 0, "groups", 0), ("student", "expert_map", "layers", 0, "width")),
    *(("validation", 0), ("validation", 0, "perplexity"), ("validation", 0, "routing"), ("validation", 0, "artifact")),
    *(("student", "expert_map", "layers", 1, "source"), ("student", "expert_map", "layers", 1, "groups", 0, 0)),
)
"""Places of the report that validation reads."""


def _damaged_sums(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    name = rng.choice(NAMES).encode("utf-8")
    return rng.choice(
        (
            damaged_bytes(rng, data, header=len(data)),
            *(b"", b"\n", b"x\n", b"\xff\xfe\n", data + b"\n\n", data * 2, data.replace(b"  ", b" "), data.upper()),
            *(data + b"0" * 64 + b"  " + name + b"\n", data + b"0" * 64 + b"  ../../../dev/zero\n", lines[0]),
            data + b"0" * 64 + b"  /dev/zero\n",
        )
    )


def read_published(folder: Path, rng: random.Random, inputs: Path) -> None:
    """Reads what validation needs of the folder."""
    report = read_report(folder)
    if report is None:
        return
    changed_files(folder, report)
    for artifact in report["artifacts"]:
        find_model_file(folder / artifact["path"])
    Expectation.of_report(folder, report, Reference("x", "x", None, None))  # type: ignore[arg-type]
