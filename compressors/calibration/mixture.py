"""The files that calibration text comes from, each with its weight in the mixture."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compressors.calibration.chats import is_chats
from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["WeightedText", "parse_mixture", "unequal_names"]

_WITH_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class WeightedText:
    """A file, or a folder of ``*.txt``, and its share of the blocks in proportion to the others' weights."""

    path: Path
    weight: float = 1.0

    @property
    def is_chats(self) -> bool:
        """True if it holds chats, which the model's template writes out."""
        return is_chats(self.path)

    def __str__(self) -> str:
        """As ``--calibration`` takes it."""
        return f"{self.path}:{self.weight:.17g}"


def parse_mixture(given: str | Path | Iterable[str | Path]) -> tuple[WeightedText, ...]:
    """The texts of one or several ``PATH`` or ``PATH:WEIGHT``.

    A number behind the last colon is always a weight, so a file whose own name ends in one is given with a weight
    behind it (``notes:2:1``). The weight of a text that stands alone says nothing, and is 1.

    Raises:
        InputError: a weight is not above 0, or a path is given twice.
    """
    texts = [_parsed(str(one)) for one in ([given] if isinstance(given, str | Path) else given)]
    places = [os.path.realpath(text.path) for text in texts]  # Path.resolve raises where a link leads to itself
    for text, place in zip(texts, places, strict=True):
        if places.count(place) > 1:
            raise InputError(f"--calibration: {text.path} is given twice; give it once, with the sum of the weights")
    return tuple(texts) if len(texts) > 1 else tuple(replace(text, weight=1.0) for text in texts)


def _parsed(given: str) -> WeightedText:
    found = _WITH_WEIGHT.fullmatch(given)
    if found is None:
        return WeightedText(Path(given))
    weight = float(found["weight"])
    if not 0 < weight < math.inf:
        raise InputError(f"--calibration: the weight of {shown(given)} must be a number above 0; leave it out for 1")
    return WeightedText(Path(found["path"]), weight)


def unequal_names(files: Sequence[Path]) -> list[str]:
    """Short names of files, by which reports tell them apart.

    They are the names without suffix, if all differ; else with suffix, else with as many folders as it takes.
    """
    depth, longest = 1, max((len(file.parts) for file in files), default=1)
    names = [file.stem for file in files]
    while len({*names}) < len(files) and depth <= longest:
        names = ["/".join(file.parts[-depth:]) for file in files]
        depth += 1
    return names
