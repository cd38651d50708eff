"""Another choice of experts than a router's top-k: for teachers whose unchosen experts shall speak too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from compressors.model.description.shape import MoeShape

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
            tokens: which of all tokens of the pass these are.
            logits_TE: their router logits, float32.

        Returns:
            int64 [T, n_chosen], each row without repetition.
        """


class AllExperts:
    """Every token uses every expert: what ``num_experts_per_tok`` equal to the number of experts does."""

    def __init__(self, n_experts: int) -> None:
        self.n_chosen = n_experts

    def __call__(self, layer: int, tokens: slice, logits_TE: torch.Tensor) -> torch.Tensor:
        """All experts in order."""
        return torch.arange(self.n_chosen, device=logits_TE.device).expand(len(logits_TE), -1)


@contextmanager
def choosing(choice: ExpertChoice, shape: MoeShape, index: int, layer: nn.Module) -> Iterator[None]:
    """Lets ``choice`` take the place of a decoder layer's top-k while the context lasts.

    The gates follow the model's own rule: a softmax over all experts and, where the model normalises
    (:attr:`~compressors.model.description.shape.MoeShape.normalize_top_k`), divided by the sum over the chosen, which
    is the softmax over their logits alone; elsewhere the share of those that were not chosen is missing. The gradient
    reaches the router through all of them.

    Args:
        choice: what chooses.
        shape: the model's.
        index: the layer's.
        layer: transformers' decoder layer, which has experts. It runs over all tokens of a pass in order.
    """
    n_seen = 0

    def hook(_router: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal n_seen
        logits_TE = outputs[0]
        tokens = slice(n_seen, n_seen + len(logits_TE))
        n_seen = tokens.stop
        chosen_TK = choice(index, tokens, logits_TE.detach())
        gates_TK = logits_TE.softmax(-1).gather(-1, chosen_TK)
        if shape.normalize_top_k:
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
        return logits_TE, gates_TK, chosen_TK

    handle = layer.get_submodule(shape.family.router_module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
