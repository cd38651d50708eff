"""The settings of a GGUF file as families read them: the keys under its architecture's name, and its tensors' shapes.

They are turned back into settings by transformers' names, which the family then reads as those of any checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compressors.model.description.family import GgufValue
from compressors.model.errors import InputError
from compressors.model.names import shown

__all__ = ["GgufKeys"]


class GgufKeys:
    """Typed values of a file's metadata, and errors that name the key.

    A method that takes a ``default`` returns it where the key is absent; without one the key is required.

    Args:
        path: the file, for messages.
        architecture: llama.cpp's name of the architecture, with which keys begin.
        metadata: the values by their whole key.
        shapes: the shapes of the tensors by name, in torch's order.
        read: reads a tensor of one axis by its name.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        metadata: Mapping[str, GgufValue],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], npt.NDArray[np.float32]],
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.shapes = shapes
        self.read = read
        self._metadata = metadata

    def __contains__(self, key: str) -> bool:
        return self._whole(key) in self._metadata

    def get(self, key: str) -> GgufValue | None:
        """The value under a key, of whatever type; None where it is absent."""
        return self._metadata.get(self._whole(key))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number from 0 on, or the one number that an array has for all layers."""
        value = _one_of(self.get(key))
        if value is None and default is not None and key not in self:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(key, "a whole number, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number: the shortest one in decimals that is stored as this float32."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(str(np.float32(value)))

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def by_layer(self, key: str, n_layers: int) -> tuple[int, ...]:
        """A number, or true and false, for each of the first layers; behind them may be such as are not read."""
        value = self.get(key)
        if not isinstance(value, tuple) or len(value) not in (n_layers, self.count("block_count")):
            raise self._wrong(key, f"an array with an entry for each of {n_layers} layers")
        return value[:n_layers]

    def has_tensor(self, name: str) -> bool:
        """True if the file has a tensor of this name, with ``{layer}`` for any layer."""
        before, layer, after = name.partition("{layer}")
        if not layer:
            return name in self.shapes
        return any(found.startswith(before) and found.endswith(after) for found in self.shapes)

    def _whole(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _wrong(self, key: str, wanted: str) -> InputError:
        if key not in self:
            return InputError(f"{self.path} has no {self._whole(key)}: the model cannot be read without it")
        return InputError(f"{self.path}: {self._whole(key)} must be {wanted}, not {shown(self.get(key))}")


def _one_of(value: GgufValue | None) -> GgufValue | None:
    """The one value of an array whose items are all equal; any other value as it is."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
