"""Finds the documents of text files, without holding a whole file in memory.

Documents are separated by blank lines. A part of a file is stored as its place in the file, and read when it is needed.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from compressors.model.errors import InputError
from compressors.model.files.raw_file import FileState
from compressors.model.files.regular_file import open_regular

__all__ = ["DomainText", "cut_parts", "digest_of", "read_parts"]

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class DomainText:
    """The part of one file that belongs to a split: its bytes from ``start`` to ``stop``, UTF-8."""

    domain: str  # the file's name without .txt
    file: Path
    start: int
    stop: int
    n_documents: int
    state: FileState  # the file's state when its documents were found

    @property
    def n_bytes(self) -> int:
        """Size of the part's UTF-8 text."""
        return self.stop - self.start

    @property
    def text(self) -> str:
        """All of it; use :meth:`pieces` where it may be long."""
        return self.read(0, self.n_bytes)

    def read(self, start: int, stop: int) -> str:
        """The text of these bytes of the part; a character that is cut at either end is left out.

        Raises:
            InputError: the file was changed since its documents were found.
        """
        with self._open() as file:
            file.seek(self.start + start)
            return file.read(max(0, min(stop, self.n_bytes) - start)).decode("utf-8", errors="ignore")

    def pieces(self, n_bytes: int = _PIECE_BYTES) -> Iterator[str]:
        """The text in consecutive pieces of about ``n_bytes`` bytes, cut after a line end where there is one.

        Raises:
            InputError: the file was changed since its documents were found.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        held = ""
        for data in self.chunks(n_bytes):
            held += decoder.decode(data)
            cut = held.rfind("\n") + 1
            if cut or len(held) >= 2 * n_bytes:  # a line that is longer than pieces are
                yield held[: cut or len(held)]
                held = held[cut or len(held) :]
        if held:
            yield held

    def chunks(self, n_bytes: int = _PIECE_BYTES) -> Iterator[bytes]:
        """The same as bytes, cut anywhere."""
        with self._open() as file:
            file.seek(self.start)
            left = self.n_bytes
            while left and (data := file.read(min(left, n_bytes))):
                left -= len(data)
                yield data

    def _open(self) -> BinaryIO:
        file = open_regular(self.file)
        change = self.state.change_to(FileState.of(self.file))
        if change is not None:
            file.close()
            raise InputError(f"{self.file} was changed while it was read ({change}); start again")
        return file


def read_parts(path: Path) -> tuple[DomainText, ...]:
    """Returns a file, or all ``*.txt`` files of a folder, each as one part.

    Raises:
        InputError: nothing is there, or a file is empty, not UTF-8 or no regular file.
    """
    return tuple(_part(file, 0, len(starts), starts, size, state) for file, starts, size, state in _scanned(path))


def cut_parts(path: Path, n_shares: int) -> list[list[DomainText]]:
    """Cuts each file into shares: a tenth of its documents for each share after the first, the last share last.

    Raises:
        InputError: as :func:`read_parts`, or a file has too few documents.
    """
    cut = []
    for file, starts, size, state in _scanned(path):
        if len(starts) < n_shares:
            raise InputError(
                f"{file} has {len(starts)} document(s), but {n_shares} are needed to set text aside; "
                "separate documents by blank lines"
            )
        tenth = max(1, len(starts) // 10)
        firsts = [0, *(len(starts) - tenth * share for share in range(n_shares - 1, 0, -1)), len(starts)]
        cut.append([_part(file, first, stop, starts, size, state) for first, stop in pairwise(firsts)])
    return cut


def _part(file: Path, first: int, stop: int, starts: array[int], size: int, state: FileState) -> DomainText:
    """Documents first..stop; what stands before the first document of a file belongs to it."""
    start = 0 if first == 0 else starts[first]
    return DomainText(file.stem, file, start, size if stop == len(starts) else starts[stop], stop - first, state)


def _scanned(path: Path) -> Iterator[tuple[Path, array[int], int, FileState]]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no *.txt file; put the text there, one file per domain")
    for file in files:
        with open_regular(file) as opened:
            state = FileState.of(file)
            starts, size = _document_starts(file, opened)
        if not starts:
            raise InputError(f"{file} is empty; give a file with text, documents separated by blank lines")
        yield file, starts, size, state


def _document_starts(name: Path, file: BinaryIO) -> tuple[array[int], int]:
    """The first byte of every document, and the number of bytes.

    A document ends where, after a line end, lines follow that hold nothing but spaces, tabs and carriage returns.
    """
    starts = array("q")
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = position = 0
    has_text, line_is_blank, line_is_first = False, True, True
    while piece := file.readline(_PIECE_BYTES):  # a longer line comes in several pieces
        text = _decoded(decoder, piece, name, position)
        position += len(piece)
        has_text = has_text or bool(text.strip())
        line_is_blank = line_is_blank and not piece.strip(b" \t\r\n")
        if not piece.endswith(b"\n"):
            continue
        if line_is_blank and not line_is_first:
            if has_text:
                starts.append(start)
            start, has_text = position, False
        line_is_blank, line_is_first = True, False
    _decoded(decoder, b"", name, position, final=True)
    if has_text:
        starts.append(start)
    return starts, position


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, name: Path, position: int, *, final: bool = False) -> str:
    held = len(decoder.getstate()[0])  # bytes of a character that the last piece ended inside of
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {position - held + error.start}); convert it to UTF-8"
        ) from None


def digest_of(parts: tuple[DomainText, ...]) -> str:
    """SHA-256 of the parts' UTF-8 text, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for data in part.chunks():
            digest.update(data)
    return digest.hexdigest()
