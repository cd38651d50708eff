"""A file that is never whole: embedding and final norm stay, and a layer, or the head, is there beside them.

To measure the numbers that a file would hold then takes little room. Each layer is written at the places that it has in
the whole file; what lies between takes no room where the file system keeps holes, as most do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.sources.weights import Weights
from compressors.model.threads import one_thread_each
from exporter.writing.files import check_free_space, not_written, write_at
from exporter.writing.pieces import Piece, made_in_order

if TYPE_CHECKING:
    import torch

__all__ = ["FilePlan", "LayerByLayer"]

_STAYS, _PASSES = "stays", "passes"


@dataclass(frozen=True)
class FilePlan:
    """A file that could be written.

    Attributes:
        name: its name.
        header: its first bytes.
        pieces: its weights.
        n_bytes: the bytes of the whole file.
        beside: the contents of the other files of its folder, by name.
        opened: opens the weights in such a folder.
        finish: is called when a layer is written; None: nothing is to be done then.
    """

    name: str
    header: bytes
    pieces: Sequence[Piece]
    n_bytes: int
    beside: Mapping[str, bytes]
    opened: Callable[[Path], Weights]
    finish: Callable[[], None] | None


class LayerByLayer:
    """Implements :class:`~compressors.model.sources.weights.Weights` for the layer, or the head, that was last written.

    The head is apart so that all layers can be taken before it: error feedback asks what enters it.

    Args:
        plan: the file.
        folder: an empty folder.
        threads: pieces that are made at a time.

    Raises:
        InputError: a weight is not finite or cannot be read, or the disk is full.
    """

    def __init__(self, plan: FilePlan, folder: Path, threads: int) -> None:
        self._plan = plan
        self._folder = folder
        self._threads = threads
        self._has_head = any(piece.is_head for piece in plan.pieces)  # or it is the embedding
        staying = [piece for piece in plan.pieces if piece.layer is None and not piece.is_head]
        self._stays = self._written(staying, folder / _STAYS)
        self._passes: tuple[int | None, Weights] | None = None

    def write(self, layer: int | None) -> None:
        """Writes a layer, or for None the head, in place of what is there. The errors are those of the class."""
        if layer is None and not self._has_head:
            return
        self._passes = None
        shutil.rmtree(self._folder / _PASSES, ignore_errors=True)
        is_head = layer is None
        pieces = [piece for piece in self._plan.pieces if piece.layer == layer and piece.is_head == is_head]
        self._passes = layer, self._written(pieces, self._folder / _PASSES)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the experts."""
        return self._stays.dtype

    def dtype_of(self, role: Role, layer: int | None) -> torch.dtype:
        """Dtype of the tensors of a role outside of experts."""
        return self._stays.dtype_of(role, layer)

    def tensor(self, role: Role, layer: int | None) -> torch.Tensor:
        """The tensor of a role outside of experts."""
        return self._weights(role, layer).tensor(role, layer)

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of :meth:`tensor`."""
        return self._weights(role, layer).rows(role, layer, rows)

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out`` with one expert's projection."""
        self._weights(role, layer).read_expert(role, layer, expert, out)

    def _weights(self, role: Role, layer: int | None) -> Weights:
        if layer is None and role is not Role.HEAD:
            return self._stays
        what = "the head" if layer is None else f"layer {layer}"
        assert self._passes is not None and self._passes[0] == layer, f"{what} is not what is there"
        return self._passes[1]

    def _written(self, pieces: Sequence[Piece], folder: Path) -> Weights:
        folder.mkdir()
        check_free_space(folder, sum(piece.n_bytes for piece in pieces))
        path = folder / self._plan.name
        try:
            for name, content in self._plan.beside.items():
                (folder / name).write_bytes(content)
            self._write_pieces(path, pieces)
        except OSError as error:
            raise not_written(path, error) from error
        if self._plan.finish is not None:
            self._plan.finish()
        return self._plan.opened(folder)

    def _write_pieces(self, path: Path, pieces: Sequence[Piece]) -> None:
        with path.open("wb") as file, one_thread_each(self._threads) as pool:
            file.write(self._plan.header)
            file.truncate(self._plan.n_bytes)
            file.flush()
            for _, parts in made_in_order(pool, pieces, self._threads):
                for offset, data in parts:
                    write_at(file.fileno(), offset, data)
