"""Running the chosen experts on their tokens: tokens grouped by expert, one expert's weights and activations at a time.

Plugged into transformers' MoE blocks through its experts interface, so one function serves every family whose experts
module has ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F], and where it has biases (``has_bias``)
``gate_up_proj_bias`` [E, 2F] and ``down_proj_bias`` [E, D], always gate rows first. Without a gate (``has_gate``) it
has ``up_proj`` [E, F, D] instead, which stands here for gate and up. The function between the products is
transformers' own. Weights stay in storage dtype and are converted one expert at a time when the activations have
another. Where the module has an attribute ``trained``
(:class:`~compressors.model.running.trained_experts.TrainedExperts`), those weights stand in for its own, and get
gradients; while its own fade out, an expert's output is a mean of both.

Letters: n tokens of one expert, S = T * K choices of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from compressors.model.description.gate_order import in_turn
from compressors.model.running.trained_experts import Product, TrainedExperts

__all__ = [
    "GROUPED_EXPERTS",
    "ROWS_OF_A_PRODUCT",
    "ExpertGradientObserver",
    "ExpertObserver",
    "padded_products",
    "register_grouped_experts",
]

ROWS_OF_A_PRODUCT = 16
"""Products of fewer rows may take other paths through a library, which add in another order (measured: MKL does)."""

GROUPED_EXPERTS = "moe_export_grouped"


class ExpertObserver(Protocol):
    """Sees what one expert did with its tokens. The tensors are overwritten afterwards: keep sums, not them."""

    def __call__(self, expert: int, gates_n: torch.Tensor, hidden_nF: torch.Tensor, outputs_nD: torch.Tensor) -> None:
        """Receives gate weights, intermediate activations and raw (ungated) outputs of ``expert``."""


class ExpertGradientObserver(Protocol):
    """Sees the gradients at the outputs of one expert's matrices, its gates included: keep sums, not the tensors."""

    def __call__(self, expert: int, gate_up_gradient_n2F: torch.Tensor, down_gradient_nD: torch.Tensor) -> None:
        """Receives the gradients for the tokens that chose ``expert``, gate rows first."""


