"""The work directory: one folder per finished stage, so that a killed run goes on where it stopped.

A stage writes into ``STAGE.partial``; when it is done, that folder is flushed to disk and renamed to ``STAGE`` in one
step, so a stage is finished or absent. ``stage.json`` in it holds a fingerprint of everything that the outputs depend
on; a stage whose fingerprint changed is done again, and so is everything after it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressors.model.errors import InputError
from exporter.files import flush, flush_folder, write_atomically

__all__ = ["StageRecord", "WorkDirectory", "write_atomically"]

_JOB = "job.json"
_PLAN = "plan.json"
_RECORD = "stage.json"
_LOCK = "lock"


@dataclass(frozen=True)
class StageRecord:
    """What is kept about a finished stage."""

    fingerprint: str
    seconds: float
    peak_rss_bytes: int
    crash: str | None = None  # how the runtime died, for stages where a crash is a finding


class WorkDirectory:
    """A folder that belongs to one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def plan_path(self) -> Path:
        """Where the plan is kept."""
        return self.folder / _PLAN

    def stage(self, name: str) -> Path:
        """The folder of a finished stage."""
        return self.folder / name

    def lock(self) -> FileLock:
        """Keeps a second run out; creates the folder.

        Raises:
            InputError: another run works here right now, or the folder holds something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _JOB).exists() and {path.name for path in self.folder.iterdir()} - {_LOCK}:
            raise InputError(f"{self.folder} holds files that are not a run's; choose another --out or --work-dir")
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another run works in {self.folder} right now; wait for it, or choose another --out"
            ) from None
        return lock

    def claim(self, job: Mapping[str, Any]) -> None:
        """Makes the folder this job's, or checks that it is.

        Raises:
            InputError: the folder belongs to another job.
        """
        path = self.folder / _JOB
        if not path.exists():
            write_atomically(path, json.dumps(job, indent=1, sort_keys=True))
            return
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            owner = None
        if not isinstance(owner, dict):
            raise InputError(f"{path} is damaged; remove {self.folder} and start again")
        different = sorted(key for key in {*owner, *job} if owner.get(key) != job.get(key))
        if different:
            raise InputError(
                f"{self.folder} belongs to another run (its {', '.join(different)} differ): "
                "choose another --out, or remove that folder"
            )

    def remove(self) -> None:
        """Removes the folder, if it is there and a run's."""
        if (self.folder / _JOB).exists():
            shutil.rmtree(self.folder)

    def record(self, name: str) -> StageRecord | None:
        """The record of a finished stage, None if it is not finished or its record cannot be read."""
        try:
            return StageRecord(**json.loads((self.stage(name) / _RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, name: str) -> Path:
        """An empty folder for a stage to write into; what an earlier attempt left is removed."""
        for leftover in (self._partial(name), self.stage(name)):
            if leftover.exists():
                shutil.rmtree(leftover)
        self._partial(name).mkdir()
        return self._partial(name)

    def finish(self, name: str, record: StageRecord) -> None:
        """Makes the partial folder the finished one."""
        (self._partial(name) / _RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        flush_folder(self._partial(name))
        self._partial(name).rename(self.stage(name))
        flush(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"
