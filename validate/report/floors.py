"""Floors in words and tables: the changes that a runtime makes by itself. Smaller figures mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validate.report import numbers
from validate.report.facts import Report, artifact_name, find, is_dense, row_name, shipped_rows
from validate.report.tables import Cell, Row, Table

__all__ = ["FLOOR_SENTENCE", "floor_rows", "floor_table"]

FLOOR_SENTENCE = (
    "A floor is what a runtime changes by itself: it is compared with torch computing with the same numbers, those of "
    "the file, and those of the original without quantization. Differences below it say nothing about the model."
)

_HEADINGS = (
    "Runtime and weights",
    "Perplexity",
    "From torch",
    "Mean divergence",
    "Median",
    "99.9 %",
    "Same top token",
    "Routing overlap",
)


def floor_table(report: Report) -> Table:
    """Compares every runtime with torch with the same weights; no rows if that was not measured."""
    rows, with_routing = [], not is_dense(report)
    for row in shipped_rows(report):
        same_weights, teacher = find(row, "floor", "same_weights"), find(row, "floor", "teacher")
        if same_weights is not None:
            rows.append(_row(row, f"{artifact_name(row['artifact'])}'s weights", same_weights, with_routing))
        if teacher is not None:
            rows.append(_row(row, _of_teacher(teacher), teacher, with_routing))
    return Table(_HEADINGS if with_routing else _HEADINGS[:-1], tuple(rows))


def floor_rows(report: Report) -> list[tuple[str, ...]]:
    """The table's rows as text, headings first, intervals in brackets; empty if nothing was measured."""
    table = floor_table(report)
    rows = [
        (
            row.name + (f", {row.note}" if row.note else ""),
            *(f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells),
        )
        for row in table.rows
        if row.error is None
    ]
    return [table.headings, *rows] if rows else []


def _row(measured: Mapping[str, Any], weights: str, figures: Mapping[str, Any], with_routing: bool) -> Row:
    name, kind = f"{row_name(measured).partition(' in ')[2]}, {weights}", str(measured["artifact"])
    if figures.get("error"):
        return Row(name, kind=kind, error=str(figures["error"]))
    kld, routing = figures["kld"], figures.get("routing") or {}
    cells = (
        Cell(numbers.perplexity(figures["perplexity"])),
        Cell(
            numbers.change(figures["perplexity_torch"], figures["perplexity"]),
            note=numbers.interval(figures["perplexity_ratio_interval"], _change),
        ),
        Cell(numbers.divergence(kld["mean"]), note=numbers.interval(kld["mean_interval"], numbers.divergence)),
        *(Cell(numbers.divergence(kld[key])) for key in ("median", "p999")),
        Cell(
            numbers.percent(figures["top1_agreement"]),
            note=numbers.interval(figures["top1_agreement_interval"], numbers.percent),
        ),
        Cell(
            numbers.percent(routing.get("overlap")),
            note=numbers.interval(routing.get("overlap_interval"), numbers.percent),
        ),
    )
    return Row(name, cells if with_routing else cells[:-1], kind, note=f"{figures['chunks']} chunks")


def _change(ratio: float) -> str:
    return numbers.change(1.0, ratio)


def _of_teacher(teacher: Mapping[str, Any]) -> str:
    """Returns ``the original in BF16``, or ``first 4 of 48 layers of the original in BF16``."""
    whole = teacher["n_layers"] == teacher["of_layers"]
    part = "" if whole else f"first {teacher['n_layers']} of {teacher['of_layers']} layers of "
    return f"{part}the original in {teacher['type']}"
