"""Which experts were chosen: recorded while a model streams, kept on disk, counted by validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from compressors.model.errors import InputError
from compressors.model.shape import MoeShape

__all__ = ["Routing", "RoutingRecorder"]


@dataclass(frozen=True)
class Routing:
    """Chosen experts of every layer and token, by falling gate weight, in the numbering of the model that ran."""

    experts_LTK: npt.NDArray[np.int32]
    weights_LTK: npt.NDArray[np.float32]  # gate weights as they were applied

    def save(self, path: Path) -> None:
        """Writes both arrays into one safetensors file."""
        save_file({"experts": self.experts_LTK, "weights": self.weights_LTK}, path)

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


class RoutingRecorder:
    """Records the routing of a streamed model; give :meth:`observe` to a ``TokenGroup``."""

    def __init__(self, shape: MoeShape) -> None:
        self._router_module = shape.family.router_module
        self._experts: list[list[torch.Tensor]] = [[] for _ in range(shape.n_layers)]
        self._weights: list[list[torch.Tensor]] = [[] for _ in range(shape.n_layers)]

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer's router while it runs."""

        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            _, weights_TK, experts_TK = outputs
            self._experts[index].append(experts_TK.to(torch.int32))
            self._weights[index].append(weights_TK.float())

        handle = layer.get_submodule(self._router_module).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def routing(self) -> Routing:
        """Everything recorded, tokens in the order in which they ran."""
        return Routing(
            torch.stack([torch.cat(parts) for parts in self._experts]).numpy(),
            torch.stack([torch.cat(parts) for parts in self._weights]).numpy(),
        )
