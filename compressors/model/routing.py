"""Which experts were chosen: kept on disk, counted by validation. Needs numpy only, as the runtimes' processes do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from compressors.model.errors import InputError

__all__ = ["NO_EXPERT", "Routing"]

NO_EXPERT = -1
"""Fills up the choices of layers with fewer than the largest top-k, or none; its gate weight is 0."""


@dataclass(frozen=True)
class Routing:
    """Chosen experts of every layer and token, by falling gate weight, in the numbering of the model that ran."""

    experts_LTK: npt.NDArray[np.int32]
    weights_LTK: npt.NDArray[np.float32]  # gate weights as they were applied

    def save(self, path: Path) -> None:
        """Writes both arrays into one safetensors file."""
        # safetensors writes an array's memory as it lies, whatever its strides
        save_file(
            {"experts": np.ascontiguousarray(self.experts_LTK), "weights": np.ascontiguousarray(self.weights_LTK)}, path
        )

    @classmethod
    def load(cls, path: Path) -> Routing:
        """The inverse of :meth:`save`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the routing in {path} cannot be read ({error})") from None
        return cls(tensors["experts"], tensors["weights"])

    @classmethod
    def concatenate(cls, parts: list[Routing]) -> Routing:
        """Joins the tokens of several recordings of one model."""
        return cls(
            np.concatenate([part.experts_LTK for part in parts], axis=1),
            np.concatenate([part.weights_LTK for part in parts], axis=1),
        )
