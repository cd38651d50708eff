"""The one reader of JSON files that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError

__all__ = ["read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        InputError: the file is missing, is no UTF-8, no JSON, or holds something else than an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download the file again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no JSON object: download the file again")
    return data
