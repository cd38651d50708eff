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

from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord, selection_margins
from compressors.model.running.routers import RoutedCall, watching

__all__ = ["RoutingRecorder"]


class RoutingRecorder:
    """Give :meth:`observe` to a ``TokenGroup``, then ask for :meth:`routing`, or for each layer's when it is done."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._experts: dict[int, list[torch.Tensor]] = {}
        self._weights: dict[int, list[torch.Tensor]] = {}
        self._margins: dict[int, list[npt.NDArray[np.float32]]] = {}

    @contextmanager
    def observe(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches one layer's router while it runs."""
        experts, weights = self._experts.setdefault(index, []), self._weights.setdefault(index, [])
        margins = self._margins.setdefault(index, [])
        routed = self._spec.layers[index].routed

        def see(call: RoutedCall) -> None:
            assert routed is not None
            experts.append(self._padded(call.chosen_TK.to("cpu", torch.int32), NO_EXPERT))
            weights.append(self._padded(call.weights_TK.float().cpu(), 0.0))
            scores_TE = routed.routing.torch_selection_scores(call.logits_TE, call.bias_E)
            margins.append(selection_margins(scores_TE.float().cpu().numpy(), call.chosen_TK.shape[1]))

        def see_without_experts(_module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
            n_tokens = inputs[0].shape[:-1].numel()
            experts.append(self._padded(torch.empty(n_tokens, 0, dtype=torch.int32), NO_EXPERT))
            weights.append(self._padded(torch.empty(n_tokens, 0), 0.0))
            margins.append(np.full(n_tokens, np.inf, dtype=np.float32))

        if routed is not None:
            with watching(layer, routed, see):
                yield
            return
        handle = layer.register_forward_hook(see_without_experts)
        try:
            yield
        finally:
            handle.remove()

    def _padded(self, values_TK: torch.Tensor, filler: float) -> torch.Tensor:
        """Adds columns up to the number of the layer with the largest top-k."""
        return functional.pad(values_TK, (0, self._spec.top_k - values_TK.shape[1]), value=filler)

    def take(self, index: int) -> RoutingRecord:
        """Returns a finished layer's routing alone, and forgets it."""
        experts, weights = self._experts.pop(index, []), self._weights.pop(index, [])
        nothing = torch.empty(0, self._spec.top_k)
        return RoutingRecord(
            torch.cat([nothing.to(torch.int32), *experts]).numpy()[None],
            torch.cat([nothing, *weights]).numpy()[None],
            np.concatenate([np.empty(0, np.float32), *self._margins.pop(index, [])])[None],
        )

    def routing(self) -> RoutingRecord:
        """Everything recorded, tokens in the order in which they ran."""
        layers = [vars(self.take(index)) for index in range(self._spec.n_layers)]
        return RoutingRecord(**{name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]})
