"""``report.html``: one file that asks for nothing from outside and needs no scripts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from validate.metrics.bootstrap import CONFIDENCE
from validate.report import charts, facts, heat_map, numbers, tables, use
from validate.report.continuation import continuation
from validate.report.domains import domain_table
from validate.report.facts import Report, find
from validate.report.floors import FLOOR_SENTENCE, floor_table
from validate.report.statistics import statistics_table

if TYPE_CHECKING:
    import jinja2

__all__ = ["environment", "render_html"]


@dataclass(frozen=True)
class Tile:
    """One of the figures under the verdict: a title and one line per file."""

    title: str
    lines: tuple[tuple[str, str], ...]  # label, value
    note: str


def render_html(report: Report) -> str:
    """Renders the content of report.json as one self-contained page.

    Args:
        report: the content of report.json; values that are null or absent are shown as not measured.

    Returns:
        The page. Equal reports give equal text.
    """
    return environment().get_template("report.html.j2").render(_view(report))


def environment() -> jinja2.Environment:
    """Returns the templates, which escape text and refuse unknown names."""
    import jinja2  # a twentieth of a second, which plans do not need

    return jinja2.Environment(
        loader=jinja2.PackageLoader("validate.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _view(report: Report) -> dict[str, Any]:
    rows = report["validation"]
    return {
        "name": facts.model_name(report),
        "source": report["source"],
        "tool": report["tool"],
        "passed": bool(find(report, "verdict", "passed")),
        "verdict_title": facts.verdict_title(report),
        "verdict_sentence": facts.verdict_sentence(report),
        "failures": facts.failures(report),
        "deviations": facts.deviations(report),
        "tiles": _tiles(report),
        "budget": report["budget"],
        "budget_bars": charts.budget_bars(report),
        "budget_table": tables.budget_table(report),
        "scored_tokens": numbers.count(max((row["tokens"] for row in rows if row.get("tokens")), default=None)),
        "divergence_chart": charts.divergence_chart(report),
        "fidelity_table": tables.fidelity_table(report),
        "floor_table": floor_table(report),
        "floor_sentence": FLOOR_SENTENCE,
        "domain_table": domain_table(report),
        "statistics_table": statistics_table(report),
        "confidence": CONFIDENCE,
        "has_intervals": any(row.get("perplexity_interval") for row in rows),
        "across": next((value for row in rows if (value := row.get("kld_vs_other_runtime")) is not None), None),
        "is_dense": facts.is_dense(report),
        "routing_charts": charts.routing_charts(report),
        "routing_table": tables.routing_table(report),
        "search_table": tables.search_table(report),
        "recovery_table": tables.recovery_table(report),
        "student": report["student"],
        "what_is_left": facts.what_is_left(report),
        "expert_grid": charts.expert_grid(report),
        "kept_ranges": [
            "has no experts" if layer is None else charts.kept_ranges(layer)
            for layer in report["student"].get("kept") or []
        ],
        "load_maps": heat_map.load_maps(report),
        "load_levels": heat_map.LEVELS,
        "load_table": tables.load_table(report),
        "cost_table": tables.cost_table(report),
        "use_table": use.use_table(report),
        "trained": use.trained_sentence(report),
        "last_words_table": use.last_words_table(report),
        "generation_table": use.generation_table(report),
        "continuation": continuation({"": report}),
        "original_texts": use.original_texts(report),
        "check_table": tables.check_table(report),
        "command": report.get("command"),
        "recipe": yaml.safe_dump(dict(report.get("recipe") or {}), sort_keys=False, allow_unicode=True),
        "artifact_table": tables.artifact_table(report),
        "text_table": tables.text_table(report),
        "environment": report.get("environment") or {},
        "stage_table": tables.stage_table(report),
        "numbers": numbers,
        "artifact_name": facts.artifact_name,
    }


def _tiles(report: Report) -> tuple[Tile, ...]:
    shipped = facts.shipped_rows(report)
    sizes = [(facts.artifact_name(a["format"]), numbers.size_parts(a["bytes"])[0]) for a in report["artifacts"]]
    before = next((row["perplexity_teacher"] for row in shipped if row.get("perplexity_teacher")), None)
    tiles = [
        Tile("Size on disk", tuple(sizes), f"original {numbers.size_parts(report['source']['bytes'])[0]}"),
        Tile(
            "Perplexity",
            _lines((row, numbers.perplexity(row.get("perplexity"))) for row in shipped),
            f"original {numbers.perplexity(before)}",
        ),
        Tile(
            "Mean divergence",
            _lines((row, numbers.divergence(find(row, "kld", "mean"))) for row in shipped),
            "nats per token from the original",
        ),
    ]
    if not facts.is_dense(report):
        overlap = ((row, numbers.percent(find(row, "routing", "vs_teacher", "overlap"))) for row in shipped)
        tiles.append(Tile("Same routing", _lines(overlap), "the original's choices of experts"))
    return tuple(tiles)


def _lines(values: Iterable[tuple[Any, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((facts.artifact_name(row["artifact"]), "failed" if row.get("error") else text) for row, text in values)
