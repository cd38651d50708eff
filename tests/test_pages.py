"""Pages that are made from the code, or show what commands print, are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressors.shrink.registry import METHODS
from docs.licences_page import licences_page
from docs.methods_page import FORMULAS, methods_page
from docs.tutorial_check import WIDTH, difference, steps
from exporter.cli import main

_REPOSITORY = Path(__file__).parent.parent
_DOCS = _REPOSITORY / "docs"


def test_the_page_of_methods_is_what_is_generated() -> None:
    assert set(FORMULAS) == set(METHODS)
    assert (_DOCS / "methods.md").read_text(encoding="utf-8") == methods_page(), (
        "the code says something else: python -m docs.methods_page > docs/methods.md"
    )


def test_the_page_of_licences_is_what_is_generated() -> None:
    """In the tested versions; another release of a package may name its licence otherwise."""
    page = (_DOCS / "licences.md").read_text(encoding="utf-8")
    assert page == licences_page(), "python -m docs.licences_page > docs/licences.md"
    assert "not named in its metadata" not in page
    for name in ("torch", "transformers", "llama-cpp-python", "onnxruntime", "huggingface-hub", "safetensors"):
        assert f"\n| {name} | " in page


def _printed(arguments: Sequence[str]) -> str:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False).stdout


def test_the_tutorial_s_commands_print_what_it_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to the plan; ``make tutorial`` runs the rest too."""
    monkeypatch.setenv("COLUMNS", WIDTH)
    monkeypatch.chdir(tmp_path)
    quick = [step for step in steps() if step.arguments[0] != "validate" and step.arguments[-1] != "small"]
    assert len(quick) == 3 < len(list(steps()))
    for step in quick:
        assert difference(step, _printed) is None


def test_the_site_builds_without_broken_links(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed: make docs builds the site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "benchmarks" / "results" / "pareto" / "index.html").is_file()


def test_every_message_of_the_page_on_refusals_is_one_of_ours() -> None:
    code = "".join(
        file.read_text(encoding="utf-8")
        for package in ("exporter", "validate", "compressors")
        for file in sorted((_REPOSITORY / package).rglob("*.py"))
    )
    joined = re.sub(r'"\s*\n\s*f?"', "", code)  # messages are written in several pieces
    named = re.findall(r"^\*\*`(.+?)`\*\*", (_DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 15
    assert [words for words in named if words not in joined] == []
