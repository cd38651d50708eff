"""The last lines of a run in the terminal; everything fits into 100 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from validate.metrics.bootstrap import CONFIDENCE
from validate.report import facts, numbers
from validate.report.domains import worst_domain
from validate.report.facts import Report, find

__all__ = ["summary"]

Column = Mapping[str, Any]

_SAME_WEIGHTS = ("floor", "same_weights")


def summary(report: Report) -> RenderableType:
    """The table that ends a run: models in columns, figures in rows, then the verdict and the failures."""
    columns = report.get("validation") or []
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(_heading(column), justify="right")
    for name, value in _rows(report):
        values = [value(column) for column in columns]
        if any(text != numbers.DASH for text in values):
            table.add_row(name, *values)
    captions = []
    if any(column.get("perplexity_interval") for column in columns):
        captions.append(f"second lines: {100 * CONFIDENCE:.0f} % intervals by bootstrap over chunks of text")
    if any(find(column, *_SAME_WEIGHTS) for column in columns):
        captions.append("floor: the runtime beside torch computing with the same weights")
    table.caption, table.caption_justify = "\n".join(captions) or None, "left"
    worst = worst_domain(report)
    domains = (Text(), Text(worst)) if worst else ()
    known = [Text(f"Known difference: {deviation}") for deviation in facts.deviations(report)]
    title = Text.assemble((facts.model_name(report), "bold"), f": {facts.student_description(report)}")
    return Group(title, _budget_line(report), Text(), table, *domains, *known, Text(), _verdict(report), Text())


def _heading(row: Column) -> str:
    return facts.row_name(row).replace(" in ", "\n", 1)


def _rows(report: Report) -> list[tuple[str, Callable[[Column], str]]]:
    files = {artifact["format"]: artifact["bytes"] for artifact in report.get("artifacts") or []}

    def needed(row: Column) -> int | None:
        return facts.memory_needed(report, row["artifact"])[0] if row["artifact"] in files else None

    def both_units(n_bytes: int | None) -> str:
        return "\n".join(dict.fromkeys(numbers.size_parts(n_bytes)))

    def with_interval(style: Callable[[float | None], str], interval: str, *keys: str) -> Callable[[Column], str]:
        """Formats a figure, and under it its interval, which stands beside it in the report under this name."""

        def value(row: Column) -> str:
            ends = numbers.interval(find(row, *keys[:-1], interval), style).replace(" to ", numbers.DASH)
            return "\n".join(filter(None, (style(find(row, *keys)), ends.removesuffix(" %"))))  # columns are narrow

        return value

    measured_perplexity = with_interval(numbers.perplexity, "perplexity_interval", "perplexity")

    def perplexity(row: Column) -> str:
        return "did not run" if row.get("error") else measured_perplexity(row)

    rows: list[tuple[str, Callable[[Column], str]]] = [
        ("Size on disk", lambda row: both_units(files.get(row["artifact"]))),
        ("Perplexity", perplexity),
        ("Mean divergence, nats", with_interval(numbers.divergence, "mean_interval", "kld", "mean")),
        ("  floor of the runtime", lambda row: numbers.divergence(find(row, *_SAME_WEIGHTS, "kld", "mean"))),
        ("99 % divergence, nats", lambda row: numbers.divergence(find(row, "kld", "p99"))),
        ("Same top token", with_interval(numbers.percent, "top1_agreement_interval", "top1_agreement")),
        ("  floor of the runtime", lambda row: numbers.percent(find(row, *_SAME_WEIGHTS, "top1_agreement"))),
        (
            "Routing as in the student",
            with_interval(numbers.percent, "overlap_interval", "routing", "vs_torch_student", "overlap"),
        ),
        ("  floor of the runtime", lambda row: numbers.percent(find(row, *_SAME_WEIGHTS, "routing", "overlap"))),
        (
            "Routing as in the original",
            with_interval(numbers.percent, "overlap_interval", "routing", "vs_teacher", "overlap"),
        ),
        ("Last words found", with_interval(numbers.percent, "accuracy_interval", "cloze", "accuracy")),
        ("Greedy texts that loop", lambda row: numbers.percent(find(row, "generation", "greedy", "loop_rate"))),
        ("Sampled texts that loop", lambda row: numbers.percent(find(row, "generation", "sampled", "loop_rate"))),
        ("Decode, tokens/s", lambda row: numbers.speed(row.get("decode_tokens_per_second"))),
    ]
    if find(report, "budget", "kind") != "file":
        rows.insert(1, ("Memory at full context", lambda row: both_units(needed(row))))
    return rows


def _budget_line(report: Report) -> Text:
    budget = report["budget"]
    what = "the file" if budget["kind"] == "file" else f"memory at {numbers.count(budget['context'])} tokens of context"
    return Text(
        f"Budget {numbers.size(budget['bytes'])} for {what}; original {numbers.size(report['source']['bytes'])}"
    )


def _verdict(report: Report) -> Text:
    passed = bool(find(report, "verdict", "passed"))
    style = "bold green" if passed else "bold red"
    lines = Text()
    for row in facts.shipped_rows(report):
        if (cache := row.get("quantized_cache")) is not None:
            lines.append(f"{facts.cache_sentence(row, cache)}\n\n")
    lines.append(facts.verdict_title(report), style=style)
    for failure in facts.failures(report):
        lines.append(f"\n  {failure}", style="red")
    for row in facts.shipped_rows(report):
        if row.get("error"):
            lines.append(f"\n  {facts.row_name(row)} did not run: {row['error']}", style="red")
    return lines
