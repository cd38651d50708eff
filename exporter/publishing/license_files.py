"""The files beside a model that say under which terms it may be used; they travel with what is made from it."""

from __future__ import annotations

import re
from pathlib import Path

from compressors.model.sources.source import Source

__all__ = ["license_files"]

_NAME = re.compile(r"(licen[cs]e|copying|notice|use_policy|acceptable_use_policy)([-._].*)?", re.IGNORECASE)
_LARGEST = 1 << 20  # bytes: what is larger is no text for people


def license_files(source: Source) -> list[Path]:
    """The licences and notices in the original's folder, in the order of their names.

    A GGUF file has none: what lies beside it may belong to something else.
    """
    folder = source.tokenizer_folder
    if not folder.is_dir() or any(path.suffix == ".gguf" for path in source.files):
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and _is_small_file(path))


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _LARGEST
