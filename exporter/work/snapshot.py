"""Saves the progress of a long stage now and then, so that a killed run continues from there.

A snapshot is a folder that is complete or absent: it is written beside its place, hashed, flushed and renamed. One that
does not match its hashes counts as absent.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from compressors.model.parallel import is_first, reduce_max, wait_for_all
from exporter.writing.files import flush, flush_folder, sha256_of

__all__ = ["Snapshot"]

_CONTENTS = "contents.json"
_SHORT_WRITING = 1.5  # seconds that a snapshot may take; one that takes longer is made less often


class Snapshot:
    """The newest snapshot of a stage, in ``folder``.

    There is at most one every ``seconds``, and fewer where writing takes long, so that little time goes into it.
    """

    def __init__(self, folder: Path, seconds: float = 30.0) -> None:
        self._folder = folder
        self._seconds = self._pause = seconds
        self._last = time.monotonic()

    def keep(self, position: int, write: Callable[[Path], None]) -> None:
        """Replaces the snapshot if it is time.

        Args:
            position: the progress, such as layers or steps done.
            write: writes files into the folder that it is given; every process of a group writes its own.
        """
        due = torch.tensor(time.monotonic() - self._last >= self._pause, dtype=torch.int32)
        reduce_max([due])  # all processes or none
        if not due:
            return
        start = time.monotonic()
        new = self._folder.with_name(f"{self._folder.name}.new")
        if is_first():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        wait_for_all()
        write(new)
        wait_for_all()
        if is_first():
            self._publish(new, position)
        wait_for_all()
        self._last = time.monotonic()
        self._pause = self._seconds * max(1.0, (self._last - start) / _SHORT_WRITING)

    def load(self) -> tuple[int, Path] | None:
        """(position, folder) of the newest whole snapshot, None if there is none."""
        try:
            contents = json.loads((self._folder / _CONTENTS).read_text(encoding="utf-8"))
            position, hashes = int(contents["position"]), dict(contents["sha256"])
            whole = all(sha256_of(self._folder / name) == digest for name, digest in hashes.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (position, self._folder) if whole else None

    def remove(self) -> None:
        """Removes the snapshot of a finished stage."""
        if is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _publish(self, new: Path, position: int) -> None:
        hashes = {path.name: sha256_of(path) for path in sorted(new.iterdir())}
        (new / _CONTENTS).write_text(json.dumps({"position": position, "sha256": hashes}), encoding="utf-8")
        flush_folder(new)
        shutil.rmtree(self._folder, ignore_errors=True)
        new.rename(self._folder)
        flush(self._folder.parent)
