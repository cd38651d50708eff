"""Pieces are written in order for any timing of the threads, and few of them are held at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from compressors.model.errors import InputError
from exporter.writing import pieces as module
from exporter.writing.pieces import Piece, row_slices, write_pieces
from exporter.writing.resumable import Part, resuming

_SIZE = 4


class _Held:
    """Counts the pieces that are read and not yet written."""

    def __init__(self, count: int, failing: int | None = None) -> None:
        self.now = self.most = self.made = 0
        self.failing = failing
        self.lock = threading.Lock()
        self.pieces = [Piece(_SIZE, (number + 1) * _SIZE, partial(self._read, number)) for number in range(count)]

    def _read(self, number: int) -> Callable[[], Sequence[Part]]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        return partial(self._make, number)

    def _make(self, number: int) -> Sequence[Part]:
        time.sleep(0.01 if number % 3 == 0 else 0)  # later pieces are ready before earlier ones
        with self.lock:
            self.made += 1
        if number == self.failing:
            raise InputError(f"piece {number} is damaged")
        return [(number * _SIZE, memoryview(bytes([number] * _SIZE)))]

    def written(self, n_bytes: int) -> None:
        """The progress function."""
        self.now -= n_bytes // _SIZE


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ahead_bytes", [0, 10 * _SIZE, 1 << 20])
def test_order_is_kept_and_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, ahead_bytes: int
) -> None:
    monkeypatch.setattr(module, "_AHEAD_BYTES", ahead_bytes)
    held = _Held(50)
    with resuming(tmp_path / "file", b"", held.pieces, keep=False) as file:
        write_pieces(file, held.pieces, threads=threads, progress=held.written)
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number] * _SIZE) for number in range(50))
    assert held.now == 0
    assert held.most <= max(threads, ahead_bytes // _SIZE) + 1


def test_a_piece_that_fails_ends_the_file_and_the_rest_is_not_made(tmp_path: Path) -> None:
    held = _Held(200, failing=3)
    with (
        pytest.raises(InputError, match="piece 3 is damaged"),
        resuming(tmp_path / "file", b"", held.pieces, keep=False) as file,
    ):
        write_pieces(file, held.pieces, threads=1)
    assert list(tmp_path.iterdir()) == []
    assert held.made < 200


def test_slices_cover_all_rows_in_multiples() -> None:
    slices = row_slices(50_304, 2_048, multiple=128)
    assert [rows.start for rows in slices[1:]] == [rows.stop for rows in slices[:-1]]
    assert (slices[0].start, slices[-1].stop) == (0, 50_304)
    assert all((rows.stop - rows.start) % 128 == 0 for rows in slices[:-1])
    assert all((rows.stop - rows.start) * 2_048 <= 4 << 20 for rows in slices)
    assert row_slices(3, 1 << 30, multiple=2) == [slice(0, 2), slice(2, 3)]
