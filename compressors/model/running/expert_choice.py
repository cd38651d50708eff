"""Replaces a router's top-k by another choice of experts, for teachers whose unchosen experts should contribute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from compressors.model.description.spec import LayerSpec
from compressors.model.running.routers import rerouting

__all__ = ["AllExperts", "ExpertChoice", "choosing"]


class ExpertChoice(Protocol):
    """Says which experts each token uses."""

    @property
    def n_chosen(self) -> int:
        """Experts of each token."""

    def __call__(self, layer: int, tokens: slice, logits_TE: torch.Tensor) -> torch.Tensor:
        """The choice of some tokens in one layer.

        Args:
            layer: index of the decoder layer.
            tokens: the place of these tokens among all tokens of the pass.
            logits_TE: their router logits, float32.

        Returns:
            int64 [T, n_chosen], each row without repetition.
        """


class AllExperts:
    """Every token uses every expert, as if ``num_experts_per_tok`` were the number of experts."""

    def __init__(self, n_experts: int) -> None:
        self.n_chosen = n_experts

    def __call__(self, layer: int, tokens: slice, logits_TE: torch.Tensor) -> torch.Tensor:
        """All experts in order."""
        return torch.arange(self.n_chosen, device=logits_TE.device).expand(len(logits_TE), -1)


@contextmanager
def choosing(choice: ExpertChoice, layer: LayerSpec, index: int, module: nn.Module) -> Iterator[None]:
    """Lets ``choice`` take the place of a decoder layer's top-k while the context lasts.

    The gates follow the model's own rule (:meth:`~compressors.model.description.routing.Routing.torch_weights`): where
    it normalises they sum to one over the chosen experts; elsewhere the share of the others is missing.
    The gradient reaches the router through all of them.

    Args:
        choice: makes the choice.
        layer: the layer's description; it has experts.
        index: the layer's index.
        module: transformers' decoder layer. It runs over all tokens of a pass in order.
    """
    n_seen = 0

    def choose(logits_TE: torch.Tensor) -> torch.Tensor:
        nonlocal n_seen
        tokens = slice(n_seen, n_seen + len(logits_TE))
        n_seen = tokens.stop
        return choice(index, tokens, logits_TE)

    assert layer.routed is not None
    with rerouting(module, layer.routed, choose):
        yield
