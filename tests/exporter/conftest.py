"""A job small enough to run whole: two layers of the bundled model, a little text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from exporter.cli import main
from tests.exporter import stage_runs

Command = Callable[..., Sequence[str]]
Completed = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, toy_checkpoint: Callable[..., Path]) -> Path:
    """Two layers of the bundled model: 32 experts each, trained weights; and a licence."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("model"), n_layers=2)
    (folder / "LICENSE").write_text("anything goes", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_texts(
    tmp_path_factory: pytest.TempPathFactory, calibration_folder: Path, heldout_folder: Path
) -> tuple[Path, Path]:
    """(calibration, held-out): the beginnings of two of the bundled files, cut at a blank line."""
    folder = tmp_path_factory.mktemp("text")
    for name, source, n_characters in (
        ("calibration", calibration_folder, 45_000),
        ("heldout", heldout_folder, 15_000),
    ):
        (folder / name).mkdir()
        for domain in ("encyclopedic", "religion"):
            text = (source / f"{domain}.txt").read_text(encoding="utf-8")[:n_characters]
            (folder / name / f"{domain}.txt").write_text(text[: text.rindex("\n\n")], encoding="utf-8")
    return folder / "calibration", folder / "heldout"


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory, small_texts: tuple[Path, Path]) -> Path:
    """A file with a few blocks of held-out text, for tests of what is done with the figures."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    text = (small_texts[1] / "encyclopedic.txt").read_text(encoding="utf-8")
    path.write_text(text[:5000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def toy_command(toy_model: Path, small_texts: tuple[Path, Path]) -> Command:
    """The command line of the toy job: ``toy_command(out, *more arguments)``."""

    def command(out: Path, *arguments: str, budget: str = "3MB") -> Sequence[str]:
        calibration, heldout = small_texts
        choices = ("--budget", budget, "--budget-kind", "file", "--quant", "Q4_0", "--context", "512", "--threads", "1")
        return [
            *(sys.executable, "-m", "exporter", str(toy_model)),
            *("--calibration", str(calibration), "--text", str(heldout), "--out", str(out)),
            *(arguments if "--recipe" in arguments else (*choices, *arguments)),
        ]

    return command


@pytest.fixture(scope="session")
def tiny_recipe(
    tmp_path_factory: pytest.TempPathFactory, toy_command: Command, run_command: Callable[[Sequence[str]], Completed]
) -> Path:
    """The toy job's recipe with as little text and as few experts as possible: every stage runs, none takes long."""
    folder = tmp_path_factory.mktemp("recipe")
    planned = run_command(toy_command(folder / "out", "--dry-run", "--json"))
    assert planned.returncode == 0, planned.stderr
    recipe = json.loads(planned.stdout)
    recipe["compress"]["experts"] = 5
    recipe["text"] |= {"calibration_blocks": 2, "selection_blocks": 1, "heldout_chunks_per_file": 1}
    for rung in recipe["recover"]["rungs"]:
        rung |= {"blocks": 2, "blocks_per_step": 1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "tiny.yaml"


@pytest.fixture
def torch_left_as_it_was() -> Iterator[None]:
    """For tests that run stages in this process."""
    with stage_runs.torch_left_as_it_was():
        yield


@pytest.fixture(scope="session")
def run_command() -> Callable[[Sequence[str]], Completed]:
    """Runs a command line of the exporter in this process, and captures what it prints.

    Its stages have processes of their own, forked from one server for all tests: to start another program and another
    server takes longer than a toy's stages.
    """

    def run(command: Sequence[str]) -> Completed:
        program, arguments = command[:3], command[3:]
        assert list(program) == [sys.executable, "-m", "exporter"]
        with mock.patch.object(sys, "argv", ["moe-export", *arguments]):
            result = CliRunner().invoke(main, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def start_command() -> Callable[[Sequence[str]], Completed]:
    """Runs a command line as a person would, and captures what it prints."""

    def run(command: Sequence[str]) -> Completed:
        environment = os.environ | {"PYTHONWARNINGS": "ignore"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


@pytest.fixture(scope="session")
def schema_errors() -> Callable[[Any], list[str]]:
    """Says what in a report is not as the schema that is shipped describes it."""
    schema = json.loads(resources.files("validate.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    return lambda report: [f"{error.json_path}: {error.message}" for error in validator.iter_errors(report)]
