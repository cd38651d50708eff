"""The inputs of each decoder layer, and of the head, for the first calibration tokens, in bfloat16.

With its inputs, a layer can be examined without running the layers before it: second moments of the inputs of its
matrices, experts one at a time. All inputs are kept on disk, to be read in any order and as often as needed; or those
of one layer are there, and the model runs on when the next layer's are asked for.

Letters as in :mod:`compressors.model.description.spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compressors.model.files.array_file import ArrayFile
from compressors.model.running.hidden_states import HiddenStates
from compressors.model.running.streaming import StreamedModel, TokenGroup

__all__ = ["InputsOfLayers", "LayerInputs", "PassingInputs", "write_layer_inputs"]


class InputsOfLayers(Protocol):
    """The inputs of layers, and of the head as number L."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T, D)."""

    def reader(self, layer: int) -> Callable[[slice], torch.Tensor]:
        """Returns what reads the inputs of a layer for some blocks: bfloat16 [b, T, D]; it may be called in threads.

        It is valid until another layer's is asked for.

        Raises:
            InputError: they cannot be read.
        """


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
        first = min(self._folder.glob("layer-*.npy"), default=self._path(0))  # others may be gone
        return ArrayFile.open(first).shape

    def keep(self, layer: int, states: HiddenStates, blocks: Sequence[int]) -> None:
        """Writes the inputs of a layer.

        ``blocks`` says which blocks of the text these states are; blocks that are not kept are left out.

        Raises:
            OSError: the disk is full or failed.
        """
        file = ArrayFile.open(self._path(layer), writable=True)
        for position, block in enumerate(blocks):
            if block < len(file):
                rows = _in_16_bits(states, slice(position, position + 1))
                file.write(block, rows.view(torch.int16).numpy())  # NumPy has no bfloat16

    def read(self, layer: int, blocks: slice) -> torch.Tensor:
        """Reads the inputs of a layer for these blocks: bfloat16 [b, T, D].

        Raises:
            InputError: the file is missing or damaged.
        """
        rows = ArrayFile.open(self._path(layer)).read(blocks.start, blocks.stop)
        return torch.from_numpy(rows).view(torch.bfloat16)

    def reader(self, layer: int) -> Callable[[slice], torch.Tensor]:
        """:meth:`read` for one layer."""
        return partial(self.read, layer)

    def remove(self, layer: int) -> None:
        """Removes the inputs of a layer; it is no error if they are gone.

        Raises:
            OSError: the disk failed.
        """
        self._path(layer).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:03d}.npy"


class PassingInputs:
    """The inputs of one layer at a time, for a student whose layers are taken in order.

    To go back to an earlier layer, all tokens run again from the first.

    Args:
        model: the student; it holds no weights while inputs are read.
        tokens_BT: int64, the blocks that are kept.
        dtype: dtype of the arithmetic.
    """

    def __init__(self, model: StreamedModel, tokens_BT: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        self._model = model
        self._group = TokenGroup(tokens_BT, dtype=dtype)
        self._states: HiddenStates | None = None
        self._layer = 0  # that the states enter

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, T, D)."""
        return (*self._group.tokens_BT.shape, self._model.spec.hidden_size)

    def reader(self, layer: int) -> Callable[[slice], torch.Tensor]:
        """As in :class:`InputsOfLayers`.

        Raises:
            InputError: weights cannot be read.
            NotFiniteError: a value is not finite.
            OSError: the disk is full or failed.
        """
        if self._states is None or layer < self._layer:
            self._states = None  # its room is needed
            (self._states,) = self._model.first_states([self._group], spilled=True)  # codes may take all memory
            self._layer = 0
        for done in self._model.advance([self._group], [self._states], range(self._layer, layer)):
            self._layer = done + 1
        self._model.release()
        return partial(_in_16_bits, self._states)


def _in_16_bits(states: HiddenStates, blocks: slice) -> torch.Tensor:
    return states.read(blocks).to(torch.bfloat16)


def write_layer_inputs(
    model: StreamedModel,
    tokens_BT: torch.Tensor,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> LayerInputs:
    """Runs tokens through a student and keeps the inputs of its layers, which differ from its teacher's.

    Args:
        model: the student.
        tokens_BT: int64, the blocks that are kept.
        folder: the folder for the files.
        dtype: dtype of the arithmetic.
        progress: called with 1 for each finished layer.

    Raises:
        NotFiniteError: a value is not finite.
        OSError: the disk is full or failed.
    """
    n_layers = model.spec.n_layers
    inputs = LayerInputs.create(folder, n_layers, (*tokens_BT.shape, model.spec.hidden_size))
    groups, blocks = [TokenGroup(tokens_BT, dtype=dtype)], range(len(tokens_BT))
    (states,) = model.first_states(groups)
    inputs.keep(0, states, blocks)
    for layer in model.advance(groups, [states], range(n_layers)):
        inputs.keep(layer + 1, states, blocks)
        if progress is not None:
            progress(1)
    return inputs
