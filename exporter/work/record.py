"""The record of a finished stage: facts about its run, the sizes of its files, and those that were removed since."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from exporter.file_names import PARTIAL_SUFFIX, STAGE_FINGERPRINT, STAGE_RECORD, StageFile
from exporter.writing.files import write_atomically

__all__ = ["StageRecord", "note_removed", "read_record", "removed_since", "write_record"]

_NOT_OF_THE_STAGE = (STAGE_RECORD, f"{STAGE_RECORD}{PARTIAL_SUFFIX}", STAGE_FINGERPRINT)
"""Files in a stage's folder that are not its own; a kill may leave the second, of a record that was written anew."""


@dataclass(frozen=True)
class StageRecord:
    """The facts that are kept about a finished stage."""

    fingerprint: str
    seconds: float
    peak_rss_bytes: int
    source_bytes: int = 0  # read of the original's weights, as often as they were read
    crash: str | None = None  # how the runtime died, for stages where a crash is a finding


def write_record(folder: Path, record: StageRecord) -> None:
    """Writes the record of a stage whose files lie in this folder."""
    content = {"record": asdict(record), "files": _sizes(folder)}
    write_atomically(folder / STAGE_RECORD, json.dumps(content, indent=1, sort_keys=True))


def read_record(folder: Path) -> StageRecord | None:
    """The record in a stage's folder; None if there is none, or the files are not those that the stage left.

    Files that were removed since (:func:`note_removed`) are not missed.
    """
    try:
        kept = json.loads((folder / STAGE_RECORD).read_text(encoding="utf-8"))
        gone = _paths_of(kept.get("removed", ()), [*kept["files"], *_sizes(folder)])
        before, now = (_without(sizes, gone) for sizes in (kept["files"], _sizes(folder)))
        return StageRecord(**kept["record"]) if before == now else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def removed_since(folder: Path) -> frozenset[str]:
    """The names of the files that were removed from a finished stage's folder; none if it is not finished."""
    try:
        kept = json.loads((folder / STAGE_RECORD).read_text(encoding="utf-8"))
        return frozenset(kept.get("removed", ()))
    except (OSError, ValueError, TypeError, AttributeError):
        return frozenset()


def note_removed(folder: Path, files: Collection[StageFile]) -> None:
    """Notes in a finished stage's record that these files may be missing from its folder."""
    kept = json.loads((folder / STAGE_RECORD).read_text(encoding="utf-8"))
    kept["removed"] = sorted({*kept.get("removed", ()), *(file.name for file in files)})
    write_atomically(folder / STAGE_RECORD, json.dumps(kept, indent=1, sort_keys=True))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a stage's folder that is the stage's own, by path."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_OF_THE_STAGE
    }


def _without(sizes: Mapping[str, int], gone: Collection[str]) -> dict[str, int]:
    return {path: size for path, size in sizes.items() if path not in gone}


def _paths_of(names: Collection[str], paths: Collection[str]) -> set[str]:
    """Those of the paths below a stage's folder that are files of these names, or lie in a folder of such a name."""
    patterns = [PurePath(StageFile(name).pattern) for name in names]

    def is_named(path: PurePath) -> bool:
        starts = (PurePath(*path.parts[: len(pattern.parts)]) for pattern in patterns)
        return any(start.match(str(pattern)) for start, pattern in zip(starts, patterns, strict=True))

    return {path for path in paths if is_named(PurePath(path))}
