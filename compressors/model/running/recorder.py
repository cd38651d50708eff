"""Records the routing of a streamed model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from compressors.model.description.shape import MoeShape
from compressors.model.predictions.routing import NO_EXPERT, Routing, selection_margins

__all__ = ["RoutingRecorder"]


class RoutingRecorder:
    """Give :meth:`observe` to a ``TokenGroup``, then ask for :meth:`routing`, or for each layer's when it is done."""

    def __init__(self, shape: MoeShape) -> None:
        self._shape = shape
        self._experts: dict[int, list[torch.Tensor]] = {}
        self._weights: dict[int, list[torch.Tensor]] = {}
        self._margins: dict[int, list[npt.NDArray[np.float32]]] = {}

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer's router while it runs."""
        experts, weights = self._experts.setdefault(index, []), self._weights.setdefault(index, [])
        margins = self._margins.setdefault(index, [])

        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            logits_TE, weights_TK, experts_TK = outputs
            experts.append(self._padded(experts_TK.to("cpu", torch.int32), NO_EXPERT))
            weights.append(self._padded(weights_TK.float().cpu(), 0.0))
            margins.append(selection_margins(logits_TE.float().cpu().numpy(), experts_TK.shape[1]))

        def hook_without_router(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
            n_tokens = inputs[0].shape[:-1].numel()
            experts.append(self._padded(torch.empty(n_tokens, 0, dtype=torch.int32), NO_EXPERT))
            weights.append(self._padded(torch.empty(n_tokens, 0), 0.0))
            margins.append(np.full(n_tokens, np.inf, dtype=np.float32))

        if self._shape.layer(index).has_moe:
            handle = layer.get_submodule(self._shape.family.router_module).register_forward_hook(hook)
        else:
            handle = layer.register_forward_hook(hook_without_router)
        try:
            yield
        finally:
            handle.remove()

    def _padded(self, values_TK: torch.Tensor, filler: float) -> torch.Tensor:
        """As many columns as the layer with the largest top-k has."""
        return functional.pad(values_TK, (0, self._shape.top_k - values_TK.shape[1]), value=filler)

    def take(self, index: int) -> Routing:
        """A finished layer's routing, the only one in it; the recorder forgets it."""
        experts, weights = self._experts.pop(index, []), self._weights.pop(index, [])
        nothing = torch.empty(0, self._shape.top_k)
        return Routing(
            torch.cat([nothing.to(torch.int32), *experts]).numpy()[None],
            torch.cat([nothing, *weights]).numpy()[None],
            np.concatenate([np.empty(0, np.float32), *self._margins.pop(index, [])])[None],
        )

    def routing(self) -> Routing:
        """Everything recorded, tokens in the order in which they ran."""
        layers = [vars(self.take(index)) for index in range(self._shape.n_layers)]
        return Routing(**{name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]})
