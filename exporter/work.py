"""The work directory: one folder per finished stage, so that a killed run goes on where it stopped.

A stage writes into ``STAGE.partial``; when it is done, that folder is flushed to disk and renamed to ``STAGE`` in one
step, so a stage is finished or absent. ``stage.json`` in it holds a fingerprint of everything that the outputs depend
on; a stage whose fingerprint changed is done again, and so is everything after it. ``STAGE.partial`` of a killed run
carries the same fingerprint in ``stage.fingerprint``: an attempt with an equal one finds there what the last one left.
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
_FINGERPRINT = "stage.fingerprint"
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
        """The record of a finished stage; None if it is not finished, or its files are not those that it left."""
        folder = self.stage(name)
        try:
            kept = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
            return StageRecord(**kept["record"]) if kept["files"] == _sizes(folder) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def begin(self, name: str, fingerprint: str, *, resumes: bool = True) -> Path:
        """The folder for a stage to write into: empty, or as a killed attempt with the same fingerprint left it.

        That attempt had the same inputs, so a stage that ``resumes`` goes on with what is there.
        """
        _remove_folder(self.stage(name))
        partial = self._partial(name)
        if not resumes or _text(partial / _FINGERPRINT) != fingerprint:
            _remove_folder(partial)
            partial.mkdir()
            write_atomically(partial / _FINGERPRINT, fingerprint)
            flush(partial)
        return partial

    def finish(self, name: str, record: StageRecord) -> None:
        """Makes the partial folder the finished one."""
        partial = self._partial(name)
        write_atomically(
            partial / _RECORD,
            json.dumps({"record": asdict(record), "files": _sizes(partial)}, indent=1, sort_keys=True),
        )
        flush_folder(partial)
        partial.rename(self.stage(name))
        flush(self.folder)
        (self.stage(name) / _FINGERPRINT).unlink()

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"


def _remove_folder(folder: Path) -> None:
    """Removes a stage's folder, first what vouches for it: half removed, it must not pass for whole."""
    if not folder.is_dir():
        folder.unlink(missing_ok=True)
        return
    for name in (_RECORD, _FINGERPRINT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a stage's folder that is the stage's own, by path."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (_RECORD, _FINGERPRINT)
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
