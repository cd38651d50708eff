"""Reads a folder that one of our runs published: its report, and whether its files are still the same.

Anybody may have edited the folder since, so nothing in it is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressors.model.description.shared_bases import SharedBases
from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown
from exporter.file_names import REPORT, SUMS
from exporter.writing.files import sha256_of

__all__ = ["changed_files", "read_report"]

_ADVICE = "give the output folder of a finished run"
_LONGEST_SUMS = 10_000_000  # bytes; a line has about 100, and a run writes tens
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def read_report(out: Path) -> dict[str, Any] | None:
    """The report of a folder that a run published; None for anything else.

    Raises:
        InputError: there is a report, and it is damaged; the message names the entry.
    """
    path = out / REPORT
    if not path.exists() and not path.is_symlink():
        return None
    report = read_json(path, f"is damaged; {_ADVICE}")
    if isinstance(report.get("parts"), dict):
        folders = ", ".join(shown(str(out / name)) for name in report["parts"])
        raise InputError(f"{out} holds several outputs; name one of them: {folders}")
    try:
        _Report.model_validate(report)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(shown(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"{path} is damaged ({where}: {first['msg'].lower()}); {_ADVICE}") from None
    return report


def changed_files(out: Path, report: Mapping[str, Any]) -> int:
    """Counts the files of SHA256SUMS that are missing or have another hash, and artifacts that it does not list.

    Raises:
        InputError: SHA256SUMS is missing or damaged.
    """
    entries = _sums(out / SUMS)
    changed = sum(not (out / name).is_file() or sha256_of(out / name) != digest for name, digest in entries.items())
    return changed + sum(not _is_listed(artifact["path"], entries) for artifact in report["artifacts"])


def _is_listed(artifact: str, names: Iterable[str]) -> bool:
    """True if the artifact is listed: a file, or a folder with files."""
    return any(name == artifact or name.startswith(f"{artifact}/") for name in names)


def _sums(path: Path) -> dict[str, str]:
    """The digest of every file, by its path below the folder."""
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path.parent} has no SHA256SUMS; {_ADVICE}")
    try:
        lines = RawFile(path).start(_LONGEST_SUMS).decode("utf-8").splitlines()
        matches = [(number, _LINE.fullmatch(line)) for number, line in enumerate(lines, start=1)]
        wrong = next((number for number, match in matches if match is None), None)
        if wrong is not None or not lines:
            raise ValueError(f"line {wrong or 1} is no digest and name")
        return {_inside(match[2]): match[1] for _, match in matches if match is not None}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {_ADVICE}") from None


def _inside(name: str) -> str:
    """Returns a path that stays below the folder; refuses others."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{shown(name)} is no place below the folder")
    if any(len(part.encode("utf-8", errors="replace")) > 255 for part in path.parts):
        raise ValueError(f"{shown(name)} is too long for a name")
    return name


_MOST_LAYERS = 10_000
_MOST_EXPERTS = 100_000
_Number = Annotated[int, Field(ge=0, lt=_MOST_EXPERTS)]
_Count = Annotated[int, Field(ge=1, le=_MOST_EXPERTS)]


class _Part(BaseModel):
    """The fields of a report that validation reads; the others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Artifact(_Part):
    path: Annotated[str, AfterValidator(_inside)]


class _Job(_Part):
    model: str | None
    revision: str | None


class _Source(_Part):
    identity: str
    n_layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]


class _Texts(_Part):
    heldout_chunks_per_file: Annotated[int, Field(ge=1, le=1_000_000)]


class _Compress(_Part):
    edit: str


class _Recipe(_Part):
    text: _Texts
    compress: _Compress


class _SharedBases(_Part):
    base_of: list[Annotated[int, Field(ge=SharedBases.ZERO, lt=_MOST_EXPERTS)] | None]
    bases: _Number
    rank: _Count


class _Layer(_Part):
    source: Annotated[int, Field(ge=0, lt=_MOST_LAYERS)]
    groups: list[Annotated[list[_Number], Field(min_length=1)]]
    width: _Count | None
    shared: _SharedBases | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> _Layer:
        if self.shared is not None:
            SharedBases.from_json(self.shared.model_dump()).check_against(len(self.groups))
        return self


class _ExpertMap(_Part):
    teacher_experts: _Count
    layers: Annotated[list[_Layer], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_consistent(self) -> _ExpertMap:
        if any(first.source >= second.source for first, second in pairwise(self.layers)):
            raise ValueError("layers are not in the original's order")
        for layer in self.layers:
            members = [expert for group in layer.groups for expert in group]
            if len(set(members)) < len(members) or max(members, default=0) >= self.teacher_experts:
                raise ValueError(f"layer {layer.source} keeps experts twice, or such as the original does not have")
        return self


class _Student(_Part):
    expert_map: _ExpertMap
    dense: bool


class _Rung(_Part):
    accepted: bool | None = None


class _Text(_Part):
    sha256: str


class _UsedTexts(_Part):
    heldout: _Text


class _Agreement(_Part):
    overlap: float


class _Routing(_Part):
    vs_teacher: _Agreement | None = None


class _Row(_Part):
    artifact: str
    perplexity: float | None
    routing: _Routing | None


class _Report(_Part):
    artifacts: Annotated[list[_Artifact], Field(min_length=1)]
    job: _Job
    source: _Source
    recipe: _Recipe
    student: _Student
    recovery: list[_Rung]
    text: _UsedTexts
    validation: list[_Row]

    @model_validator(mode="after")
    def _is_consistent(self) -> _Report:
        if self.student.expert_map.layers[-1].source >= self.source.n_layers:
            raise ValueError("the student has layers that the original does not have")
        names = [row.artifact for row in self.validation]
        if len(set(names)) < len(names):
            raise ValueError("validation has two rows of one artifact")
        return self
