"""The inputs and choices of a model's routers in torch, for a few chunks: files on disk.

A runtime's own routers get the same inputs (:mod:`validate.routing.router_alone`). Needs numpy only, as the runtimes'
processes do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.model.files.array_file import ArrayFile
from compressors.model.predictions.routing_record import RoutingRecord

__all__ = ["ROUTER_CHUNKS", "RouterInputs", "spread_chunks"]

ROUTER_CHUNKS = 4
"""A layer's states of one chunk are 512 x hidden size x 4 bytes, for every layer: a sample must suffice."""


def spread_chunks(n_chunks: int) -> npt.NDArray[np.int64]:
    """The chunks whose router inputs are kept: four of them, evenly spread over the text, or all if there are fewer."""
    return np.unique(np.linspace(0, n_chunks - 1, min(n_chunks, ROUTER_CHUNKS)).round().astype(np.int64))


class RouterInputs:
    """The files in one folder; :class:`validate.routing.router_alone.RouterInputRecorder` writes them.

    Tokens (T) are those of the chosen chunks, one chunk after the other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def routing_path(self) -> Path:
        """The file with the model's own routing of these tokens."""
        return self.folder / "routing.safetensors"

    @property
    def chunks_path(self) -> Path:
        """The file with the indices of these held-out chunks."""
        return self.folder / "chunks.npy"

    def states_path(self, layer: int) -> Path:
        """The file with the hidden states that enter a layer's router; layers without experts have none."""
        return self.folder / f"states-{layer:03d}.npy"

    def chunks(self) -> npt.NDArray[np.int64]:
        """Indices of the held-out chunks."""
        chunks = ArrayFile.open(self.chunks_path)
        return chunks.read(0, len(chunks)).astype(np.int64)

    def states(self, layer: int, first: int, last: int) -> npt.NDArray[np.float32]:
        """The states of tokens ``first`` up to ``last``, float32 [tokens, D].

        Raises:
            InputError: the file is missing or damaged.
        """
        return ArrayFile.open(self.states_path(layer)).read(first, last).astype(np.float32, copy=False)

    def routing(self) -> RoutingRecord:
        """The model's own routing of these tokens."""
        return RoutingRecord.load(self.routing_path)
