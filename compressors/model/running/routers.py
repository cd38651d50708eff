"""Watches routers, and the calls of experts, in any family's layers.

Routers' own outputs differ from family to family. Their input is the same everywhere, and so is the call of the
experts: (hidden states, chosen experts, weights). So logits are computed here, once more, from the router's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressors.model.description.feed_forward import Routed

__all__ = ["RoutedCall", "logits", "rerouting", "watching"]


@dataclass(frozen=True)
class RoutedCall:
    """One call of a layer's experts."""

    logits_TE: torch.Tensor  # float32, a router's own bias included
    router_input_TD: torch.Tensor  # multiplied by the router's matrix: the experts' input, unless it has its own norm
    hidden_TD: torch.Tensor  # the experts' input
    chosen_TK: torch.Tensor  # int64, as transformers chose
    weights_TK: torch.Tensor  # as they are applied
    bias_E: torch.Tensor | None = None  # float32, added for the choice only
    scale_E: torch.Tensor | None = None  # float32, multiplies the weights


@contextmanager
def rerouting(layer: nn.Module, routed: Routed, choose: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Lets another choice of experts take the place of the router's while the context lasts.

    The weights follow the model's own rule.

    Args:
        layer: transformers' decoder layer.
        routed: its description.
        choose: makes the choice, int64 [T, n], from the logits [T, E].
    """

    def reroute(call: RoutedCall) -> tuple[torch.Tensor, ...]:
        chosen_Tn = choose(call.logits_TE.detach())
        return call.hidden_TD, chosen_Tn, routed.routing.torch_weights(call.logits_TE, chosen_Tn, call.scale_E)

    with watching(layer, routed, reroute):
        yield


@contextmanager
def watching(
    layer: nn.Module, routed: Routed, see: Callable[[RoutedCall], tuple[torch.Tensor, ...] | None]
) -> Iterator[None]:
    """Shows every call of a layer's experts while the context lasts.

    Args:
        layer: transformers' decoder layer.
        routed: its description.
        see: is called before the experts are; its result, if not None, replaces their arguments.
    """
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    bias_E, scale_E = _vector(layer, routed.selection_bias), _vector(layer, routed.expert_scale)

    def at_router(router: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append((logits(router, inputs[0]), inputs[0].flatten(0, -2)))

    def at_experts(_experts: nn.Module, inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
        hidden_TD, chosen_TK, weights_TK = inputs
        return see(RoutedCall(*seen.pop(), hidden_TD, chosen_TK, weights_TK, bias_E, scale_E))

    handles = [
        layer.get_submodule(routed.router_module).register_forward_pre_hook(at_router),
        layer.get_submodule(routed.experts_module).register_forward_pre_hook(at_experts),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(router: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Returns a router's logits for the states that enter it, its own bias included: float32 [T, E]."""
    weight_ED, bias_E = router.weight, getattr(router, "bias", None)
    hidden_TD = hidden.reshape(-1, hidden.shape[-1]).float()
    return functional.linear(hidden_TD, weight_ED, bias_E)  # type: ignore[arg-type]


def _vector(layer: nn.Module, name: str | None) -> torch.Tensor | None:
    """A parameter or buffer with a value for each expert; some families keep it as [1, E]."""
    if name is None:
        return None
    module, _, attribute = name.rpartition(".")
    values: torch.Tensor = getattr(layer.get_submodule(module), attribute)
    return values.float().flatten()
