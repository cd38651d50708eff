"""Cuts text files into shares by document. A share is a place in its file, and is read where it is needed."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from compressors.calibration.chats import contents_of, is_chats
from compressors.calibration.mixture import WeightedText, unequal_names
from compressors.calibration.text_file import TextFile, open_unchanged
from compressors.model.errors import InputError
from compressors.model.files.raw_file import FileState

__all__ = ["DomainText", "cut_parts", "digest_of", "read_parts"]

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class DomainText:
    """The part of one file that belongs to a split: its bytes from ``start`` to ``stop``, UTF-8."""

    domain: str  # the file's name without .txt, or as much more as tells it from the others
    file: Path
    start: int
    stop: int
    n_documents: int
    state: FileState  # the file's state when its documents were found
    weight: float = 1.0  # its share of a split's blocks, in proportion to those of the other files

    @property
    def n_bytes(self) -> int:
        """Size of the part's UTF-8 text."""
        return self.stop - self.start

    @property
    def is_chats(self) -> bool:
        """True if each line is a chat, in JSON."""
        return is_chats(self.file)

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

        Lines of chats are never cut.

        Raises:
            InputError: the file was changed since its documents were found.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        held = ""
        for data in self.chunks(n_bytes):
            held += decoder.decode(data)
            cut = held.rfind("\n") + 1
            if cut or (len(held) >= 2 * n_bytes and not self.is_chats):  # a line that is longer than pieces are
                yield held[: cut or len(held)]
                held = held[cut or len(held) :]
        if held:
            yield held

    def words(self, n_bytes: int = _PIECE_BYTES) -> Iterator[str]:
        """The same in words that people wrote: of chats only what their messages say.

        Raises:
            InputError: the file was changed since its documents were found.
        """
        pieces = self.pieces(n_bytes)
        return map(contents_of, pieces) if self.is_chats else pieces

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
    files = _files_of([WeightedText(path)])
    return tuple(_part(file, name, weight, 0, file.n_documents) for file, name, weight in files)


def cut_parts(texts: Sequence[WeightedText], n_shares: int) -> list[list[DomainText]]:
    """Cuts each file into shares: a tenth of its documents for each share after the first, the last share last.

    Args:
        texts: files, or folders of ``*.txt``, whose files share their weight.
        n_shares: the number of shares.

    Raises:
        InputError: as :func:`read_parts`, or a file has too few documents.
    """
    cut = []
    for file, name, weight in _files_of(texts):
        n_documents = file.n_documents
        if n_documents < n_shares:
            raise InputError(
                f"{file.path} has {n_documents} document(s), but {n_shares} are needed to set text aside; "
                + ("give more chats" if is_chats(file.path) else "separate documents by blank lines")
            )
        tenth = max(1, n_documents // 10)
        firsts = [0, *(n_documents - tenth * share for share in range(n_shares - 1, 0, -1)), n_documents]
        cut.append([_part(file, name, weight, first, stop) for first, stop in pairwise(firsts)])
    return cut


def _part(file: TextFile, name: str, weight: float, first: int, stop: int) -> DomainText:
    """Documents first..stop; what stands before the first document of a file belongs to it."""
    start = 0 if first == 0 else file.start_of(first)
    end = file.n_bytes if stop == file.n_documents else file.start_of(stop)
    return DomainText(name, file.path, start, end, stop - first, file.state, weight)


def _files_of(texts: Sequence[WeightedText]) -> Iterator[tuple[TextFile, str, float]]:
    """Yields files with their names and weights, in the order of the texts, those of a folder by name."""
    files = [(file, text.weight / len(found)) for text in texts for found in [_paths_of(text.path)] for file in found]
    names = unequal_names([file for file, _ in files])
    for (file, weight), name in zip(files, names, strict=True):
        yield TextFile(file), name, weight


def _paths_of(path: Path) -> list[Path]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError(
            f"{path} holds no *.txt file; put the text there, one file per domain (chats: name the .jsonl)"
        )
    return files


def digest_of(parts: tuple[DomainText, ...]) -> str:
    """SHA-256 of the parts' UTF-8 text, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for data in part.chunks():
            digest.update(data)
    return digest.hexdigest()
