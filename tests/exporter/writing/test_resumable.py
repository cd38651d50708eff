"""A file is complete or absent, and a second attempt continues exactly where the first one is known to have been."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.writing import resumable
from exporter.writing.files import not_written
from exporter.writing.resumable import Extent, ResumableFile, resuming

_CONTENTS = [bytes([number]) * 10 for number in range(1, 8)]
_GAP = 3  # zeros between the pieces
_PIECES = [Extent(10, number * (10 + _GAP) + 10) for number in range(len(_CONTENTS))]
_WHOLE = bytes(_GAP).join(_CONTENTS)


class _Killed(Exception):
    """The error that ends an attempt."""


def _write(file: ResumableFile, stop: int | None = None) -> None:
    for number, content in list(enumerate(_CONTENTS))[file.n_pieces : stop]:
        file.write_piece([(_PIECES[number].end - 10, memoryview(content))])


def _attempt(path: Path, stop: int, plan: bytes = b"plan") -> None:
    """Writes the first pieces, then fails."""
    with pytest.raises(_Killed), resuming(path, plan, _PIECES, keep=True) as file:
        _write(file, stop)
        raise _Killed


def _pieces_found(path: Path, plan: bytes = b"plan", pieces: Sequence[Extent] = _PIECES) -> int:
    """How many pieces a new attempt does not write again; it writes the others, and the file must be right."""
    with resuming(path, plan, pieces, keep=True) as file:
        found = file.n_pieces
        _write(file)
    assert path.read_bytes() == _WHOLE
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return found


@pytest.mark.parametrize("stop", range(len(_CONTENTS) + 1))
def test_an_attempt_goes_on_after_the_pieces_of_the_last_one(tmp_path: Path, stop: int) -> None:
    _attempt(tmp_path / "file", stop)
    assert not (tmp_path / "file").exists()
    assert _pieces_found(tmp_path / "file") == stop


def test_bytes_after_the_last_recorded_piece_are_not_trusted(tmp_path: Path) -> None:
    _attempt(tmp_path / "file", 4)
    with (tmp_path / "file.partial").open("ab") as partial:
        partial.write(b"torn" * 50)
    assert _pieces_found(tmp_path / "file") == 4


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"\xff\x00garbage",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"plan": "another", "pieces": 3}',
        b'{"plan": PLAN}',
        b'{"plan": PLAN, "pieces": "3"}',
        b'{"plan": PLAN, "pieces": true}',
        b'{"plan": PLAN, "pieces": -1}',
        b'{"plan": PLAN, "pieces": 8}',
        b'{"plan": PLAN, "pieces": 6}',
    ],
    ids=["empty", "binary", "list", "nested", "plan", "no count", "text", "bool", "negative", "beyond plan", "ahead"],
)
def test_a_damaged_journal_means_to_begin_anew(tmp_path: Path, journal: bytes) -> None:
    _attempt(tmp_path / "file", 4)
    path = tmp_path / "file.journal"
    plan = json.dumps(json.loads(path.read_text())["plan"]).encode()
    path.write_bytes(journal.replace(b"PLAN", plan))
    assert _pieces_found(tmp_path / "file") == 0


def test_a_file_that_was_cut_short_is_begun_anew(tmp_path: Path) -> None:
    _attempt(tmp_path / "file", 4)
    os.truncate(tmp_path / "file.partial", _PIECES[3].end - 1)
    assert _pieces_found(tmp_path / "file") == 0


def test_a_journal_that_is_not_trusted_does_not_outlive_the_file_s_new_beginning(tmp_path: Path) -> None:
    _attempt(tmp_path / "file", 4)
    os.truncate(tmp_path / "file.partial", 0)
    with resuming(tmp_path / "file", b"plan", _PIECES, keep=True) as file:
        assert not (tmp_path / "file.journal").exists()
        _write(file)


def test_another_plan_or_other_places_are_begun_anew(tmp_path: Path) -> None:
    _attempt(tmp_path / "file", 4)
    assert _pieces_found(tmp_path / "file", plan=b"another") == 0
    (tmp_path / "file").unlink()
    _attempt(tmp_path / "file", 4)
    with pytest.raises(_Killed), resuming(tmp_path / "file", b"plan", _PIECES[:-1], keep=True) as file:
        assert file.n_pieces == 0
        raise _Killed


def test_without_keeping_nothing_is_left_or_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    _attempt(path, 4)
    with pytest.raises(_Killed), resuming(path, b"plan", _PIECES, keep=False) as file:
        assert file.n_pieces == 0
        raise _Killed
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_the_journal_follows_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut, only pieces that a flush covered are counted, and a flush comes every few bytes."""
    monkeypatch.setattr(resumable, "_FLUSH_BYTES", 20)
    path, flush, sizes = tmp_path / "file", os.fdatasync, []

    def fdatasync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with resuming(path, b"plan", _PIECES, keep=True) as file:
        for stop in range(1, len(_CONTENTS) + 1):
            _write(file, stop)
            if file._flush is not None:
                file._flush.result()
            journal = tmp_path / "file.journal"
            recorded = json.loads(journal.read_text())["pieces"] if journal.exists() else 0
            assert recorded == stop - stop % 2
            assert not recorded or sizes[-1] >= _PIECES[recorded - 1].end


def test_a_flush_that_fails_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports it once; a second flush may pass, and must not make the journal say that all is well."""
    monkeypatch.setattr(resumable, "_FLUSH_BYTES", 20)
    flush, path = os.fdatasync, tmp_path / "file"
    failures = [OSError(errno.EIO, "Input/output error")]

    def fdatasync(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with (
        pytest.raises(InputError, match=r"file cannot be written \(Input/output error\)"),
        resuming(path, b"plan", _PIECES, keep=True) as file,
    ):
        _write(file)
    assert not path.exists()
    assert _pieces_found(path) == 0


def test_a_journal_that_cannot_be_written_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "_FLUSH_BYTES", 20)
    path = tmp_path / "file"
    with (
        pytest.raises(InputError, match=r"cannot take the rest of file \(No space left on device\): \d+ more bytes"),
        resuming(path, b"plan", _PIECES, keep=True) as file,
    ):
        (tmp_path / "file.journal.partial").symlink_to("/dev/full")
        _write(file)
    assert not path.exists()
    assert _pieces_found(path) == 0


def test_missing_room_is_said_with_figures(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    message = str(not_written(path, OSError(errno.ENOSPC, "No space left on device"), 12345))
    assert str(tmp_path) in message and "x.gguf" in message
    assert "12345 more bytes are needed" in message and "make room" in message
    other = str(not_written(path, OSError(errno.EROFS, "Read-only file system"), 1))
    assert other == f"{path} cannot be written (Read-only file system)"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="nowhere is not a folder"),
        resuming(tmp_path / "nowhere" / "x", b"plan", _PIECES, keep=True),
    ):
        pass
