"""A peer's own virtual environment, kept between runs."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["REPOSITORY", "environment"]

REPOSITORY = Path(__file__).parents[2]


def environment(name: str, packages: Sequence[str]) -> Path:
    """The Python of the environment ``.venv-NAME`` with these packages; they are installed if they are not yet."""
    folder = REPOSITORY / f".venv-{name}"
    python, installed = folder / "bin/python", folder / "installed"
    wanted = "\n".join(packages)
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        installed.write_text(wanted, encoding="utf-8")
    return python
