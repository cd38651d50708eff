"""Exports that are killed, or run out of space, at random bytes: the next attempt ends with the same files."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.writing import pieces
from tests.exporter import export_attempt
from tests.exporter.export_attempt import FILES, PIECE_VALUES, export, student_of


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_PIECE_VALUES", PIECE_VALUES)
        yield


@pytest.fixture(scope="module")
def uninterrupted(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats, each written in one go."""
    out = tmp_path_factory.mktemp("uninterrupted")
    for kind in FILES:
        export(student_of(toy_model), kind, out)
    return out


def _attempt(source: Path, kind: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, export_attempt.__file__, str(source), kind, str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _bytes_of_last_attempt(source: Path, kind: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Finishes an export in this process and counts what it writes."""
    write, written = os.pwrite, 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    export(student_of(source), kind, out)
    return written


def _files(folder: Path, kind: str) -> dict[str, bytes]:
    place = folder / Path(FILES[kind]).parts[0]
    paths = [place] if place.is_file() else sorted(place.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.parametrize("kind", FILES)
def test_killed_exports_go_on_at_the_last_recorded_piece(
    kind: str, toy_model: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _files(uninterrupted, kind)
    total = sum(map(len, expected.values()))
    randomness = random.Random(kind)
    for _ in range(2):
        killed = _attempt(toy_model, kind, tmp_path, "--kill-at", str(randomness.randrange(total // 4, total // 2)))
        if killed.returncode == 0:  # earlier attempts had left less than that to do
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / FILES["gguf"]).exists() and not (tmp_path / "onnx/model.onnx").exists()
    written = _bytes_of_last_attempt(toy_model, kind, tmp_path, monkeypatch)
    assert written < total * 0.8
    assert _files(tmp_path, kind) == expected
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.journal"))


@pytest.mark.parametrize("kind", FILES)
def test_an_export_that_found_no_room_says_so_and_goes_on_when_there_is(
    kind: str, toy_model: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of a file stands for the full disk: the system refuses the write in the same way."""
    size = (uninterrupted / FILES[kind]).stat().st_size
    refused = _attempt(toy_model, kind, tmp_path, "--limit", str(size // 2))
    assert refused.returncode == 2
    message = re.search(r"^(.+) cannot take the rest of (.+) \(File too large\): (\d+) more bytes", refused.stderr)
    assert message is not None, refused.stderr
    assert Path(message[1], message[2]) == tmp_path / FILES[kind]
    assert size // 2 <= int(message[3]) < size
    assert "run the same command again" in refused.stderr
    assert not (tmp_path / FILES[kind]).exists()
    written = _bytes_of_last_attempt(toy_model, kind, tmp_path, monkeypatch)
    expected = _files(uninterrupted, kind)
    assert _files(tmp_path, kind) == expected
    assert written <= sum(map(len, expected.values())) - (size - int(message[3]))
