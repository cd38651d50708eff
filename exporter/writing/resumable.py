"""A large file, written piece by piece, that can be continued after an attempt was killed.

The pieces go into ``NAME.partial``, in an order that never changes. Now and then the file is flushed to disk, and only
after that ``NAME.journal`` says how many pieces are complete. The next attempt with the same plan continues after them.
If the journal is damaged, belongs to another plan, or is ahead of its file, the file begins again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from exporter.writing.files import check_free_space, flush, not_written, write_at, write_note

__all__ = ["Extent", "Part", "ResumableFile", "is_published", "resuming"]

Part = tuple[int, memoryview]
"""An offset in the file, and the bytes that go there."""

_FLUSH_BYTES = 256 << 20  # seconds of quantizing: little to repeat, and a flush costs little beside them


@dataclass(frozen=True)
class Extent:
    """The place of a piece, as needed to continue after it."""

    n_bytes: int  # bytes that it writes
    end: int  # size of a file that holds it and all pieces before it


@contextmanager
def resuming(path: Path, plan: bytes, pieces: Sequence[Extent], *, keep: bool) -> Iterator[ResumableFile]:
    """Opens a file that replaces ``path`` once all its pieces are on the disk.

    Args:
        path: the finished file; an existing one stays as it was until then.
        plan: decides the pieces' number, places and sizes; only an attempt with an equal plan is continued.
        pieces: all of them, in their order.
        keep: True to continue an earlier attempt, and to leave this one's pieces if it fails. The caller makes sure
            that both attempts write the same bytes: the plan does not cover the weights.

    Raises:
        InputError: the file cannot be written; an existing one stays.
    """
    check_free_space(path.parent, 0)
    try:
        file = ResumableFile(path, plan, pieces, anew=not keep)
    except OSError as error:
        raise not_written(path, error) from error
    try:
        check_free_space(path.parent, file.bytes_left)
        yield file
        file.publish()
    except OSError as error:
        raise not_written(path, error, file.bytes_left) from error
    finally:
        file.close(record=keep)
        if not keep:
            file.remove()


def is_published(path: Path, pieces: Sequence[Extent]) -> bool:
    """True if an earlier attempt finished this file, and was stopped after that."""
    return path.exists() and path.stat().st_size == pieces[-1].end


class ResumableFile:
    """See :func:`resuming`, which opens and closes it."""

    def __init__(self, path: Path, plan: bytes, pieces: Sequence[Extent], *, anew: bool) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._journal = path.with_name(f"{path.name}.journal")
        self._pieces = pieces
        places = repr([(piece.n_bytes, piece.end) for piece in pieces])
        self._plan = hashlib.sha256(plan + places.encode()).hexdigest()
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        self.n_pieces = 0 if anew else self._pieces_on_disk()
        if self.n_pieces == 0:
            self._journal.unlink(missing_ok=True)  # or it would vouch for bytes that this attempt has not flushed yet
        os.ftruncate(self._descriptor, self._pieces[self.n_pieces - 1].end if self.n_pieces else 0)
        self._unflushed_bytes = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None

    @property
    def bytes_left(self) -> int:
        """The bytes of the pieces that are not written yet."""
        return sum(piece.n_bytes for piece in self._pieces[self.n_pieces :])

    def write_piece(self, parts: Iterable[Part]) -> None:
        """Writes the next piece: its parts, each at its offset."""
        n_bytes = sum(write_at(self._descriptor, offset, data) for offset, data in parts)
        declared = self._pieces[self.n_pieces].n_bytes
        assert n_bytes == declared, f"{self._path}: {n_bytes} bytes written, {declared} declared"
        self.n_pieces += 1
        self._unflushed_bytes += n_bytes
        if self._flush is not None and self._flush.done():
            self._flush.result()  # a flush that failed is this write's failure
            self._flush = None
        if self._flush is None and self._unflushed_bytes >= _FLUSH_BYTES:
            self._unflushed_bytes = 0
            self._flush = self._flusher.submit(self._record, self.n_pieces)

    def record(self) -> None:
        """Returns when all written pieces are on the disk, and noted there: no attempt makes them again.

        Raises:
            OSError: the disk is full or failed.
        """
        if self._flush is not None:
            self._flush.result()
            self._flush = None
        self._unflushed_bytes = 0
        self._record(self.n_pieces)
        flush(self._journal.parent)

    def publish(self) -> None:
        """Gives the finished file its name."""
        assert self.n_pieces == len(self._pieces), f"{self._path}: {self.n_pieces} of {len(self._pieces)} pieces"
        self._flusher.shutdown()
        if self._flush is not None:
            self._flush.result()  # the system reports a failed flush only once: the next one may pass all the same
        os.ftruncate(self._descriptor, self._pieces[-1].end)
        os.fsync(self._descriptor)
        self._partial.replace(self._path)
        self.remove()

    def close(self, *, record: bool) -> None:
        """Closes the file; with ``record``, notes the written pieces, so that none needs to be done again."""
        self._flusher.shutdown()
        flush_passed = self._flush is None or self._flush.exception() is None
        if record and flush_passed and self._partial.exists():
            with suppress(OSError):  # the disk may be what failed; the last record holds
                self._record(self.n_pieces)
        os.close(self._descriptor)

    def remove(self) -> None:
        """Removes everything except the finished file."""
        for leftover in (self._partial, self._journal, self._journal.with_name(f"{self._journal.name}.partial")):
            leftover.unlink(missing_ok=True)

    def _record(self, n_pieces: int) -> None:
        os.fdatasync(self._descriptor)
        write_note(self._journal, json.dumps({"plan": self._plan, "pieces": n_pieces}))

    def _pieces_on_disk(self) -> int:
        try:
            record = json.loads(self._journal.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return 0
        if not isinstance(record, dict) or record.get("plan") != self._plan:
            return 0
        n_pieces = record.get("pieces")
        if type(n_pieces) is not int or not 0 < n_pieces <= len(self._pieces):
            return 0
        return n_pieces if os.fstat(self._descriptor).st_size >= self._pieces[n_pieces - 1].end else 0
