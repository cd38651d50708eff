"""The files of one GGUF model that ``llama-gguf-split`` cut into parts.

Their names end in ``-00001-of-00003.gguf``, and llama.cpp finds the others from the first (``llama_split_path`` in
``src/llama.cpp``). The first part has the metadata; every part has its number (``split.no``, from 0) and their count.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

__all__ = ["COUNT_KEY", "NUMBER_KEY", "TENSORS_KEY", "one_split_model", "split_parts"]

NUMBER_KEY, COUNT_KEY, TENSORS_KEY = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def split_parts(path: Path) -> list[Path]:
    """Returns all parts, present or not, of the model that a file belongs to by its name; else the file alone."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['prefix']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def one_split_model(files: Collection[Path]) -> list[Path] | None:
    """Returns all parts, present or not, of the one split model that these files belong to; None if there is none."""
    parts = {tuple(split_parts(file)) for file in files}
    (first, *others) = parts or {()}
    return None if others or len(first) < 2 else list(first)
