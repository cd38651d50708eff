"""JSON for people: indented, but a list of plain numbers stays on one line."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["json_text"]

# JSON writes a line end inside a string as two characters, so a real line end is layout
_LIST_OF_NUMBERS = re.compile(r'\[\n([^][{}"]*)\n *\]')


def json_text(data: Any) -> str:
    """Writes the data as JSON; figures by layer and expert would otherwise fill most of a report's lines."""
    return _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(data, indent=1))
