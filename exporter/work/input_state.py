"""Checks that the inputs are still those that a run began with.

It compares the checkpoint's sizes, times of modification and headers, and reads no weight; and the SHA-256 of all three
splits of the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compressors.calibration.mixture import WeightedText
from compressors.calibration.splits import Splits, read_splits
from compressors.model.errors import InputError
from compressors.model.files.gguf.gguf_split import split_parts
from compressors.model.files.safetensors_header import LARGEST_HEADER
from compressors.model.files.vocabularies.made_files import is_vocabulary_file
from compressors.model.sources.hugging_face.foreign_folder import JSON_FILES, TEXT_FILES
from exporter.planning.recipe import TextChoice
from exporter.writing.files import write_atomically

__all__ = ["WEIGHT_SUFFIXES", "Change", "FileState", "SourceState", "refuse_changed_texts", "source_paths"]

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
"""The ends of the names of files that hold weights."""

_GGUF_HEADER = 1 << 25  # bytes; no header is longer, as a vocabulary of 250,000 tokens takes some 10 million


@dataclass(frozen=True)
class FileState:
    """One file of a checkpoint."""

    size: int
    modified_ns: int
    digest: str  # SHA-256 of a weight file's header, of all contents of any other file

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The file's state now."""
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, _digest(path))


@dataclass(frozen=True)
class Change:
    """A change of a checkpoint."""

    what: str  # names the file
    touched_only: bool  # sizes and headers are the same, only a time of modification is not


@dataclass(frozen=True)
class SourceState:
    """All files of a checkpoint that a run may read, by name; or those of a GGUF model."""

    files: Mapping[str, FileState]

    @classmethod
    def of(cls, source: Path) -> SourceState:
        """The state now of a checkpoint's folder, or of a GGUF file with the other parts of its model.

        Raises:
            InputError: the folder or a file in it cannot be read.
        """
        try:
            return cls({path.name: FileState.of(path) for path in source_paths(source)})
        except OSError as error:
            raise InputError(f"{error.filename or source} cannot be read ({error.strerror})") from None

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        write_atomically(path, json.dumps({name: asdict(file) for name, file in self.files.items()}, indent=1))

    @classmethod
    def load(cls, path: Path) -> SourceState | None:
        """The inverse of :meth:`save`; None if the file is missing or damaged."""
        try:
            files = json.loads(path.read_text(encoding="utf-8"))
            return cls({name: FileState(**file) for name, file in files.items()})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def change_to(self, now: SourceState) -> Change | None:
        """Says what is different now; None if nothing is. New files only count if they would be read."""
        for name, file in self.files.items():
            if name not in now.files:
                return Change(f"{name} is gone", touched_only=False)
            difference = _difference(name, file, now.files[name])
            if difference is not None:
                return Change(f"{name} changed: {difference}", touched_only=False)
        for name in now.files:
            if name not in self.files and (_is_read_by_name(name) or name.endswith((".safetensors", ".index.json"))):
                return Change(f"{name} is new", touched_only=False)
        for name, file in self.files.items():
            if file != now.files[name]:
                return Change(f"{name} was written or touched, with the same size and header", touched_only=True)
        return None


def source_paths(source: Path) -> list[Path]:
    """The files of a checkpoint's folder that a run may read, or a GGUF file and the other parts of its model.

    Raises:
        OSError: the folder cannot be read.
    """
    if source.is_dir():
        return [path for path in sorted(source.iterdir()) if _may_be_read(path) and path.is_file()]
    return list(split_parts(source))


def refuse_changed_texts(
    chosen: TextChoice,
    calibration: Sequence[WeightedText],
    heldout: Path | None,
    what_to_do: str,
    splits: Splits | None = None,
) -> None:
    """Compares the texts with those that the recipe names.

    Args:
        chosen: the recipe's part that names the texts.
        calibration: files or folders that the calibration and selection splits are from, and without ``heldout``
            the held-out split too.
        heldout: file or folder of the held-out split.
        what_to_do: the end of the message.
        splits: the texts, if they have been read already.

    Raises:
        InputError: a text has changed, and the message names it and its place; or a text cannot be read.
    """
    splits = splits or read_splits(calibration, heldout)
    for name, split in vars(splits).items():
        if split.sha256 != getattr(chosen, f"{name}_sha256"):
            place = heldout if name == "heldout" and heldout is not None else _places(calibration)
            raise InputError(
                f"{place} has changed since this run was planned: its {split.name} text is another; {what_to_do}"
            )


def _places(texts: Sequence[WeightedText]) -> str:
    return " or ".join(str(text.path) for text in texts)


def _difference(name: str, before: FileState, now: FileState) -> str | None:
    """Says what is different, apart from the time of modification; None if nothing is."""
    if before.size != now.size:
        return f"its size went from {before.size:,} to {now.size:,} bytes"
    if before.digest != now.digest:
        return "its header is another" if _is_weights(name) else "its contents are others"
    return None


def _may_be_read(path: Path) -> bool:
    return path.suffix in (".safetensors", ".json") or _is_read_by_name(path.name)


def _is_read_by_name(name: str) -> bool:
    """True for files that change the result as soon as they exist."""
    return name in (*JSON_FILES, *TEXT_FILES) or is_vocabulary_file(name)


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        if not _is_weights(path.name):
            return hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".gguf":
            return hashlib.sha256(file.read(_GGUF_HEADER)).hexdigest()
        length = file.read(8)  # the length of the JSON that follows; in a damaged file it may be any number
        header = file.read(min(int.from_bytes(length, "little"), LARGEST_HEADER))
        return hashlib.sha256(length + header).hexdigest()
