"""Runs the commands of docs/tutorial.md and compares what they print with the page.

python -m docs.tutorial_check    # all commands: some minutes

In the page a line of three dots stands for any lines, and dots inside of a line for any text.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Step", "difference", "steps"]

_PAGE = Path(__file__).parent / "tutorial.md"
_REPOSITORY = Path(__file__).parent.parent
_BLOCK = re.compile(r"^```\n\$ (?P<command>(?:.+\\\n)*.+)\n(?P<printed>(?:.*\n)*?)```$", re.MULTILINE)
WIDTH = "100"
"""Columns of the terminal that the page shows."""


@dataclass(frozen=True)
class Step:
    """A command of the page."""

    command: str
    printed: str

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``moe-export``; paths of the repository are whole, so that any folder will do."""
        program, *words = shlex.split(self.command)
        assert program == "moe-export", self.command
        return [str(_REPOSITORY / word) if word.startswith("exporter/") else word for word in words]


def steps() -> Iterator[Step]:
    """Yields the commands of the page in order."""
    for block in _BLOCK.finditer(_PAGE.read_text(encoding="utf-8")):
        yield Step(block["command"].replace("\\\n", ""), block["printed"])


def difference(step: Step, run: Callable[[Sequence[str]], str]) -> str | None:
    """Runs a command, and says what it printed if that is not what the page shows."""
    printed = run(step.arguments).replace(f"{_REPOSITORY}/", "")
    lines = "".join(f"{line.rstrip()}\n" for line in printed.splitlines() if line.strip())
    wanted = "".join(f"{line.rstrip()}\n" for line in step.printed.splitlines() if line.strip())
    if doctest.OutputChecker().check_output(wanted, lines, doctest.ELLIPSIS):
        return None
    return f"{step.command} printed\n{lines}\nand the page has\n{wanted}"


def _printed(arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "exporter", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout


def main() -> int:
    """Runs all commands in an empty folder; the exit code is 1 if one prints something else."""
    os.environ |= {"COLUMNS": WIDTH, "PYTHONPATH": str(_REPOSITORY)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = [difference(step, _printed) for step in steps()]
    for wrong in filter(None, found):
        sys.stdout.write(f"{wrong}\n")
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
