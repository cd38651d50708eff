"""Running the chosen experts on their tokens: tokens grouped by expert, one expert widened to float32 at a time.

Plugged into transformers' MoE blocks through its experts interface, so one function serves every family whose experts
module holds ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

__all__ = ["GROUPED_EXPERTS", "ExpertObserver", "register_grouped_experts"]

GROUPED_EXPERTS = "moe_export_grouped"


class ExpertObserver(Protocol):
    """Sees what one expert did with its tokens (n of them)."""

    def __call__(
        self,
        expert: int,
        inputs_nD: torch.Tensor,
        gates_n: torch.Tensor,
        hidden_nF: torch.Tensor,
        outputs_nD: torch.Tensor,
    ) -> None:
        """Inputs, gate weights, intermediate activations and raw (ungated) outputs of ``expert``."""


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
    """Forward keeps no activation; backward runs each expert again and differentiates it alone.

    So a layer's backward needs one expert's activations at a time, not all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, gates_TK: torch.Tensor, chosen_TK: torch.Tensor, experts: nn.Module
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TD, gates_TK, chosen_TK)
        ctx.experts = experts
        observer: ExpertObserver | None = getattr(experts, "observer", None)
        output_TD = torch.zeros_like(hidden_TD)
        for expert, tokens, slots in _tokens_by_expert(chosen_TK):
            inputs = hidden_TD[tokens]
            gates = gates_TK[tokens, slots]
            intermediate, outputs = _run_expert(experts, expert, inputs)
            if observer is not None:
                observer(expert, inputs, gates, intermediate, outputs)
            output_TD.index_add_(0, tokens, outputs * gates[:, None])
        return output_TD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (gradient_TD,) = gradients
        hidden_TD, gates_TK, chosen_TK = ctx.saved_tensors
        hidden_gradient_TD = torch.zeros_like(hidden_TD)
        gates_gradient_TK = torch.zeros_like(gates_TK)
        for expert, tokens, slots in _tokens_by_expert(chosen_TK):
            output_gradient = gradient_TD[tokens]
            gates = gates_TK[tokens, slots]
            with torch.enable_grad():
                inputs = hidden_TD[tokens].requires_grad_()
                _, outputs = _run_expert(ctx.experts, expert, inputs)
                (input_gradient,) = torch.autograd.grad(outputs, inputs, output_gradient * gates[:, None])
            hidden_gradient_TD.index_add_(0, tokens, input_gradient)
            gates_gradient_TK[tokens, slots] = (output_gradient * outputs.detach()).sum(-1)
        return hidden_gradient_TD, gates_gradient_TK, None, None


def _run_expert(experts: nn.Module, expert: int, inputs_nD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Intermediate activations [n, F] and raw outputs [n, D] of one expert, in the inputs' dtype."""
    gate_up = experts.get_parameter("gate_up_proj")[expert].to(inputs_nD.dtype)
    down = experts.get_parameter("down_proj")[expert].to(inputs_nD.dtype)
    gate, up = functional.linear(inputs_nD, gate_up).chunk(2, dim=-1)
    intermediate: torch.Tensor = experts.act_fn(gate) * up  # type: ignore[operator]
    return intermediate, functional.linear(intermediate, down)


def _tokens_by_expert(chosen_TK: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each expert that was chosen: its index, its tokens, and in which of their K slots it stands."""
    n_slots = chosen_TK.shape[1]
    flat = chosen_TK.reshape(-1)
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    for expert, picks in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
        yield expert, picks // n_slots, picks % n_slots
