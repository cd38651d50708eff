"""What a run is refused for before any work, so that hours are not lost at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path

from compressors.model.errors import InputError
from exporter.job import Job

__all__ = ["nearest_folder", "refuse_unwritable_places"]


def refuse_unwritable_places(job: Job) -> None:
    """Tries whether files can be made where the output and the work will lie; leaves nothing.

    Raises:
        InputError: they cannot.
    """
    for flag, place in (("--out", job.out.parent), ("--work-dir", job.work_dir)):
        folder = nearest_folder(place)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(
                f"{flag}: nothing can be written in {folder} ({error.strerror}); choose another place"
            ) from None


def nearest_folder(place: Path) -> Path:
    """``place``, or the folder above it that exists already."""
    while not place.exists():
        place = place.parent
    return place
