"""The last lines of a run, short: five figures of the original and of each file, the verdict, and one text.

Everything fits into 100 columns. Intervals, floors and all other figures are in the report, and in
:mod:`validate.report.terminal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from validate.report import facts, numbers
from validate.report.continuation import Continuation, continuation
from validate.report.facts import Report, find
from validate.report.parts import parts_table

__all__ = ["short_summary"]

_MOST_FILES = 4
"""With more, the table has a row for each file."""

_Column = tuple[Report, Mapping[str, Any]]  # the report, and the validation row of a file in it


def short_summary(reports: Mapping[str, Report]) -> RenderableType:
    """The last lines of a run.

    Args:
        reports: the report of each output, by the name of its folder; a single output's name is empty.
    """
    columns = [(report, row) for report in reports.values() for row in facts.shipped_rows(report)]
    table = _table(reports, columns) if len(columns) <= _MOST_FILES else parts_table(reports)
    first = next(iter(reports.values()))
    text = continuation(reports)
    return Group(_title(reports, first), Text(), table, *_verdicts(reports), *([] if text is None else _texts(text)))


def _title(reports: Mapping[str, Report], first: Report) -> Text:
    name = facts.model_name(first)
    if len(reports) > 1:
        return Text(name, "bold")
    return Text.assemble((name, "bold"), f": {facts.student_description(first)}")


def _table(reports: Mapping[str, Report], columns: list[_Column]) -> Table:
    """Models in columns, five figures in rows."""
    original, first = facts.validation_row(next(iter(reports.values())), "teacher"), next(iter(reports.values()))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    names = [name for name, report in reports.items() for _ in facts.shipped_rows(report)]
    for heading in ("original", *(_heading(name, row) for name, (_, row) in zip(names, columns, strict=True))):
        table.add_column(heading, justify="right")
    table.add_row("size", _size(first["source"]["bytes"]), *(_size(_file(*column)) for column in columns))
    for name, value in _FIGURES.items():
        if not (facts.is_dense(first) and name == _ROUTING):
            table.add_row(name, value(original), *(value(row) for _, row in columns))
    return table


def _heading(part: str, row: Mapping[str, Any]) -> str:
    name = facts.artifact_name(row["artifact"])
    return name if part in ("", row["artifact"]) else f"{name}\n{part}"


def _size(n_bytes: int | None) -> str:
    return numbers.size_parts(n_bytes)[0]


def _file(report: Report, row: Mapping[str, Any]) -> int | None:
    return next((file["bytes"] for file in report["artifacts"] if file["format"] == row["artifact"]), None)


_ROUTING = "same routing"
_FIGURES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "perplexity": lambda row: "did not run" if row.get("error") else numbers.perplexity(row.get("perplexity")),
    "divergence, nats": lambda row: numbers.divergence(find(row, "kld", "mean")),
    _ROUTING: lambda row: numbers.percent(find(row, "routing", "vs_teacher", "overlap")),
    "tokens/s": lambda row: numbers.speed(row.get("decode_tokens_per_second")),
}
"""The rows after the size, each with the figure of a validation row."""


def _verdicts(reports: Mapping[str, Report]) -> list[Text]:
    lines = [Text()]
    for name, report in reports.items():
        style = "bold green" if find(report, "verdict", "passed") else "bold red"
        lines.append(Text(f"{name}: " * bool(name) + facts.verdict_title(report), style))
        lines += [Text(f"  {failure}", "red") for failure in facts.failures(report)]
        for row in facts.shipped_rows(report):
            if row.get("error"):
                lines.append(Text(f"  {facts.row_name(row)} did not run: {row['error']}", "red"))
            if (cache := row.get("quantized_cache")) is not None:
                lines.append(Text(f"  {facts.cache_sentence(row, cache)}"))
    return lines


def _texts(text: Continuation) -> list[RenderableType]:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column("", style="bold")
    table.add_column("", overflow="fold")
    table.add_row("prompt", _one_line(text.prompt))
    for name, written in text.texts.items():
        table.add_row(name, _one_line(written))
    return [Text(), Text(f"One text, continued ({text.how}):"), Text(), table]


def _one_line(text: str) -> Text:
    """The text without line ends and without characters that command a terminal."""
    return Text("".join(character if character.isprintable() else " " for character in " ".join(text.split())))
