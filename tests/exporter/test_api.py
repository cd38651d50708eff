"""The functions for Python: what they return is what the commands print."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from compressors.model.errors import InputError
from exporter import Flags, export, fits, inspect, validate
from exporter.cli import main
from exporter.planning.flags import command_of


def _printed(*arguments: str) -> object:
    return json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)


def test_inspect_returns_what_the_command_prints(toy_model: Path) -> None:
    assert inspect(toy_model) == _printed("inspect", str(toy_model))


def test_fits_returns_what_the_command_prints(toy_model: Path) -> None:
    rows = fits(toy_model, machines=["8gb-gpu"], budgets=["75MB"], context=512)
    command = ("fits", str(toy_model), "--for", "8gb-gpu", "--budget", "75MB", "--context", "512")
    assert rows == _printed(*command)


def test_wrong_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--budget: 'much' is not a size"):
        export(Flags(budget="much"))
    with pytest.raises(InputError, match=r"nowhere\.gguf"):
        validate(tmp_path / "nowhere.gguf")


def test_the_command_in_the_report_has_the_same_flags() -> None:
    flags = Flags(model="a b", budget="20GB", dry_run=True, seed=7, require=("kld=0.1", "top1=0.9"), out=Path("x"))
    words = shlex.split(command_of(flags))
    assert words[0] == "moe-export"
    command = main.commands["export"]
    context = command.make_context("export", words[1:])
    of_job = {definition.name for definition in fields(Flags)}  # the others say how a run is shown
    assert Flags(**{name: value for name, value in context.params.items() if name in of_job}) == flags
    assert isinstance(command, click.Command)


def test_importing_the_functions_imports_nothing_large() -> None:
    script = (
        "import sys; from exporter import export; print({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
