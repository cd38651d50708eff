"""Several finished runs beside each other: one table, and one plot of divergence against bytes, in one page.

Divergences are compared within a runtime: each runtime adds a little of its own, so GGUF and ONNX have a frontier each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table as TerminalTable

from validate.report import facts, numbers
from validate.report.facts import Report, find
from validate.report.html import environment
from validate.report.pareto_plot import Measured, pareto_plot
from validate.report.tables import Cell, Row, Table

__all__ = ["ComparedFile", "compared_files", "comparison_table", "render_comparison"]


@dataclass(frozen=True)
class ComparedFile:
    """A file of a run with its figures; None: not measured."""

    output: str  # the folder, as the user named it
    artifact: str  # gguf or onnx
    type: str
    left: str  # the layers and experts that are left
    bytes: int
    bits_per_weight: float
    perplexity: float | None
    perplexity_original: float | None
    divergence: float | None  # mean, in nats, from the original
    divergence_interval: tuple[float, float] | None
    top1_agreement: float | None
    routing: float | None  # overlap with the original's
    tokens_per_second: float | None
    loop_rate: float | None  # of greedy texts
    passed: bool
    error: str | None


def compared_files(reports: Mapping[str, Report]) -> list[ComparedFile]:
    """The files of all runs, the smallest first.

    Args:
        reports: the report of each output, by its name.
    """
    files = [_file(name, report, artifact) for name, report in reports.items() for artifact in report["artifacts"]]
    return sorted(files, key=lambda file: (file.bytes, file.output, file.artifact))


def _file(output: str, report: Report, artifact: Mapping[str, Any]) -> ComparedFile:
    row = facts.validation_row(report, artifact["format"])
    interval = find(row, "kld", "mean_interval")
    return ComparedFile(
        output=output,
        artifact=artifact["format"],
        type=artifact["type"],
        left=facts.what_is_left(report),
        bytes=artifact["bytes"],
        bits_per_weight=artifact["bits_per_weight"],
        perplexity=row.get("perplexity"),
        perplexity_original=row.get("perplexity_teacher"),
        divergence=find(row, "kld", "mean"),
        divergence_interval=None if interval is None else (interval[0], interval[1]),
        top1_agreement=row.get("top1_agreement"),
        routing=find(row, "routing", "vs_teacher", "overlap"),
        tokens_per_second=row.get("decode_tokens_per_second"),
        loop_rate=find(row, "generation", "greedy", "loop_rate"),
        passed=bool(find(report, "verdict", "passed")),
        error=row.get("error"),
    )


def comparison_table(files: Sequence[ComparedFile]) -> TerminalTable:
    """The table for the terminal: the most telling figures, in 80 columns."""
    headings = ("", "output", "file", "size", "divergence", "perplexity", "tokens/s", "checks")
    table = TerminalTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        is_name = heading == "output"  # the only one that may be cut into lines
        justify: Literal["left", "right"] = "left" if heading in ("output", "file") else "right"
        table.add_column(
            heading, justify=justify, overflow="fold", no_wrap=not is_name, min_width=12 if is_name else None
        )
    for number, file in enumerate(files, start=1):
        table.add_row(
            str(number),
            file.output,
            facts.artifact_name(file.artifact),
            numbers.size_parts(file.bytes)[0],
            "did not run" if file.error else numbers.divergence(file.divergence),
            numbers.perplexity(file.perplexity),
            numbers.speed(file.tokens_per_second),
            _verdict(file),
        )
    return table


def render_comparison(reports: Mapping[str, Report]) -> str:
    """Renders table and plot as one page that asks for nothing from outside.

    Args:
        reports: the report of each output, by its name; all of one original and one held-out text.

    Returns:
        The page. Equal reports give equal text.
    """
    files, first = compared_files(reports), next(iter(reports.values()))
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            name=facts.model_name(first),
            source=first["source"],
            numbers=numbers,
            table=_page_table(files),
            plot=pareto_plot(
                [
                    Measured(str(number), file.artifact, file.bytes, file.divergence, _described(file))
                    for number, file in enumerate(files, start=1)
                ]
            ),
        )
    )


def _page_table(files: Sequence[ComparedFile]) -> Table:
    headings = (
        *("File", "Size", "Bits per weight", "Mean divergence", "Same top token", "Perplexity", "Routing", "Loops"),
        *("Tokens/s", "Checks"),
    )
    rows = []
    for number, file in enumerate(files, start=1):
        cells = (
            Cell(numbers.size_parts(file.bytes)[0], note=numbers.exact_bytes(file.bytes)),
            Cell(f"{file.bits_per_weight:.2f}", note=file.type),
            Cell(
                numbers.divergence(file.divergence), note=numbers.interval(file.divergence_interval, numbers.divergence)
            ),
            Cell(numbers.percent(file.top1_agreement)),
            Cell(
                numbers.perplexity(file.perplexity),
                note=numbers.change(file.perplexity_original, file.perplexity),
            ),
            Cell(numbers.percent(file.routing)),
            Cell(numbers.percent(file.loop_rate)),
            Cell(numbers.speed(file.tokens_per_second)),
            Cell(_verdict(file), tone="good" if file.passed else "bad"),
        )
        name = f"{number}. {file.output}"
        note = f"{facts.artifact_name(file.artifact)}, {file.left}"
        rows.append(Row(name, cells, file.artifact, note=note, error=file.error))
    return Table(headings, tuple(rows))


def _verdict(file: ComparedFile) -> str:
    return "passed" if file.passed else "failed"


def _described(file: ComparedFile) -> str:
    size, divergence = numbers.size_parts(file.bytes)[0], numbers.divergence(file.divergence)
    return f"{file.output}, {facts.artifact_name(file.artifact)}: {size}, {divergence} nats"
