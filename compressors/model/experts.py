"""Running the chosen experts on their tokens: tokens grouped by expert, one expert's weights and activations at a time.

Plugged into transformers' MoE blocks through its experts interface, so one function serves every family whose experts
module holds ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F]. Weights stay in storage dtype and are converted
one expert at a time when the activations have another.

Letters: n tokens of one expert, S = T * K choices of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["GROUPED_EXPERTS", "ExpertObserver", "register_grouped_experts"]

GROUPED_EXPERTS = "moe_export_grouped"


class ExpertObserver(Protocol):
    """Sees what one expert did with its tokens. The tensors are overwritten afterwards: keep sums, not them."""

    def __call__(self, expert: int, gates_n: torch.Tensor, hidden_nF: torch.Tensor, outputs_nD: torch.Tensor) -> None:
        """Gate weights, intermediate activations and raw (ungated) outputs of ``expert``."""


def register_grouped_experts() -> None:
    """Makes :data:`GROUPED_EXPERTS` known to transformers; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, _experts_forward)


def _experts_forward(
    experts: nn.Module, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """transformers' experts interface: the gate-weighted sum of the chosen experts' outputs, [T, D]."""
    output_TD: torch.Tensor = _GroupedExperts.apply(hidden_TD, gates_TK, chosen_TK, experts)  # type: ignore[no-untyped-call]
    return output_TD


class _GroupedExperts(torch.autograd.Function):
    """The gradient with respect to inputs and gates; experts' weights are constants.

    Of the activations only the first product is kept for backward: the gradient of a gate, <dL/dy, down h>, equals
    <down^T dL/dy, h>, so backward needs no expert's output, and a product less than running the expert again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, chosen_TK: torch.Tensor, experts: nn.Module
    ) -> torch.Tensor:
        keeps = any(ctx.needs_input_grad)
        weights = _ExpertWeights(experts, hidden_TD)
        observer: ExpertObserver | None = getattr(experts, "observer", None)
        output_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        kept: list[torch.Tensor] = []
        for choice in _choices_by_expert(chosen_TK, weights.pads):
            inputs_nD = hidden_TD.index_select(0, choice.padded_tokens)
            gate_up_n2F = inputs_nD @ weights.gate_up(choice.expert).T
            hidden_nF = _activate(experts, gate_up_n2F)
            outputs_nD = (hidden_nF @ weights.down(choice.expert).T)[: choice.n]
            gates_n = gates_TK[choice.tokens, choice.slots]
            if observer is not None:
                observer(choice.expert, gates_n, hidden_nF[: choice.n], outputs_nD)
            output_TD.index_add_(0, choice.tokens, outputs_nD * gates_n[:, None].float())
            if keeps:
                kept.append(gate_up_n2F)
        if keeps:
            ctx.save_for_backward(gates_TK, chosen_TK, *kept)
            ctx.experts = experts
        return output_TD.to(hidden_TD.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (gradient_TD,) = gradients
        gates_TK, chosen_TK, *kept = ctx.saved_tensors
        weights = _ExpertWeights(ctx.experts, gradient_TD)
        hidden_gradient_TD = torch.zeros_like(gradient_TD, dtype=torch.float32)
        gates_gradient_TK = torch.zeros_like(gates_TK)
        for choice, gate_up_n2F in zip(_choices_by_expert(chosen_TK, weights.pads), kept, strict=True):
            pulled_nF = gradient_TD.index_select(0, choice.padded_tokens) @ weights.down(choice.expert)
            gates_n = torch.zeros(len(pulled_nF), dtype=gates_TK.dtype, device=gates_TK.device)
            gates_n[: choice.n] = gates_TK[choice.tokens, choice.slots]
            with torch.enable_grad():
                gate_up_n2F = gate_up_n2F.detach().requires_grad_()
                hidden_nF = _activate(ctx.experts, gate_up_n2F)
                (gate_up_gradient,) = torch.autograd.grad(hidden_nF, gate_up_n2F, pulled_nF * gates_n[:, None])
            input_gradient_nD = (gate_up_gradient @ weights.gate_up(choice.expert))[: choice.n]
            hidden_gradient_TD.index_add_(0, choice.tokens, input_gradient_nD.float())
            gate_gradient_n = (pulled_nF.float() * hidden_nF.detach()).sum(-1)
            gates_gradient_TK[choice.tokens, choice.slots] = gate_gradient_n[: choice.n].to(gates_TK.dtype)
        return hidden_gradient_TD.to(gradient_TD.dtype), gates_gradient_TK, None, None


class _ExpertWeights:
    """The experts' weights in the dtype of the activations."""

    def __init__(self, experts: nn.Module, activations: torch.Tensor) -> None:
        self._gate_up = experts.get_parameter("gate_up_proj")
        self._down = experts.get_parameter("down_proj")
        self._dtype = activations.dtype
        self.pads = activations.dtype == torch.bfloat16 and activations.device.type == "cpu"

    def gate_up(self, expert: int) -> torch.Tensor:
        return self._gate_up[expert].to(self._dtype)

    def down(self, expert: int) -> torch.Tensor:
        return self._down[expert].to(self._dtype)


def _activate(experts: nn.Module, gate_up_n2F: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_n2F.chunk(2, dim=-1)
    hidden_nF: torch.Tensor = experts.act_fn(gate) * up  # type: ignore[operator]
    return hidden_nF


@dataclass(frozen=True)
class _Choice:
    """The tokens that chose one expert."""

    expert: int
    tokens: torch.Tensor  # [n]
    slots: torch.Tensor  # [n], which of its K choices the expert was
    padded_tokens: torch.Tensor  # the tokens, and then token 0 again as often as the padding wants

    @property
    def n(self) -> int:
        return len(self.tokens)


def _choices_by_expert(chosen_TK: torch.Tensor, pads: bool) -> Iterator[_Choice]:
    """The experts that were chosen, in their order.

    On a processor with matrix units every new number of rows costs tens of milliseconds, in which a kernel for this
    shape is made, as long as a product itself: so numbers are rounded up to few different ones.
    """
    n_slots = chosen_TK.shape[1]
    flat = chosen_TK.reshape(-1)
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    for expert, picks in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        tokens = picks // n_slots
        padding = -len(tokens) % (16 if len(tokens) <= 128 else 64) if pads else 0
        padded = torch.cat([tokens, tokens.new_zeros(padding)]) if padding else tokens
        yield _Choice(expert, tokens, picks % n_slots, padded)
