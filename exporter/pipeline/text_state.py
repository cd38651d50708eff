"""Checks that the texts are still those that a run began with: the SHA-256 of all three splits."""

from __future__ import annotations

from pathlib import Path

from compressors.calibration.splits import Splits, read_splits
from compressors.model.errors import InputError
from exporter.planning.recipe import TextChoice

__all__ = ["refuse_changed_texts"]


def refuse_changed_texts(
    chosen: TextChoice, calibration: Path, heldout: Path | None, what_to_do: str, splits: Splits | None = None
) -> None:
    """Compares the texts with those that the recipe names.

    Args:
        chosen: the recipe's part that names the texts.
        calibration: file or folder that the calibration and selection splits are from, and without ``heldout`` the
            held-out split too.
        heldout: file or folder of the held-out split.
        what_to_do: the end of the message.
        splits: the texts, if they have been read already.

    Raises:
        InputError: a text has changed, and the message names it and its place; or a text cannot be read.
    """
    splits = splits or read_splits(calibration, heldout)
    for name, split in vars(splits).items():
        if split.sha256 != getattr(chosen, f"{name}_sha256"):
            place = heldout if name == "heldout" and heldout is not None else calibration
            raise InputError(
                f"{place} has changed since this run was planned: its {split.name} text is another; {what_to_do}"
            )
