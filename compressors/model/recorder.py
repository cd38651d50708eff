"""Records the routing of a streamed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compressors.model.routing import Routing
from compressors.model.shape import MoeShape

__all__ = ["RoutingRecorder"]


class RoutingRecorder:
    """Give :meth:`observe` to a ``TokenGroup``, then ask for :meth:`routing`."""

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
