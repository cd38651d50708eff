"""Finds where the documents of a text file begin, in one pass that holds little, whatever the file's size.

A document ends where, after a line end, lines follow that hold nothing but spaces, tabs and carriage returns. Of a file
of chats each line is one (:mod:`compressors.calibration.chats`).
"""

from __future__ import annotations

import codecs
import re
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from compressors.calibration.chats import chat_starts, is_chats
from compressors.model.errors import InputError
from compressors.model.files.raw_file import FileState
from compressors.model.files.regular_file import open_regular

__all__ = ["TextFile", "open_unchanged"]

_PIECE_BYTES = 1 << 18
_MOST_HELD = 1 << 16  # places of documents that are held of each file
_BREAK = re.compile(rb"\n(?:[ \t\r]*\n)+")
_ASCII_TEXT = re.compile(rb"[^\s\x1c-\x1f\x80-\xff]")


class TextFile:
    """A file of UTF-8 text, and where its documents begin.

    Of a file with many documents only every second, fourth, eighth ... place is held. A place between two of them is
    found by reading the file again from the one before it.

    Raises:
        InputError: the file is empty, not UTF-8 or no regular file, or a line of chats is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_documents = 0
        self._held, self._step = array("q"), 1
        self._starts = chat_starts if is_chats(path) else _document_starts
        with open_regular(path) as file:
            self.state = FileState.of(path)
            for start in self._starts(file, path):
                self._add(start)
            self.n_bytes = file.tell()
        if not self.n_documents:
            how = "a chat in each line" if is_chats(path) else "documents separated by blank lines"
            raise InputError(f"{path} is empty; give a file with text, {how}")

    def start_of(self, document: int) -> int:
        """The byte at which a document begins.

        Raises:
            InputError: the file was changed since its documents were found.
        """
        place, further = divmod(document, self._step)
        if not further:
            return self._held[place]
        with open_unchanged(self.path, self.state) as file:
            return next(islice(self._starts(file, self.path, self._held[place]), further, None))

    def _add(self, start: int) -> None:
        if self.n_documents % self._step == 0:
            if len(self._held) == _MOST_HELD:
                self._held, self._step = self._held[::2], 2 * self._step
            self._held.append(start)
        self.n_documents += 1


def open_unchanged(path: Path, state: FileState) -> BinaryIO:
    """Opens a regular file that must still be in this state.

    Raises:
        InputError: the file was changed, or cannot be opened.
    """
    file = open_regular(path)
    change = state.change_to(FileState.of(path))
    if change is not None:
        file.close()
        raise InputError(f"{path} was changed while it was read ({change}); start again")
    return file


def _document_starts(file: BinaryIO, name: Path, start: int = 0) -> Iterator[int]:
    """Yields the first byte of every document from ``start`` on, at which a document or the file begins."""
    file.seek(start)
    has_text, in_blank_line = False, start > 0  # the file's first line ends no document
    for position, data in _whole_characters(file, name, start):
        if in_blank_line:  # the search must see that the line has begun, and that it is not the first
            position, data = position - 1, b"\n" + data
        done = 0
        for found in _BREAK.finditer(data):
            if has_text or _has_text(data, done, found.start()):
                yield start
            done, has_text = found.end(), False
            start = position + done
        has_text = has_text or _has_text(data, done, len(data))
        line = data.rfind(b"\n") + 1
        in_blank_line = line > 0 and not data[line:].strip(b" \t\r")
    if has_text:
        yield start


def _has_text(data: bytes, start: int, stop: int) -> bool:
    """True if these bytes, whole characters, hold more than white space."""
    return _ASCII_TEXT.search(data, start, stop) is not None or bool(data[start:stop].decode("utf-8").strip())


def _whole_characters(file: BinaryIO, name: Path, position: int) -> Iterator[tuple[int, bytes]]:
    """Yields the places and bytes of pieces of whole characters, from ``position`` on, at which the file stands.

    Raises:
        InputError: the file is not UTF-8.
    """
    held, is_last = b"", False
    while not is_last:
        data = file.read(_PIECE_BYTES)
        held, is_last = held + data, not data
        try:
            n_whole = len(held) if held.isascii() else codecs.utf_8_decode(held, "strict", is_last)[1]
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8 text (byte {position + error.start}); convert it to UTF-8") from None
        if n_whole:
            yield position, held[:n_whole]
        position, held = position + n_whole, held[n_whole:]
