"""Reads the reports of several runs for ``moe-export compare``, and refuses those that cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from exporter.file_names import REPORT
from exporter.publishing.published import read_report
from exporter.writing.files import write_atomically
from validate.report.comparison import ComparedFile, compared_files, render_comparison

__all__ = ["compare_runs"]


def compare_runs(outputs: Sequence[Path], page: Path) -> list[ComparedFile]:
    """Compares the files of finished runs and writes a page with a table and a plot.

    Args:
        outputs: the runs' output folders; one with several outputs stands for all of them.
        page: the HTML file to write.

    Returns:
        The files, the smallest first.

    Raises:
        InputError: a folder is not the output of a run, runs are about different models or texts, or the page exists.
    """
    if page.exists():
        raise InputError(f"--out: {page} exists; choose another name, or remove it")
    reports = {str(folder): report for out in outputs for folder, report in _reports(out)}
    _refuse_different(reports, ("source", "identity"), "was made from another original", "compare runs of one model")
    _refuse_different(
        reports, ("text", "heldout", "sha256"), "was measured on another text", "compare runs with the same --text"
    )
    try:
        files, text = compared_files(reports), render_comparison(reports)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"a report is damaged ({type(error).__name__}: {error}): give output folders as their runs left them"
        ) from None
    write_atomically(page, text)
    return files


def _reports(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The report of a folder, or those of the outputs in it."""
    if not (out / REPORT).is_file():
        raise InputError(f"{out} is not the output folder of a finished run: it has no {REPORT}")
    whole = read_json(out / REPORT)
    names = whole["parts"] if isinstance(whole.get("parts"), dict) else [""]
    found = []
    for name in names:
        report = read_report(out / name)
        if report is None:
            raise InputError(f"{out / name} has no {REPORT}; give the output folder of a finished run")
        found.append((out / name, report))
    return found


def _refuse_different(reports: dict[str, dict[str, Any]], keys: Sequence[str], what: str, advice: str) -> None:
    values = {}
    for name, report in reports.items():
        value: Any = report
        for key in keys:
            value = value[key]
        values[name] = value
    first, *others = values
    for name in others:
        if values[name] != values[first]:
            raise InputError(f"{name} {what} than {first}; their figures cannot be compared: {advice}")
