"""Makes a large file's pieces in parallel and writes them in order, each once.

One thread reads ahead and writes; the others quantize, which takes most of the time. The output that waits is bounded,
so memory depends on the largest piece and the number of threads, not on the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, TypeVar

from compressors.model.threads import one_thread_each
from exporter.writing.resumable import Extent, Part, ResumableFile

__all__ = ["MatrixRows", "Piece", "last_of_layers", "made_in_order", "row_slices", "whole_experts", "write_pieces"]

_PIECE_VALUES = 4 << 20  # about as many as an expert has
_AHEAD_BYTES = 64 << 20  # output that may wait for its turn, beyond one piece for each thread


@dataclass(frozen=True)
class Piece(Extent):
    """A part of a file that is read, made and written as one."""

    read: Callable[[], Callable[[], Sequence[Part]]]  # reads the weights; its result quantizes them, in a thread
    then: Callable[[], None] | None = None  # is called when no attempt makes this piece, or one before it, again
    layer: int | None = None  # the decoder layer that it belongs to
    is_head: bool = False  # it belongs to a head that is not the embedding


class MatrixRows(Protocol):
    """Consecutive rows of one matrix."""

    @property
    def layer(self) -> int | None:
        """The decoder layer of the matrix; None for embedding, head and final norm."""

    @property
    def expert(self) -> int | None:
        """The expert whose matrix it is; None for any other matrix."""

    @property
    def is_head(self) -> bool:
        """True if it is a head that is not the embedding."""


_Rows = TypeVar("_Rows", bound=MatrixRows)


def whole_experts(all_rows: Iterable[_Rows]) -> Iterator[tuple[_Rows, ...]]:
    """Reorders a file's rows in each layer: first those outside of experts, one by one, then each expert's together.

    Error feedback quantizes the matrices of an expert together, because they share the moments of their inputs.
    """
    for _, of_layer in groupby(all_rows, key=lambda rows: rows.layer):
        experts: dict[int, tuple[_Rows, ...]] = {}
        for rows in of_layer:
            if rows.expert is None:
                yield (rows,)
            else:
                experts[rows.expert] = (*experts.get(rows.expert, ()), rows)
        yield from experts.values()


def last_of_layers(groups: Iterable[Sequence[MatrixRows]]) -> dict[int, int | None]:
    """The layers by the number of the last group of rows that each has; None stands for what is outside of layers."""
    last = {group[0].layer: number for number, group in enumerate(groups)}
    return {number: layer for layer, number in last.items()}


def row_slices(n_rows: int, row_length: int, multiple: int = 1) -> list[slice]:
    """Cuts a large matrix into slices of a multiple of ``multiple`` rows; the last one takes the rest."""
    step = max(1, _PIECE_VALUES // (row_length * multiple)) * multiple
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]


def write_pieces(
    file: ResumableFile,
    pieces: Sequence[Piece],
    *,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the pieces that the file lacks; the bytes do not depend on ``threads``.

    Args:
        file: the open file, for these pieces.
        pieces: all of them, whether or not an earlier attempt has written some.
        threads: pieces that are made at a time.
        progress: called with bytes of finished pieces: those of an earlier attempt, then one piece at a time.

    Raises:
        InputError: a weight is not finite or cannot be read.
        OSError: the file cannot be written; :func:`~exporter.writing.resumable.resuming` turns it into a message.
    """
    report = progress or (lambda n_bytes: None)
    report(sum(piece.n_bytes for piece in pieces[: file.n_pieces]))
    with one_thread_each(threads) as pool:
        for piece, parts in made_in_order(pool, pieces[file.n_pieces :], threads):
            file.write_piece(parts)
            if piece.then is not None:
                file.record()
                piece.then()
            report(piece.n_bytes)


def made_in_order(
    pool: ThreadPoolExecutor, pieces: Sequence[Piece], threads: int
) -> Iterator[tuple[Piece, Sequence[Part]]]:
    """Makes pieces in the pool's threads, so many at a time, and yields each with its parts, in their order."""
    waiting: deque[tuple[Piece, Future[Sequence[Part]]]] = deque()
    bytes_waiting = 0
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(piece.read())))
            bytes_waiting += piece.n_bytes
            while len(waiting) > threads and bytes_waiting > _AHEAD_BYTES:
                first, future = waiting.popleft()
                bytes_waiting -= first.n_bytes
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
