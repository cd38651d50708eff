"""Where a file cannot compute, or read text, as the original does, and its container knows nothing better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressors.model.checkpoint import Checkpoint

__all__ = ["Deviation", "find_deviations"]


@dataclass(frozen=True)
class Deviation:
    """One such difference: it is written all the same, and named in plan and report."""

    artifact: str  # gguf or onnx
    what: str  # a sentence without a full stop


def find_deviations(checkpoint: Checkpoint, artifacts: Iterable[str]) -> tuple[Deviation, ...]:
    """Returns what is known beforehand of the files to be written; no weight is read.

    Raises:
        InputError: the checkpoint's tokenizer is missing or damaged.
        UnsupportedError: a difference is so large that the file must not be written.
    """
    return ()
