"""What enters each decoder layer, and the head, for the first tokens of the calibration text: kept on disk in bfloat16.

With a layer's inputs anything about that layer can be looked at without the layers before it: second moments of the
inputs of its matrices, experts one at a time, in any order and as often as needed.

Letters as in :mod:`compressors.model.shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from compressors.model.array_file import ArrayFile
from compressors.model.hidden_states import HiddenStates
from compressors.model.shape import MoeShape
from compressors.model.streaming import StreamedModel, TokenGroup

__all__ = ["KEPT_TOKENS", "LayerInputs", "layer_input_bytes", "n_kept_blocks", "write_layer_inputs"]

KEPT_TOKENS = 32_000
"""About 1,000 tokens an expert give most of what error feedback can; 32,000 are that, for 8 of 128 experts, twice."""


def n_kept_blocks(n_blocks: int, block_length: int) -> int:
    """How many of a text's first blocks are kept: whole ones, at least one, and no more than there are."""
    return min(n_blocks, max(1, KEPT_TOKENS // block_length))


def layer_input_bytes(shape: MoeShape, n_tokens: int) -> int:
    """Bytes on disk, at most, for a text of so many tokens."""
    return (shape.n_layers + 1) * min(n_tokens, KEPT_TOKENS) * shape.hidden_size * 2


class LayerInputs:
    """The inputs of the layers 0 to L - 1, and of the head as number L, each in a file of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def create(cls, folder: Path, n_layers: int, shape: tuple[int, int, int]) -> LayerInputs:
        """Makes the folder with empty files of ``shape``, which is [B, T, D]."""
        folder.mkdir(parents=True, exist_ok=True)
        inputs = cls(folder)
        for layer in range(n_layers + 1):
            ArrayFile.create(inputs._path(layer), shape, np.int16)
        return inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T, D).

        Raises:
            InputError: the files are missing or damaged.
        """
        return ArrayFile.open(self._path(0)).shape

    def keep(self, layer: int, states: HiddenStates, blocks: Sequence[int]) -> None:
        """Writes what enters a layer.

        ``blocks`` says which blocks of the text these states are; those that are not among the kept ones are left out.

        Raises:
            OSError: the disk is full or failed.
        """
        file = ArrayFile.open(self._path(layer), writable=True)
        for position, block in enumerate(blocks):
            if block < len(file):
                rows = states.read(slice(position, position + 1)).to(torch.bfloat16)
                file.write(block, rows.view(torch.int16).numpy())  # NumPy has no bfloat16: its bits travel

    def read(self, layer: int, blocks: slice) -> torch.Tensor:
        """What enters a layer, of these blocks: bfloat16 [b, T, D].

        Raises:
            InputError: the file is missing or damaged.
        """
        rows = ArrayFile.open(self._path(layer)).read(blocks.start, blocks.stop)
        return torch.from_numpy(rows).view(torch.bfloat16)

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:03d}.npy"


def write_layer_inputs(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> LayerInputs:
    """Takes tokens through a model and keeps what enters its layers: for a student, which sees other than its teacher.

    Args:
        model: the student.
        tokens_BT: int64, the blocks that are kept.
        folder: where the files go.
        dtype: of the arithmetic.
        progress: called with 1 for each finished layer.

    Raises:
        NotFiniteError: a value is not finite.
        OSError: the disk is full or failed.
    """
    n_layers = model.shape.n_layers
    inputs = LayerInputs.create(folder, n_layers, (*tokens_BT.shape, model.shape.hidden_size))
    groups, blocks = [TokenGroup(tokens_BT, dtype=dtype)], range(len(tokens_BT))
    (states,) = model.first_states(groups)
    inputs.keep(0, states, blocks)
    for layer in model.advance(groups, [states], range(n_layers)):
        inputs.keep(layer + 1, states, blocks)
        if progress is not None:
            progress(1)
    return inputs
