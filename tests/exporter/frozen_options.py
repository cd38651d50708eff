"""Lists every option of every command with its default: ``python -m tests.exporter.frozen_options > FILE``.

The listing is ``tests/exporter/frozen_options.txt``, so a new or changed option shows in a review.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from exporter.cli import main

__all__ = ["listing"]


def listing() -> str:
    """A line for each argument and option, command by command."""
    return "\n".join(line for name in sorted(main.commands) for line in _lines(name)) + "\n"


def _lines(command: str) -> Iterator[str]:
    for parameter in sorted(main.commands[command].params, key=lambda parameter: str(parameter.name)):
        if isinstance(parameter, click.Option):
            value = "" if parameter.is_flag else f" {parameter.metavar or parameter.type.name.upper()}"
            several = ", several times" if parameter.multiple else ""
            needed = ", required" if parameter.required else ""
            default = "" if parameter.is_flag or parameter.required else f" = {_default(parameter)!r}"
            yield f"{command} {parameter.opts[0]}{value}{default}{several}{needed}"
        else:
            yield f"{command} {parameter.make_metavar(click.Context(main.commands[command]))}"


def _default(option: click.Option) -> object:
    """The default; newer versions of click have an object of their own where there is none."""
    return option.default if isinstance(option.default, str | int | tuple) else None


if __name__ == "__main__":
    sys.stdout.write(listing())
