"""Geometry of the load maps: layers down, the original's experts across, one SVG path for each level of load.

One path per level instead of one rectangle per expert keeps a page of 48 layers x 128 experts small. Cells are pieces
of lines as thick as a row is high; units are cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from validate.report.facts import Report, artifact_name, find

__all__ = ["LEVELS", "HeatMap", "Level", "load_maps"]

_NOTHING = "nothing"  # for a layer that never had experts: no path is drawn
_AFTER = ("gguf", "onnx", "student")  # the first one that was measured is shown beside the original


@dataclass(frozen=True)
class Level:
    """Loads below ``limit`` even shares, and not below the level before it; None: no limit."""

    kind: str  # the path's class
    label: str
    limit: float | None


LEVELS = (
    Level("dead", "below 0.1 (dead)", 0.1),
    Level("load1", "0.1 to 0.5", 0.5),
    Level("load2", "0.5 to 1", 1.0),
    Level("load3", "1 to 2", 2.0),
    Level("load4", "2 to 4", 4.0),
    Level("load5", "4 and more", None),
)
"""The levels in even shares: an even share is the load of each expert if all had the same."""


@dataclass(frozen=True)
class HeatMap:
    """One map; ``paths`` are (class, SVG path)."""

    title: str
    n_layers: int
    n_experts: int
    paths: tuple[tuple[str, str], ...]
    row_height: int


def load_maps(report: Report) -> list[HeatMap]:
    """The original's load and, in the same numbering, the student's; empty if the report has none.

    An expert that was merged into another shows the load of that one.
    """
    loads, n_experts = report.get("load") or {}, report["source"]["n_experts"]
    before = find(loads, "teacher", "tokens")
    after = next((name for name in _AFTER if find(loads, name, "tokens")), None)
    experts = find(report, "student", "expert_map")
    if before is None or after is None or experts is None:
        return []
    nothing = [_NOTHING] * n_experts
    teacher = [_kinds(layer, range(n_experts)) if layer else nothing for layer in before]
    student = [["dropped"] * n_experts if layer else nothing for layer in before]
    for layer, tokens in zip(experts["layers"], loads[after]["tokens"], strict=True):
        if tokens:
            student[layer["source"]] = _kinds(tokens, _student_of(layer, n_experts))
    return [_map("Before: the original", teacher), _map(f"After: the {artifact_name(after)}", student)]


def _student_of(layer: Mapping[str, Any], n_experts: int) -> list[int | None]:
    table: list[int | None] = [None] * n_experts
    for student, group in enumerate(layer["groups"]):
        for expert in group:
            table[expert] = student
    return table


def _kinds(tokens: Sequence[float], student_of: Sequence[int | None]) -> list[str]:
    """The kind of every expert of the original in one layer."""
    even = sum(tokens) / len(tokens)
    return ["dropped" if expert is None else _level(tokens[expert] / even) for expert in student_of]


def _level(shares: float) -> str:
    return next(level.kind for level in LEVELS if level.limit is None or shares < level.limit)


def _map(title: str, cells: Sequence[Sequence[str]]) -> HeatMap:
    paths: dict[str, list[str]] = {}
    for layer, experts in enumerate(cells):
        for kind, first, length in _runs(experts):
            paths.setdefault(kind, []).append(f"M{first} {layer}.5h{length}")
    order = [*(level.kind for level in LEVELS), "dropped"]
    drawn = tuple((kind, "".join(paths[kind])) for kind in order if kind in paths)
    row_height = min(18, max(8, 300 // len(cells)))
    return HeatMap(title, len(cells), len(cells[0]), drawn, row_height)


def _runs(experts: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yields (kind, first expert, count) of each run of equal neighbours."""
    first = 0
    for kind, group in groupby(experts):
        length = len(list(group))
        yield kind, first, length
        first += length
