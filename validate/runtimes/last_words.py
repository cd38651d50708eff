"""Finds the line of a dead process's output that explains its death."""

from __future__ import annotations

import os
import re
from typing import IO

__all__ = ["last_words", "telling_line"]

_READ_BYTES = 16 << 10
_LONGEST = 300  # characters
_TELLING = re.compile(r"GGML_ASSERT|GGML_ABORT|fatal error|what\(\):|memory allocation of")
_FOLDERS = re.compile(r"^(/[^\s:]+/)([^/\s:]+:\d+:)")


def last_words(output: IO[bytes], *, aborted: bool) -> str:
    """Finds the line at the end of a file of output that explains a death; empty if there is none.

    Args:
        output: the output of the process.
        aborted: True if the process called abort(); a library prints its reason before, so the last line counts.
    """
    output.seek(max(0, output.seek(0, os.SEEK_END) - _READ_BYTES))
    line = telling_line(output.read().decode("utf-8", errors="replace"))
    return line if aborted or _TELLING.search(line) else ""


def telling_line(text: str) -> str:
    """Returns an assertion of ggml, a C++ exception's text, or else the last line, without the folder of its source."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if _TELLING.search(line)] or lines[-1:]
    return _FOLDERS.sub(r"\2", told[0])[:_LONGEST] if told else ""
