"""The table of a curve: every file from the largest, and beside each of ours the best baseline of no more bytes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from exporter.curve.rows import OURS, ParetoRow, best_no_larger
from validate.report.tables import Cell, Row
from validate.report.tables import Table as HtmlTable

__all__ = ["html_table", "markdown_lines", "pareto_table"]

_COLUMNS = (
    *("file", "structure", "MB", "of 16 bits", "divergence, nats", "same top token", "perplexity"),
    *("best baseline of no more bytes", "ratio"),
)

_ON_A_PAGE = ("File", "MB", "Of 16 bits", "Divergence, nats", "Same top token", "Perplexity", "Ratio to baseline")

_ON_A_TERMINAL = (0, 2, 3, 4, 8)  # indices of the columns that fit


def markdown_lines(rows: Sequence[ParetoRow]) -> list[str]:
    """A table in Markdown."""
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(_cells(row, rows) for row in _sorted(rows))]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def html_table(rows: Sequence[ParetoRow]) -> HtmlTable:
    """Returns the table for a page, where structures and baselines are small print."""
    return HtmlTable(_ON_A_PAGE, tuple(_html_row(row, rows) for row in _sorted(rows)))


def pareto_table(rows: Sequence[ParetoRow]) -> Table:
    """The columns that fit a terminal: files, sizes, divergences, and ratios to the best baseline of no more bytes."""
    table = Table(*(_COLUMNS[column] for column in _ON_A_TERMINAL))
    for row in _sorted(rows):
        cells = _cells(row, rows)
        table.add_row(*(cells[column] for column in _ON_A_TERMINAL), style="bold" if row.method == OURS else None)
    return table


def _html_row(row: ParetoRow, rows: Sequence[ParetoRow]) -> Row:
    name, structure, megabytes, share, divergence, top1, perplexity, baseline, ratio = _cells(row, rows)
    mean, error = divergence.split(" ", 1)
    figures = (Cell(megabytes), Cell(share), Cell(mean, note=error), Cell(top1), Cell(perplexity))
    compared = Cell(ratio, note=baseline and f"of {baseline}", tone="good" if ratio and float(ratio) <= 1 else "")
    return Row(name, (*figures, compared), note=structure)


def _sorted(rows: Sequence[ParetoRow]) -> list[ParetoRow]:
    return sorted(rows, key=lambda row: (-row.n_bytes, row.method, row.mix))


def _cells(row: ParetoRow, rows: Sequence[ParetoRow]) -> list[str]:
    best = best_no_larger(rows, row) if row.method == OURS else None
    return [
        f"{row.method}, {row.mix}",
        row.structure,
        f"{row.n_bytes / 1e6:.2f}",
        f"{row.share:.1%}",
        f"{row.divergence:.5f} ± {row.divergence_error:.5f}",
        f"{row.top1:.2%}",
        f"{row.perplexity:.3f}",
        "" if best is None else f"{best.method}, {best.mix}: {best.divergence:.5f}",
        "" if best is None else f"{row.divergence / best.divergence:.2f}",
    ]
