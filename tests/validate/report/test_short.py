"""The short end of a run: five figures of each model, the verdict, one text, and where the rest is."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.validate.report.test_report import crashed, dense, least, only, sample_report
from validate.report.continuation import continuation
from validate.report.html import render_html
from validate.report.numbers import DASH
from validate.report.run import where_the_rest_is
from validate.report.short import short_summary


@pytest.fixture
def report() -> dict[str, Any]:
    """A run whose original and files wrote texts."""
    report = sample_report()
    written = next(row["generation"] for row in report["validation"] if row.get("generation"))
    for row in report["validation"]:
        if row["artifact"] != "student":
            row["generation"] = copy.deepcopy(written)
    return report


def _shown(reports: Mapping[str, Any]) -> list[str]:
    """The lines at 100 columns."""
    console = Console(width=100, file=io.StringIO(), legacy_windows=False)
    console.print(short_summary(reports))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(len(line) for line in lines) <= 100
    assert not any("…" in line or "None" in line or "nan" in line for line in lines)
    return lines


def _rows(lines: list[str]) -> dict[str, list[str]]:
    """The table's rows by their names, cut where three spaces part the columns."""
    rows = [[cell.strip() for cell in line.split("   ") if cell] for line in lines]
    return {row[0]: row[1:] for row in rows if row}


def _writers(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["validation"] if row.get("generation")]


def test_five_figures_of_the_original_and_each_file(report: dict[str, Any]) -> None:
    lines = _shown({"": report})
    assert lines[2].split() == ["original", "GGUF", "ONNX"]
    assert [line.split("  ")[0] for line in lines[3:8]] == [
        *("size", "perplexity", "divergence, nats", "same routing", "tokens/s")
    ]
    rows = _rows(lines)
    assert rows["size"] == ["42.50 MB", "9.91 MB", "9.94 MB"]
    assert rows["perplexity"] == ["38.41", "49.23", "49.21"]
    assert rows["divergence, nats"] == [DASH, "0.2646", "0.2652"]


def test_a_dense_student_has_no_routing(report: dict[str, Any]) -> None:
    assert "same routing" not in "\n".join(_shown({"": dense(report)}))


def test_failures_and_crashes_are_said(report: dict[str, Any]) -> None:
    lines = "\n".join(_shown({"": crashed(report, "gguf")}))
    assert "did not run" in lines
    assert "killed by SIGILL" in lines


def test_what_was_not_measured_is_left_out() -> None:
    assert "Built; nothing was checked" in _shown({"": least()})


def test_outputs_of_several_folders_stand_side_by_side(report: dict[str, Any]) -> None:
    parts = {name: only(copy.deepcopy(report), name) for name in ("gguf", "onnx")}
    lines = _shown(parts)
    assert _rows(lines)["size"] == ["42.50 MB", "9.91 MB", "9.94 MB"]
    assert [line for line in lines if line.startswith(("gguf: ", "onnx: "))]
    budgets = dict.fromkeys(("4MB", "8MB", "16MB"), report)
    assert "output" in _shown(budgets)[2], "a row for each file"


def test_one_text_is_shown_with_how_it_was_drawn(report: dict[str, Any]) -> None:
    text = continuation({"": report})
    assert text is not None
    assert text.texts == dict.fromkeys(("original", "GGUF", "ONNX"), " calm, and <calm>")
    lines = " ".join(_shown({"": report}))
    assert "tokens drawn with the same random numbers for each, at temperature 0.5" in " ".join(lines.split())
    assert "prompt     The sea was" in lines
    page = render_html(report)
    assert "<dt>ONNX</dt><dd>calm, and &lt;calm&gt;</dd>" in page


def test_a_text_commands_no_terminal(report: dict[str, Any]) -> None:
    for row in _writers(report):
        row["generation"]["example"] |= {"text": "a\x1b[2Jb\x07[bold]c"}
    lines = "\n".join(_shown({"": report}))
    assert "a [2Jb [bold]c" in lines


def test_models_that_wrote_nothing_or_after_other_prompts_show_no_text(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    for row in _writers(other):
        row["generation"]["example"]["prompt"] = "another"
    assert continuation({"4MB": report, "8MB": other}) is None
    del _writers(other)[-1]["generation"]["example"]
    text = continuation({"": other})
    assert text is not None and list(text.texts) == ["original", "GGUF"]
    del _writers(other)[0]["generation"]["example"]["text"]  # a report of an earlier version
    assert continuation({"": other}) is None


def test_the_rest_is_named() -> None:
    one = where_the_rest_is({"": {}}, Path("demo"))
    assert one.splitlines() == [
        "All figures, with intervals and floors: demo/report.html",
        "How to run the files: demo/README.md",
    ]
    assert "demo/gguf/report.html, demo/onnx/report.html" in where_the_rest_is({"gguf": {}, "onnx": {}}, Path("demo"))
