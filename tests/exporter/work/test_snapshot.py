"""Snapshots of long stages are complete or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.work.snapshot import Snapshot


def _writes(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "state.bin").write_text(text) and None


def test_the_newest_snapshot_is_found_again(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path / "snapshot", seconds=0)
    assert snapshot.load() is None
    snapshot.keep(3, _writes("three"))
    snapshot.keep(7, _writes("seven"))
    found = Snapshot(tmp_path / "snapshot").load()
    assert found is not None
    position, folder = found
    assert (position, (folder / "state.bin").read_text()) == (7, "seven")
    snapshot.remove()
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_kept_more_often_than_asked(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path / "snapshot", seconds=1000)
    snapshot.keep(1, _writes("one"))
    assert snapshot.load() is None


def test_an_interrupted_one_leaves_the_one_before(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path / "snapshot", seconds=0)
    snapshot.keep(1, _writes("one"))

    def fails(folder: Path) -> None:
        (folder / "state.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshot.keep(2, fails)
    assert snapshot.load() == (1, tmp_path / "snapshot")
    snapshot.keep(3, _writes("three"))
    assert snapshot.load() == (3, tmp_path / "snapshot")


@pytest.mark.parametrize("name", ["state.bin", "contents.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[3]", b'{"position": 1}'])
def test_a_damaged_one_counts_as_absent(tmp_path: Path, name: str, content: bytes) -> None:
    snapshot = Snapshot(tmp_path / "snapshot", seconds=0)
    snapshot.keep(1, _writes("one"))
    (tmp_path / "snapshot" / name).write_bytes(content)
    assert snapshot.load() is None


def test_a_missing_file_counts_as_absent(tmp_path: Path) -> None:
    snapshot = Snapshot(tmp_path / "snapshot", seconds=0)
    snapshot.keep(1, _writes("one"))
    contents = json.loads((tmp_path / "snapshot" / "contents.json").read_text())
    assert set(contents["sha256"]) == {"state.bin"}
    (tmp_path / "snapshot" / "state.bin").unlink()
    assert snapshot.load() is None
