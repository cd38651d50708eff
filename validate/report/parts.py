"""The table of a run with several outputs: one for each budget, or for each file with its own student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from validate.report import facts, numbers
from validate.report.facts import Report, find

__all__ = ["parts_table", "render_parts"]

_COLUMNS = ("output", "file", "size", "bits", "divergence", "same top", "perplexity", "verdict")


def render_parts(reports: Mapping[str, Report]) -> str:
    """Renders the table as the README.md of the folder that holds the outputs.

    Args:
        reports: the report of each output, by the name of its folder.

    Returns:
        Markdown. Equal reports give equal text.
    """
    first = next(iter(reports.values()))
    lines = [
        f"# {facts.model_name(first)}",
        "",
        "Each folder is an output of its own, with a report. All were made from one calibration. Bits are those of a "
        "weight, scales included; the divergence from the original is in nats, on held-out text.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(row) + " |" for row in _rows(reports)),
    ]
    return "\n".join(lines) + "\n"


def parts_table(reports: Mapping[str, Report]) -> Table:
    """Returns the same table for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in _rows(reports):
        table.add_row(*row)
    return table


def _rows(reports: Mapping[str, Report]) -> Iterator[tuple[str, ...]]:
    for name, report in reports.items():
        for artifact in report["artifacts"]:
            row = facts.validation_row(report, artifact["format"]) or {}
            yield (
                name,
                facts.artifact_name(artifact["format"]),
                numbers.size_parts(artifact["bytes"])[0],
                f"{artifact['bits_per_weight']:.2f}",
                numbers.divergence(find(row, "kld", "mean")),
                numbers.percent(row.get("top1_agreement")),
                numbers.perplexity(row.get("perplexity")),
                "passed" if find(report, "verdict", "passed") else "failed",
            )