def register_grouped_experts() -> None:
    """Makes :data:`GROUPED_EXPERTS` known to transformers; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, _experts_forward)


@contextmanager
def padded_products(experts: nn.Module | None) -> Iterator[None]:
    """Makes a token's outputs independent of its company: each expert's rows are padded to multiples of 16.

    Without padding, the number of tokens that choose an expert decides how a library adds up their products.

    Args:
        experts: the experts of a layer; None: it has none.
    """
    if experts is None:
        yield
        return
    experts.pads = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del experts.pads


def _experts_forward(
    experts: nn.Module, hidden_TD: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """Implements transformers' experts interface: the gate-weighted sum of the chosen experts' outputs, [T, D]."""
    trained: TrainedExperts | None = getattr(experts, "trained", None)
    tensors = trained.tensors.values() if trained is not None and torch.is_grad_enabled() else ()
    biases = [getattr(experts, name) if getattr(experts, "has_bias", False) else None for name in _BIASES]
    output_TD: torch.Tensor = _GroupedExperts.apply(hidden_TD, gates_TK, chosen_TK, experts, *biases, *tensors)  # type: ignore[no-untyped-call]
    return output_TD


_BIASES = ("gate_up_proj_bias", "down_proj_bias")


class _GroupedExperts(torch.autograd.Function):
    """The gradient with respect to inputs, gates, biases and the tensors of trained experts; all others are constants.

    Only the first product is kept for backward: the gradient of a gate, <dL/dy, down h>, equals <down^T dL/dy, h>, and
    a bias b adds <dL/dy, b>. So backward needs no expert's output, and one product less than running the expert again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        chosen_TK: torch.Tensor,
        experts: nn.Module,
        gate_up_bias_EF: torch.Tensor | None,
        down_bias_ED: torch.Tensor | None,
        *trained: torch.Tensor,  # named for autograd; their values come with the experts
    ) -> torch.Tensor:
        keeps = any(ctx.needs_input_grad)
        weights, choices = _ExpertWeights(experts, hidden_TD), _Choices(chosen_TK, hidden_TD, experts)
        observer: ExpertObserver | None = getattr(experts, "observer", None)
        inputs_ = hidden_TD.new_empty(choices.most_rows, hidden_TD.shape[1])
        gate_up_ = hidden_TD.new_empty(choices.all_rows if keeps else choices.most_rows, weights.gate_up(0).shape[0])
        outputs_SD = hidden_TD.new_empty(choices.all_rows, hidden_TD.shape[1])
        for choice in choices:
            first = choice.start if keeps else 0
            inputs = torch.index_select(hidden_TD, 0, choice.padded_tokens, out=inputs_[: choice.n_rows])
            gate_up = torch.mm(inputs, weights.gate_up(choice.expert).T, out=gate_up_[first : first + choice.n_rows])
            _add_row(gate_up, gate_up_bias_EF, choice.expert)
            hidden = _activate(experts, gate_up)
            outputs = torch.mm(hidden, weights.down(choice.expert).T, out=outputs_SD[choice.start :][: choice.n_rows])
            _add_row(outputs, down_bias_ED, choice.expert)
            if (share := weights.share(choice.expert)) < 1.0:
                _, stored_down = stored = weights.stored_in_dtype(choice.expert)
                stored_n2F = _first_product(inputs, stored, gate_up_bias_EF, choice.expert)
                stored_nD = _activate(experts, stored_n2F) @ stored_down.T
                _add_row(stored_nD, down_bias_ED, choice.expert)
                outputs.mul_(share).add_(stored_nD, alpha=1.0 - share)
            if observer is not None:
                gates_n = gates_TK[choice.tokens, choice.slots]
                observer(choice.expert, gates_n, hidden[: choice.n], outputs[: choice.n])
        if keeps:
            ctx.save_for_backward(hidden_TD if trained else None, gates_TK, chosen_TK, gate_up_, down_bias_ED)
            biases, is_trained = (gate_up_bias_EF, down_bias_ED), ctx.needs_input_grad[4:6]
            ctx.bias_shapes = [
                bias.shape if bias is not None and needed else None
                for bias, needed in zip(biases, is_trained, strict=True)
            ]
            ctx.experts, ctx.gate_up_bias = experts, gate_up_bias_EF
        return choices.sum_by_token(outputs_SD, gates_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_TD,) = gradients
        hidden_TD, gates_TK, chosen_TK, gate_up_, down_bias_ED = ctx.saved_tensors
        weights, choices = _ExpertWeights(ctx.experts, gradient_TD), _Choices(chosen_TK, gradient_TD, ctx.experts)
        trained: TrainedExperts | None = getattr(ctx.experts, "trained", None)
        observer: ExpertGradientObserver | None = getattr(ctx.experts, "gradient_observer", None)
        sums = [] if trained is None else [torch.zeros_like(tensor) for tensor in trained.tensors.values()]
        of_gate_up_bias, of_down_bias = (
            None if shape is None else gradient_TD.new_zeros(shape) for shape in ctx.bias_shapes
        )
        input_gradients_SD = gradient_TD.new_empty(choices.all_rows, gradient_TD.shape[1])
        gates_gradient_TK = torch.zeros_like(gates_TK)
        for choice in choices:
            rows = slice(choice.start, choice.start + choice.n_rows)
            gradient_nD = gradient_TD.index_select(0, choice.padded_tokens)
            gates_n = gradient_TD.new_zeros(choice.n_rows)
            gates_n[: choice.n] = gates_TK[choice.tokens, choice.slots]
            share = weights.share(choice.expert)
            down, shared_gates_n = weights.down(choice.expert), gates_n * share
            pulled = _Pulled.back(ctx.experts, gate_up_[rows], down, gradient_nD, shared_gates_n)
            gate_up_gradient, hidden_nF = pulled.gate_up_gradient, pulled.hidden_nF
            torch.mm(gate_up_gradient, weights.gate_up(choice.expert), out=input_gradients_SD[rows])
            gate_gradient_n = share * pulled.gate_gradient_n[: choice.n]
            if share < 1.0:
                stored_gate_up, stored_down = stored = weights.stored_in_dtype(choice.expert)
                inputs_nD = hidden_TD.index_select(0, choice.padded_tokens)
                stored_n2F = _first_product(inputs_nD, stored, ctx.gate_up_bias, choice.expert)
                pulled = _Pulled.back(ctx.experts, stored_n2F, stored_down, gradient_nD, gates_n * (1.0 - share))
                input_gradients_SD[rows].addmm_(pulled.gate_up_gradient, stored_gate_up)
                gate_gradient_n = gate_gradient_n + (1.0 - share) * pulled.gate_gradient_n[: choice.n]
                if of_gate_up_bias is not None:
                    of_gate_up_bias[choice.expert] = pulled.gate_up_gradient.sum(0)
            if down_bias_ED is not None:
                bias_D = down_bias_ED[choice.expert].to(gradient_nD.dtype)
                gate_gradient_n = gate_gradient_n + gradient_nD[: choice.n] @ bias_D
            if of_gate_up_bias is not None:
                of_gate_up_bias[choice.expert] += gate_up_gradient.sum(0)
            if of_down_bias is not None:
                of_down_bias[choice.expert] = gates_n @ gradient_nD
            gates_gradient_TK[choice.tokens, choice.slots] = gate_gradient_n.to(gates_TK.dtype)
            if observer is not None:
                down_gradient_nD = gradient_nD[: choice.n] * gates_n[: choice.n, None]
                observer(choice.expert, gate_up_gradient[: choice.n], down_gradient_nD)
            if trained is not None and choice.expert in trained.experts:  # gates of padding are zero
                inputs_nD = hidden_TD.index_select(0, choice.padded_tokens)
                gate_up, down = weights.stored(choice.expert)
                of_gate_up = Product(gate_up_gradient, inputs_nD, gate_up)
                of_down = Product(gradient_nD * shared_gates_n[:, None], hidden_nF, down)
                trained.add_gradients(sums, choice.expert, of_gate_up, of_down)
        of_biases = (of_gate_up_bias, of_down_bias)
        return choices.sum_by_token(input_gradients_SD), gates_gradient_TK, None, None, *of_biases, *sums


