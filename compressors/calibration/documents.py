"""Cuts text files into shares by document. A share is a place in its file, and is read where it is needed."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from compressors.calibration.text_file import TextFile, open_unchanged
from compressors.model.errors import InputError
from compressors.model.files.raw_file import FileState

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
        with open_unchanged(self.file, self.state) as file:
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
        with open_unchanged(self.file, self.state) as file:
            file.seek(self.start)
            left = self.n_bytes
            while left and (data := file.read(min(left, n_bytes))):
                left -= len(data)
                yield data


def read_parts(path: Path) -> tuple[DomainText, ...]:
    """Returns a file, or all ``*.txt`` files of a folder, each as one part.

    Raises:
        InputError: nothing is there, or a file is empty, not UTF-8 or no regular file.
    """
    return tuple(_part(file, 0, file.n_documents) for file in _files_of(path))


def cut_parts(path: Path, n_shares: int) -> list[list[DomainText]]:
    """Cuts each file into shares: a tenth of its documents for each share after the first, the last share last.

    Raises:
        InputError: as :func:`read_parts`, or a file has too few documents.
    """
    cut = []
    for file in _files_of(path):
        n_documents = file.n_documents
        if n_documents < n_shares:
            raise InputError(
                f"{file.path} has {n_documents} document(s), but {n_shares} are needed to set text aside; "
                "separate documents by blank lines"
            )
        tenth = max(1, n_documents // 10)
        firsts = [0, *(n_documents - tenth * share for share in range(n_shares - 1, 0, -1)), n_documents]
        cut.append([_part(file, first, stop) for first, stop in pairwise(firsts)])
    return cut


def _part(file: TextFile, first: int, stop: int) -> DomainText:
    """Documents first..stop; what stands before the first document of a file belongs to it."""
    start = 0 if first == 0 else file.start_of(first)
    end = file.n_bytes if stop == file.n_documents else file.start_of(stop)
    return DomainText(file.path.stem, file.path, start, end, stop - first, file.state)


def _files_of(path: Path) -> Iterator[TextFile]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no *.txt file; put the text there, one file per domain")
    yield from map(TextFile, files)


def digest_of(parts: tuple[DomainText, ...]) -> str:
    """SHA-256 of the parts' UTF-8 text, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for data in part.chunks():
            digest.update(data)
    return digest.hexdigest()
