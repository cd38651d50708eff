"""The work folder: one folder per finished stage, so that a killed run can continue.

A stage writes into ``STAGE.partial``; when it is done, that folder is flushed to disk and renamed to ``STAGE`` in one
step, so a stage is finished or absent. ``stage.json`` in it holds a fingerprint of everything that the outputs depend
on; a stage whose fingerprint changed is done again, and so is everything after it. ``STAGE.partial`` of a killed run
carries the same fingerprint in ``stage.fingerprint``: an attempt with an equal one continues with these files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from exporter.file_names import (
    JOB,
    PARTIAL_SUFFIX,
    PLAN,
    RUN_LOCK,
    SOURCE_STATE,
    STAGE_FINGERPRINT,
    STAGE_LOCK,
    STAGE_RECORD,
    StageFile,
)
from exporter.planning.plan import Plan
from exporter.work.input_state import SourceState
from exporter.work.record import StageRecord, note_removed, read_record, removed_since, write_record
from exporter.writing.files import flush, flush_folder, write_atomically

__all__ = ["Reads", "StageRecord", "UndeclaredFileError", "WorkDirectory", "exclusive", "make_folder"]

Reads = frozenset[tuple[str, StageFile]]
"""Files that a stage reads, each with the name of the stage that writes it."""

_STAGE_ENDS_WITHIN = 20  # seconds; a stage checks for its parent far more often, unless the system is thrashing


class UndeclaredFileError(LookupError):
    """A stage opens a file that it does not declare, which is a fault of this program."""


class WorkDirectory:
    """A folder that belongs to one job, or to a part of it: one of several budgets, or a result of its search.

    Args:
        folder: the folder.
        whole: the work that contains this part.
        shared: the stages that all parts of the whole share; they lie in its folder.
        reads: the files that may be opened; None: all.
    """

    def __init__(
        self,
        folder: Path,
        whole: WorkDirectory | None = None,
        shared: frozenset[str] = frozenset(),
        reads: Reads | None = None,
    ) -> None:
        self.folder = folder
        self._whole = whole
        self._shared = shared
        self._reads = reads

    def opening(self, reads: Reads) -> WorkDirectory:
        """The same work for a stage that may open these files of other stages."""
        return WorkDirectory(self.folder, self._whole, self._shared, reads)

    def part(self, name: str, shared: frozenset[str]) -> WorkDirectory:
        """A part of this work; its folder is created with the first stage that writes there."""
        return self.within(self.folder / name, shared)

    def within(self, folder: Path, shared: frozenset[str]) -> WorkDirectory:
        """A part of this work that lies in a folder of its own."""
        return WorkDirectory(folder, self, shared)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for another process."""
        whole = None if self._whole is None else self._whole.to_json()
        return {"folder": str(self.folder.resolve()), "whole": whole, "shared": sorted(self._shared)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WorkDirectory:
        """The inverse of :meth:`to_json`."""
        whole = None if data["whole"] is None else cls.from_json(data["whole"])
        return cls(Path(data["folder"]), whole, frozenset(data["shared"]))

    @property
    def root(self) -> WorkDirectory:
        """The whole work that contains this part, or itself."""
        return self if self._whole is None else self._whole.root

    @property
    def plan_path(self) -> Path:
        """The file in which the plan is kept."""
        return self.folder / PLAN

    @property
    def source_path(self) -> Path:
        """The file in which the state of the checkpoint that the run began with is kept."""
        return self.root.folder / SOURCE_STATE

    def plan(self) -> Plan:
        """The plan that is kept here.

        Raises:
            InputError: the file is damaged.
        """
        try:
            return Plan.load(self.plan_path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{self.plan_path} is damaged; remove {self.folder} and start again") from None

    def source(self) -> SourceState:
        """The state of the checkpoint that the run began with.

        Raises:
            InputError: the file is damaged.
        """
        state = SourceState.load(self.source_path)
        if state is None:
            raise InputError(f"{self.source_path} is damaged; run the same command again")
        return state

    def path(self, stage: str, file: StageFile, **values: Any) -> Path:
        """A file of a finished stage; ``values`` fill the braces in its name.

        Raises:
            UndeclaredFileError: the file may not be opened.
        """
        self._check(stage, file)
        return file.within(self.place(stage) / stage, **values)

    def paths(self, stage: str, file: StageFile) -> list[Path]:
        """The files of a finished stage, whatever stands for the braces in their name, in the order of names.

        Raises:
            UndeclaredFileError: the files may not be opened.
        """
        self._check(stage, file)
        return file.all_within(self.place(stage) / stage)

    def stage(self, name: str) -> Path:
        """The folder of a finished stage.

        Raises:
            UndeclaredFileError: none of its files may be opened.
        """
        self._check(name)
        return self.place(name) / name

    def _check(self, stage: str, file: StageFile | None = None) -> None:
        """Refuses a file that may not be opened here, or in the whole where the stage lies; None stands for any."""
        allowed = [found for writer, found in self._reads or () if writer == stage]
        if self._reads is not None and (file not in allowed if file is not None else not allowed):
            raise UndeclaredFileError(f"{'a file' if file is None else file.name} of stage {stage} is not declared")
        if self._whole is not None and stage in self._shared:
            self._whole._check(stage, file)

    def partial(self, name: str) -> Path:
        """The folder of a stage that is not finished."""
        return self.place(name) / f"{name}{PARTIAL_SUFFIX}"

    def place(self, stage: str) -> Path:
        """The folder that a stage's folder lies in."""
        if self._whole is not None and stage in self._shared:
            return self._whole.place(stage)
        return self.folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second run out; creates the folder.

        Raises:
            InputError: another run works here right now, or the folder holds something else.
        """
        make_folder(self.folder)
        if not (self.folder / JOB).exists() and {path.name for path in self.folder.iterdir()} - {RUN_LOCK}:
            raise InputError(f"{self.folder} holds files that are not a run's; choose another --out or --work-dir")
        busy = f"another run works in {self.folder} right now; wait for it, or choose another --out"
        with exclusive(self.folder / RUN_LOCK, busy):
            yield

    @contextmanager
    def stage_lock(self) -> Iterator[None]:
        """Holds the lock of the process that writes into partial folders; it may outlive a killed run for a moment.

        Raises:
            InputError: that process does not end.
        """
        busy = f"a stage of an earlier run still works in {self.folder}; wait for its process to end, or end it"
        with exclusive(self.root.folder / STAGE_LOCK, busy, timeout=_STAGE_ENDS_WITHIN):
            yield

    @property
    def has_owner(self) -> bool:
        """True if a job has begun here."""
        return (self.folder / JOB).exists()

    def claim(self, job: Mapping[str, Any]) -> None:
        """Claims the folder for this job, or checks that it has.

        Raises:
            InputError: the folder belongs to another job.
        """
        path = self.folder / JOB
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
        """Removes the folder; call it with the lock held. The files that name its owner go last."""
        last = (JOB, RUN_LOCK)
        for path in self.folder.iterdir():
            if path.name not in last:
                _remove(path)
        for name in last:
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def remove_leftovers(self, job: Mapping[str, Any]) -> None:
        """Removes the folder that a killed run of this job left after it had published, unless a run works here."""
        try:
            owner = json.loads((self.folder / JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if owner == job:
            with suppress(InputError), self.lock():
                self.remove()

    def record(self, name: str) -> StageRecord | None:
        """The record of a finished stage; None if it is not finished, or its files are not those that it left.

        Files that were removed because nothing needed them (:meth:`remove_files`) are not missed.
        """
        return read_record(self.stage(name))

    def removed(self, name: str) -> frozenset[str]:
        """The names of the files of a finished stage that were removed; none if it is not finished."""
        return removed_since(self.stage(name))

    def remove_files(self, name: str, files: Collection[StageFile]) -> None:
        """Removes files of a finished stage that nothing needs any more. The stage stays finished.

        What is removed is noted first, so a kill in between leaves files that are not missed if they are gone.
        """
        folder = self.stage(name)
        there = [file for file in files if file.all_within(folder)]
        if not there:
            return
        note_removed(folder, there)
        for file in there:
            for path in file.all_within(folder):
                _remove(path)

    def hand_over(self, name: str, file: StageFile, receiver: str) -> None:
        """Moves a file of a finished stage into the unfinished folder of another, unless it has it already.

        The stage stays finished. A kill after the note leaves the file where it was, for the next attempt to move.
        """
        there, target = file.within(self.stage(name)), file.within(self.partial(receiver))
        if there.exists():
            note_removed(self.stage(name), [file])
            _remove(target)
            there.rename(target)

    def begin(self, name: str, fingerprint: str, *, resumes: bool = True) -> Path:
        """The folder for a stage to write into: empty, or as a killed attempt with the same fingerprint left it.

        That attempt had the same inputs, so a stage that ``resumes`` continues with its files.
        """
        _remove(self.stage(name))
        partial = self.partial(name)
        if not resumes or _text(partial / STAGE_FINGERPRINT) != fingerprint:
            _remove(partial)
            partial.mkdir(parents=True)
            write_atomically(partial / STAGE_FINGERPRINT, fingerprint)
            flush(partial)
        return partial

    def finish(self, name: str, record: StageRecord) -> None:
        """Makes the partial folder the finished one."""
        partial = self.partial(name)
        write_record(partial, record)
        flush_folder(partial)
        partial.rename(self.stage(name))
        flush(self.place(name))
        (self.stage(name) / STAGE_FINGERPRINT).unlink()


@contextmanager
def exclusive(path: Path, busy: str, *, timeout: float = 0) -> Iterator[None]:
    """Holds a lock file; the system releases it when the process ends, for any reason.

    Raises:
        InputError: another process holds it for longer than ``timeout`` seconds; the message is ``busy``.
    """
    from filelock import FileLock, Timeout  # plans, which lock nothing, would wait for it

    try:
        held = FileLock(path).acquire(timeout=timeout)
    except Timeout:
        raise InputError(busy) from None
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place") from None
    with held:
        yield


def make_folder(folder: Path) -> None:
    """Creates a folder and those above it.

    Raises:
        InputError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another --out or --work-dir") from None


def _remove(path: Path) -> None:
    """Removes a file or folder, a stage's record and fingerprint first: half removed, it must not pass for whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in (STAGE_RECORD, STAGE_FINGERPRINT):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
