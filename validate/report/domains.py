"""Figures by domain: a table of all, and the one where a file is furthest from the original."""

from __future__ import annotations

from validate.report import numbers
from validate.report.facts import Report, artifact_name, find, row_name, shipped_rows
from validate.report.tables import Cell, Row, Table

__all__ = ["domain_rows", "domain_table", "worst_domain"]

_HEADINGS = (
    "Domain",
    "Perplexity",
    "Of the original",
    "Change",
    "Mean divergence",
    "Same top token",
)


def domain_table(report: Report) -> Table:
    """Every domain of the held-out text, and in it every model; no rows if there is one domain only."""
    models = [row for row in report["validation"] if len(row.get("domains") or []) > 1]
    names = dict.fromkeys(figures["domain"] for row in models for figures in row["domains"])
    rows = []
    for name in names:
        for row in models:
            (figures,) = (found for found in row["domains"] if found["domain"] == name)
            kld = figures["kld"]
            cells = (
                Cell(numbers.perplexity(figures["perplexity"])),
                Cell(numbers.perplexity(figures["perplexity_teacher"])),
                Cell(numbers.change(figures["perplexity_teacher"], figures["perplexity"])),
                Cell(numbers.divergence(kld["mean"]), note=numbers.interval(kld["mean_interval"], numbers.divergence)),
                Cell(
                    numbers.percent(figures["top1_agreement"]),
                    note=numbers.interval(figures["top1_agreement_interval"], numbers.percent),
                ),
            )
            rows.append(Row(name, cells, kind=row["artifact"], note=row_name(row)))
    return Table(_HEADINGS, tuple(rows))


def domain_rows(report: Report) -> list[tuple[str, ...]]:
    """The files' part of the table as text, with the model after the domain, intervals in brackets."""
    shipped = {row_name(row) for row in shipped_rows(report)}
    return [
        (row.name, row.note, *(f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells))
        for row in domain_table(report).rows
        if row.note in shipped
    ]


def worst_domain(report: Report) -> str | None:
    """One line on the domain in which a file's mean divergence is largest; None if there is one domain only."""
    found = [
        (float(find(figures, "kld", "mean")), row, figures)
        for row in shipped_rows(report)
        if len(row.get("domains") or []) > 1
        for figures in row["domains"]
    ]
    if not found:
        return None
    mean, row, figures = max(found, key=lambda entry: entry[0])
    change = numbers.change(figures["perplexity_teacher"], figures["perplexity"])
    return (
        f"Worst domain: {figures['domain']} ({artifact_name(row['artifact'])}): mean divergence "
        f"{numbers.divergence(mean)} nats, perplexity {change}"
    )
