"""The command line as people meet it: no option comes, goes or changes by accident, and every help fits a screen."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from exporter.cli import main
from exporter.options import EXPORT_GROUPS, USUAL
from tests.exporter.frozen_options import listing

_FROZEN = Path(__file__).with_name("frozen_options.txt")
_SCREEN = 40  # lines; a terminal of a laptop has some fifty
_COMMANDS = sorted(main.commands)


def test_options_and_defaults_are_those_of_the_listing() -> None:
    assert listing() == _FROZEN.read_text(encoding="utf-8"), (
        "if that is meant: python -m tests.exporter.frozen_options > tests/exporter/frozen_options.txt"
    )


def _help(*arguments: str, width: int) -> list[str]:
    done = CliRunner(env={"COLUMNS": str(width)}).invoke(main, list(arguments), terminal_width=width)
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", _COMMANDS)
def test_every_help_fits_a_screen(command: str, width: int) -> None:
    lines = _help(command, "--help", width=width)
    assert len(lines) <= _SCREEN
    assert max(len(line) for line in lines) <= width


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_option_has_a_sentence(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            sentence = parameter.help.split("  [default")[0]
            assert sentence.endswith("."), f"{command} {parameter.opts[0]}: {sentence}"


def test_the_usual_options_are_shown_and_the_others_when_asked_for() -> None:
    usual = "\n".join(_help("--help", width=100))
    everything = "\n".join(_help("--help-all", width=100))
    options = {parameter.opts[0] for parameter in main.commands["export"].params if isinstance(parameter, click.Option)}
    assert {option for option in options if f"  {option} " in everything} == options
    shown = {option for option in options if f"  {option} " in usual}
    assert {f"--{name.replace('_', '-')}" for names in USUAL.values() for name in names} - {"--help"} == shown
    for heading in EXPORT_GROUPS:
        assert f"{heading}:" in everything
    for text in (usual, everything):
        assert "  --help-all " in text and "  --help " in text
