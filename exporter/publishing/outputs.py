"""The output folder: assembled in the work directory, published in one step, complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from compressors.model.errors import InputError
from exporter.file_names import (
    ASSEMBLED,
    LOCK_SUFFIX,
    ONNX_FOLDER,
    ONNX_WEIGHTS,
    PARTIAL_SUFFIX,
    RECIPE,
    STUDENT_FOLDER,
    SUMS,
)
from exporter.planning.plan import Plan
from exporter.publishing.license_files import license_files
from exporter.stages.finished import artifact_path
from exporter.work.directory import WorkDirectory, exclusive, make_folder
from exporter.writing.files import flush, flush_folder, sha256_of, storage_error
from exporter.writing.gguf.sharding import shard_gguf

__all__ = ["Artifact", "FileEntry", "Outputs", "publish_folder", "reserved"]


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A GGUF file, or the folder of an ONNX model with its data."""

    path: str  # its path below the output folder, that of its first part
    files: Mapping[str, FileEntry]  # the files that hold it, by path below the output folder
    counted_bytes: int  # size for the budget: parts count as the one file that they were cut from

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())


class Outputs:
    """Hard links (or copies, across file systems) of the stages' files, in the layout that the user gets."""

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        self._plan = plan
        self._work = work
        self.folder = work.folder / ASSEMBLED

    def collect(self) -> dict[str, Artifact]:
        """Brings the stages' artifacts together in an empty folder and hashes them."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir()
        artifacts = {}
        if "gguf" in self._plan.recipe.artifacts:
            file = artifact_path(self._work, "gguf")
            artifacts["gguf"] = replace(self._gguf(file), counted_bytes=file.stat().st_size)
        if "onnx" in self._plan.recipe.artifacts:
            _link_tree(artifact_path(self._work, "onnx"), ONNX_FOLDER.within(self.folder))
            artifacts["onnx"] = self._artifact(ONNX_FOLDER.name, ONNX_WEIGHTS)
        for path in license_files(self._plan.open_source()):
            shutil.copyfile(path, self.folder / path.name)
        if self._plan.recipe.save_student:
            _link_tree(self._work.path("student", STUDENT_FOLDER), STUDENT_FOLDER.within(self.folder))
        return artifacts

    def write_text(self, name: str, text: str) -> None:
        """Adds a text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Writes SHA256SUMS of weights and recipe, flushes everything, and moves the folder to its place.

        Raises:
            InputError: something else is in that place, or it cannot be written to.
        """
        weights = [
            path for path in self.folder.rglob("*") if path.suffix in (".gguf", ".onnx", ".data", ".safetensors")
        ]
        names = sorted(str(path.relative_to(self.folder)) for path in [*weights, self.folder / RECIPE])
        self.write_text(SUMS, "".join(f"{sha256_of(self.folder / name)}  {name}\n" for name in names))
        publish_folder(self.folder, self._plan.out, self._work.root.folder)

    def _gguf(self, file: Path) -> Artifact:
        """The file itself, or its parts if it is larger than one may be."""
        most = self._plan.shard_bytes
        try:
            names = [] if most is None else [part.name for part in shard_gguf(file, self.folder, most)]
        except OSError as error:
            raise storage_error(error, self.folder) or error from None
        if not names:
            _link(file, self.folder / file.name)
        return self._artifact(names[0] if names else file.name, names or [file.name])

    def _artifact(self, path: str, counted: Sequence[str]) -> Artifact:
        files = {name: self.folder / name for name in counted}
        entries = {name: FileEntry(file.stat().st_size, sha256_of(file)) for name, file in files.items()}
        return Artifact(path, entries, sum(entry.bytes for entry in entries.values()))


def publish_folder(folder: Path, out: Path, work: Path) -> None:
    """Flushes a folder and moves it to its place, in one step.

    Args:
        folder: the complete folder.
        out: its place.
        work: the folder that keeps everything until then.

    Raises:
        InputError: something else is in that place, or it cannot be written to.
    """
    flush_folder(folder)
    if out.exists():
        raise InputError(f"{out} was made by somebody else meanwhile; move it away and run the same command again")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _move(folder, out)
        flush(out.parent)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); everything is finished and kept in {work}: "
            "fix that and run the same command again"
        ) from None


def _move(folder: Path, out: Path) -> None:
    """Moves it in one rename; from another file system, copies it beside the place first."""
    try:
        folder.rename(out)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = out.with_name(f"{out.name}{PARTIAL_SUFFIX}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(folder, beside)
        flush_folder(beside)
        beside.rename(out)


@contextmanager
def reserved(out: Path) -> Iterator[None]:
    """Keeps other runs from building the same output folder elsewhere, by a lock file beside it that is then removed.

    Raises:
        InputError: another run builds it right now.
    """
    lock = out.with_name(f"{out.name}{LOCK_SUFFIX}")
    make_folder(lock.parent)
    with exclusive(lock, f"another run builds {out} right now; wait for it, or choose another --out"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _link_tree(source: Path, target: Path) -> None:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            _link(path, target / path.relative_to(source))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
