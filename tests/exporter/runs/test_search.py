"""A run that searches for two budgets: what it finds and shares, and that its recipes make the same files again."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]

_BUDGETS = {"3.4MB": 3_400_000, "1.3MB": 1_300_000}


@dataclass(frozen=True)
class Searched:
    """A finished run."""

    out: Path
    said: str
    reports: dict[str, dict[str, Any]]
    inputs: list[str]


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory, toy_model: Path, small_texts: tuple[Path, Path], run_command: Run
) -> Searched:
    out = tmp_path_factory.mktemp("search") / "out"
    calibration, heldout = small_texts
    inputs = [str(toy_model), "--calibration", str(calibration), "--text", str(heldout)]
    choices = ["--budget", ",".join(_BUDGETS), "--budget-kind", "file", "--formats", "gguf", "--context", "512"]
    limits = ["--threads", "1", "--recover-time", "3s", "--plan-time", "30s"]
    result = run_command([sys.executable, "-m", "exporter", *inputs, *choices, *limits, "--out", str(out)])
    assert result.returncode in (0, 4), result.stderr
    reports = {name: json.loads((out / name / "report.json").read_text(encoding="utf-8")) for name in _BUDGETS}
    return Searched(out, result.stderr, reports, inputs)


def test_each_budget_has_an_output_of_its_own_that_fits(searched: Searched) -> None:
    for name, n_bytes in _BUDGETS.items():
        (artifact,) = searched.reports[name]["artifacts"]
        assert 0.97 * n_bytes < artifact["bytes"] <= n_bytes
        assert artifact["bytes"] == searched.reports[name]["budget"]["predicted"]["gguf"]["file"]
    table = (searched.out / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in _BUDGETS)


def test_calibration_and_sensitivities_are_made_once(searched: Searched) -> None:
    for what in ("run the teacher over the calibration text", "measure what each tensor's errors do to the output"):
        lines = [line for line in searched.said.splitlines() if what in line]
        assert [line.endswith("done already") for line in lines] == [False] + [True] * (len(lines) - 1)


def test_bits_go_first_and_then_width_or_experts(searched: Searched) -> None:
    large, small = (searched.reports[name]["recipe"]["compress"] for name in _BUDGETS)
    assert (large["experts"], large["width"]) == (32, None)
    assert small["experts"] < 32 or small["width"] is not None
    types = searched.reports["3.4MB"]["recipe"]["gguf"]["tensors"]
    assert len(set(types.values())) > 2, "tensors have types of their own"


def test_the_lowest_measured_divergence_is_chosen_and_no_mix_beats_it(searched: Searched) -> None:
    for report in searched.reports.values():
        measured = {row["measured"]: row for row in report["search"] if row["measured"] is not None}
        assert measured[min(measured)]["is_chosen"]
    baselines = [row for row in searched.reports["3.4MB"]["search"] if row["is_baseline"]]
    assert baselines, "mixes that fit were measured"
    assert not any(row["is_chosen"] for row in baselines)


def test_a_recipe_that_was_found_makes_the_same_file_again(
    searched: Searched, run_command: Run, tmp_path: Path
) -> None:
    recipe = searched.out / "3.4MB" / "recipe.yaml"
    command = [
        sys.executable,
        "-m",
        "exporter",
        *searched.inputs,
        "--recipe",
        str(recipe),
        "--out",
        str(tmp_path / "x"),
    ]
    result = run_command(command)
    assert result.returncode in (0, 4), result.stderr
    first, again = (next(folder.glob("*.gguf")) for folder in (searched.out / "3.4MB", tmp_path / "x"))
    assert first.name == again.name
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()
    assert yaml.safe_load(recipe.read_text()) == yaml.safe_load((tmp_path / "x" / "recipe.yaml").read_text())
