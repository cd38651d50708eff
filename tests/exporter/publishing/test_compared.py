"""Runs beside each other: the frontier is that of brute force, and what cannot be compared is refused."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from compressors.model.errors import InputError
from exporter.cli import main
from exporter.publishing.compared import compare_runs
from tests.validate.report.test_report import Page, crashed, sample_report
from validate.report.comparison import compared_files, comparison_table, render_comparison
from validate.report.pareto_plot import Measured, frontier, pareto_plot


def _run(n_bytes: int, divergence: float) -> dict[str, Any]:
    report = copy.deepcopy(sample_report())
    for artifact in report["artifacts"]:
        artifact["bytes"] = n_bytes
    for row in report["validation"]:
        if row["artifact"] in ("gguf", "onnx"):
            row["kld"]["mean"] = divergence
    return report


_RUNS = {"small": _run(5_000_000, 0.3), "large": _run(20_000_000, 0.01), "beaten": _run(21_000_000, 0.02)}


def _is_beaten(file: Measured, others: list[Measured]) -> bool:
    assert file.divergence is not None
    return any(
        other.n_bytes <= file.n_bytes
        and other.divergence is not None
        and other.divergence <= file.divergence
        and (other.n_bytes, other.divergence) != (file.n_bytes, file.divergence)
        for other in others
    )


def test_the_frontier_is_what_nobody_beats_in_both() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        files = [
            Measured(str(label), "gguf", numbers.randrange(8), numbers.randrange(1, 8) / 10, "") for label in range(12)
        ]
        found = {(file.n_bytes, file.divergence) for file in frontier(files)}
        assert found == {(file.n_bytes, file.divergence) for file in files if not _is_beaten(file, files)}


def test_smaller_is_left_closer_is_below_and_each_kind_has_its_line() -> None:
    plot = pareto_plot(
        [
            Measured("1", "gguf", 5_000_000, 0.3, ""),
            Measured("2", "gguf", 20_000_000, 0.01, ""),
            Measured("3", "onnx", 21_000_000, 0.02, ""),
            Measured("4", "onnx", 22_000_000, None, "not measured"),
        ]
    )
    assert plot is not None
    gguf, onnx = plot.fronts
    assert [mark.label for mark in gguf.marks] == ["1", "2"] and [mark.label for mark in onnx.marks] == ["3"]
    assert 0 < gguf.marks[0].x < gguf.marks[1].x < onnx.marks[0].x < 100
    assert 0 < gguf.marks[0].y < onnx.marks[0].y < gguf.marks[1].y < plot.height
    assert gguf.line == tuple((mark.x, mark.y) for mark in gguf.marks)
    for ticks in (plot.x_ticks, plot.y_ticks):
        assert 3 <= len(ticks) <= 12


@pytest.mark.parametrize(("size", "divergence"), [(1, 1e-9), (20_000_000_000, 0.1), (7, 3.0)])
def test_a_single_file_is_plotted(size: int, divergence: float) -> None:
    plot = pareto_plot([Measured("1", "onnx", size, divergence, "")])
    assert plot is not None
    (front,) = plot.fronts
    assert 0 < front.marks[0].x < 100 and 0 < front.marks[0].y < plot.height
    assert pareto_plot([Measured("1", "onnx", size, None, "")]) is None


def test_the_page_shows_every_file_and_asks_for_nothing() -> None:
    html = render_comparison(_RUNS)
    assert "://" not in html and "<script" not in html and "None" not in "".join(Page(html).text)
    for number, name in enumerate(("small", "small", "large", "large", "beaten", "beaten"), start=1):
        assert f"{number}. {name}" in html
    assert html.count('fill-opacity="0.25"') == 2, "beaten in both kinds"
    assert html == render_comparison(copy.deepcopy(_RUNS))
    assert "did not run" in render_comparison({"one": crashed(sample_report(), "gguf")})


def test_the_table_fits_a_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), legacy_windows=False)
    files = compared_files({f"a/long/name/of/a/folder/{name}": run for name, run in _RUNS.items()})
    console.print(comparison_table(files))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    for figure in ("5.00 MB", "0.3000", "0.0100", "21.00 MB"):
        assert any(figure in line for line in lines)


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """Writes the report of a run, as ``published(name, report)``."""

    def write(name: str, report: dict[str, Any]) -> Path:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "report.json").write_text(json.dumps(report), encoding="utf-8")
        return tmp_path / name

    return write


def _complete(report: dict[str, Any]) -> dict[str, Any]:
    """With what a run writes and the page does not need."""
    return report | {"job": {"model": None, "revision": None}} | _needed(report)


def _needed(report: dict[str, Any]) -> dict[str, Any]:
    recipe = {"text": {"heldout_chunks_per_file": 1}, "compress": {"edit": "none"}}
    text, source = {"heldout": {"sha256": "1" * 64}}, report["source"] | {"identity": "x"}
    return {"recipe": recipe, "text": text, "source": source, "student": report["student"] | {"dense": False}}


def test_the_command_reads_folders_and_outputs_within(published: Callable[..., Path], tmp_path: Path) -> None:
    one = published("one", _complete(_RUNS["small"]))
    published("both/gguf", _complete(_RUNS["large"]))
    both = published("both", {"parts": {"gguf": {}}})
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["compare", str(one), str(both), "--out", str(page), "--json"])
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout)
    assert [(Path(file["output"]).name, file["artifact"]) for file in files] == [
        *(("one", "gguf"), ("one", "onnx"), ("gguf", "gguf"), ("gguf", "onnx"))
    ]
    assert [file["divergence"] for file in files] == [0.3, 0.3, 0.01, 0.01]
    assert "1. " in page.read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"page\.html exists"):
        compare_runs([one], page)


def test_what_cannot_be_compared_is_refused(published: Callable[..., Path], tmp_path: Path) -> None:
    one = published("one", _complete(_RUNS["small"]))
    other = _complete(_RUNS["large"])
    model = published("model", other | {"source": other["source"] | {"identity": "another"}})
    text = published("text", other | {"text": {"heldout": {"sha256": "2" * 64}}})
    damaged = published("damaged", other | {"artifacts": [{"path": "x"}]})
    for folder, said in (
        (model, "model was made from another original than .*one"),
        (text, "text was measured on another text than .*one"),
        (damaged, "a report is damaged"),
        (tmp_path, "is not the output folder of a finished run"),
    ):
        with pytest.raises(InputError, match=said):
            compare_runs([one, folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