@dataclass(frozen=True)
class _Pulled:
    """A gradient, pulled back through one expert."""

    hidden_nF: torch.Tensor
    gate_up_gradient: torch.Tensor  # [n, 2F]
    gate_gradient_n: torch.Tensor  # without the share and the bias of the output

    @classmethod
    def back(
        cls,
        experts: nn.Module,
        gate_up_n2F: torch.Tensor,
        down_DF: torch.Tensor,
        gradient_nD: torch.Tensor,
        gates_n: torch.Tensor,
    ) -> _Pulled:
        """Pulls the gradient of a sum of gated outputs back to the first products, which are given."""
        pulled_nF = gradient_nD @ down_DF
        with torch.enable_grad():
            gate_up = gate_up_n2F.detach().requires_grad_()
            hidden_nF = _activate(experts, gate_up)
            (gate_up_gradient,) = torch.autograd.grad(hidden_nF, gate_up, pulled_nF * gates_n[:, None])
        hidden_nF = hidden_nF.detach()
        return cls(hidden_nF, gate_up_gradient, (pulled_nF * hidden_nF).sum(-1))


class _ExpertWeights:
    """The experts' weights in the dtype of the activations; trained ones take the place of stored ones."""

    def __init__(self, experts: nn.Module, activations: torch.Tensor) -> None:
        self._gate_up = experts.get_parameter("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj")
        self._down = experts.get_parameter("down_proj")
        self._trained: TrainedExperts | None = getattr(experts, "trained", None)
        self._dtype = activations.dtype

    def stored(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert's stored matrices, gate and up, then down; trained ones may take their place."""
        return self._gate_up[expert], self._down[expert]

    def stored_in_dtype(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices of :meth:`stored` in the dtype of the activations."""
        return self._gate_up[expert].to(self._dtype), self._down[expert].to(self._dtype)

    def share(self, expert: int) -> float:
        """The share of the trained matrices in the expert's output; below 1 the stored ones have the rest."""
        return 1.0 if self._trained is None else self._trained.share(expert)

    def gate_up(self, expert: int) -> torch.Tensor:
        stored = self._gate_up[expert]
        return (stored if self._trained is None else self._trained.gate_up_weight(expert, stored)).to(self._dtype)

    def down(self, expert: int) -> torch.Tensor:
        stored = self._down[expert]
        return (stored if self._trained is None else self._trained.down_weight(expert, stored)).to(self._dtype)


def _first_product(
    inputs_nD: torch.Tensor, matrices: tuple[torch.Tensor, torch.Tensor], bias_EF: torch.Tensor | None, expert: int
) -> torch.Tensor:
    """The inputs' product with gate and up, [n, 2F], biases included."""
    product_n2F = inputs_nD @ matrices[0].T
    _add_row(product_n2F, bias_EF, expert)
    return product_n2F


def _add_row(products_nO: torch.Tensor, bias_EO: torch.Tensor | None, expert: int) -> None:
    """Adds the expert's bias, if its family has any, in place."""
    if bias_EO is not None:
        products_nO.add_(bias_EO[expert].to(products_nO.dtype))


def _activate(experts: nn.Module, gate_up_n2F: torch.Tensor) -> torch.Tensor:
    """Applies transformers' function between the products, which may expect each gate beside its up."""
    if not getattr(experts, "has_gate", True):
        activated_nF: torch.Tensor = experts.act_fn(gate_up_n2F)  # type: ignore[operator]
        return activated_nF
    if not getattr(experts, "is_concatenated", True):
        gate_up_n2F = in_turn(gate_up_n2F)
    hidden_nF: torch.Tensor = experts._apply_gate(gate_up_n2F)  # type: ignore[operator]
    return hidden_nF


@dataclass(frozen=True)
class _Choice:
    """The tokens that chose one expert; their rows begin at ``start`` of all choices' rows, sorted by expert."""

    expert: int
    start: int
    tokens: torch.Tensor  # [n]
    slots: torch.Tensor  # [n], the expert's place among the token's K choices
    padded_tokens: torch.Tensor  # the tokens, then token 0 as often as padding is needed

    @property
    def n(self) -> int:
        return len(self.tokens)

    @property
    def n_rows(self) -> int:
        """Rows with padding. The padding of one expert overlaps the rows of the next, which are written later."""
        return len(self.padded_tokens)


class _Choices:
    """All choices of all tokens, grouped by expert.

    In bfloat16 on a processor, every new number of rows costs tens of milliseconds, as long as a product itself,
    because a kernel is made for its shape. So the numbers of rows are rounded up to a few different ones; elsewhere
    this happens only within :func:`padded_products`.
    """

    def __init__(self, chosen_TK: torch.Tensor, activations: torch.Tensor, experts: nn.Module) -> None:
        self._chosen_TK = chosen_TK
        makes_kernels = activations.dtype == torch.bfloat16 and activations.device.type == "cpu"
        self._pads = makes_kernels or getattr(experts, "pads", False)
        self._order = chosen_TK.reshape(-1).argsort(stable=True)
        chosen, counts = chosen_TK.reshape(-1)[self._order].unique_consecutive(return_counts=True)
        self._experts: list[int] = chosen.tolist()
        self._counts: list[int] = counts.tolist()

    @property
    def most_rows(self) -> int:
        """The number of rows of the most chosen expert."""
        return max((count + self._padding(count) for count in self._counts), default=0)

    @property
    def all_rows(self) -> int:
        """Rows of all choices, and room for the padding of the last."""
        return len(self._order) + max((self._padding(count) for count in self._counts), default=0)

    def __iter__(self) -> Iterator[_Choice]:
        n_slots, start = self._chosen_TK.shape[1], 0
        for expert, picks in zip(self._experts, self._order.split(self._counts), strict=True):
            tokens = picks // n_slots
            padding = tokens.new_zeros(self._padding(len(tokens)))
            yield _Choice(expert, start, tokens, picks % n_slots, torch.cat([tokens, padding]))
            start += len(tokens)

    def sum_by_token(self, rows_SD: torch.Tensor, gates_TK: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of each token's K choices' rows, weighted with its gates if these are given: [T, D]."""
        rows_of_choices = torch.empty_like(self._order)
        rows_of_choices[self._order] = torch.arange(len(self._order), device=self._order.device)
        return functional.embedding_bag(
            rows_of_choices.view_as(self._chosen_TK),
            rows_SD,
            per_sample_weights=None if gates_TK is None else gates_TK.to(rows_SD.dtype),
            mode="sum",
        )

    def _padding(self, n_tokens: int) -> int:
        return -n_tokens % (ROWS_OF_A_PRODUCT if n_tokens <= 128 else 64) if self._pads else 0
