"""Measures in one streamed backward pass how much the output suffers from errors in each matrix.

At every position a token is drawn from the model's own prediction, and the gradient of its log-probability flows back
through stored layer inputs; hooks sum its squares at the outputs of all linear layers. Positions of one sequence count
one by one: their gradients are never added up before they are squared. The cost is a forward pass and a backward pass
that runs every layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressors.calibration.sizes import matrices_beside_experts
from compressors.calibration.statistics import LayerStatistics, StatisticsCollector
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.predictions.next_token import draw_tokens, random_numbers
from compressors.model.running.gradients import Head, embedding_gradient
from compressors.model.running.memory import MemoryLimit
from compressors.model.running.streaming import StreamedModel
from compressors.model.sources.student import Student
from compressors.sensitivity.matrices import MatrixSensitivity, Sensitivities, VocabularySensitivities

__all__ = ["gather_sensitivities"]

_DRAWN_AT_ONCE = 32  # positions: drawing needs several arrays of their logits in double precision


def gather_sensitivities(
    student: Student,
    tokens_BT: torch.Tensor,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    limit: MemoryLimit | None = None,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sensitivities:
    """Runs the model over these blocks, forward and backward, and writes the sensitivities into ``folder``.

    Args:
        student: the model, mostly the teacher.
        tokens_BT: int64; 2,000 to 4,000 tokens are enough.
        folder: gets a file for each layer, and one for embedding and head.
        seed: seed of the drawn tokens; equal seeds give equal files.
        dtype: the dtype of the arithmetic.
        limit: memory that this process may use.
        device: the device on which layers compute.
        progress: called with 1 twice for each layer, once in each direction.

    Raises:
        InputError: the checkpoint cannot be read, or gives values that are not finite.
    """
    model = StreamedModel(student, limit=limit, device=device)
    sensitivities = Sensitivities(folder, student.spec.tied_embeddings)
    layers = _Layers(student.spec, sensitivities, tokens_BT.numel(), progress or (lambda _n: None), device)
    head = _HeadSums(model, tokens_BT, seed)
    gradient_BTD = embedding_gradient(
        model, tokens_BT, head.loss, dtype, [layers.observe_forward], [layers.observe_backward]
    )
    model.release()
    sensitivities.save_vocabulary(head.with_lookup(gradient_BTD.float(), tokens_BT))
    return sensitivities


class _Layers:
    """Sums squared inputs in the forward pass and squared gradients in the backward pass, a layer at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        sensitivities: Sensitivities,
        n_tokens: int,
        progress: Callable[[int], None],
        device: torch.device | None,
    ) -> None:
        self._spec = spec
        self._sensitivities = sensitivities
        self._n_tokens = n_tokens
        self._progress = progress
        self._device = device
        self._collector = StatisticsCollector(spec, device)

    @contextmanager
    def observe_forward(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches a layer's inputs."""
        with self._collector.observe(index, layer):
            yield
        self._progress(1)

    @contextmanager
    def observe_backward(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Watches the gradients at a layer's matrices, and writes the layer's file when they are complete."""
        described = self._spec.layers[index]
        sums = _GradientSums(described, self._device)
        handles = [
            layer.get_submodule(tensor.submodule).register_forward_hook(_on_output(sums.of_matrix[tensor.role]))
            for tensor in matrices_beside_experts(described)
        ]
        experts = None if described.routed is None else layer.get_submodule(described.routed.experts_module)
        if experts is not None:
            experts.gradient_observer = sums.of_expert  # type: ignore[assignment]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if experts is not None:
                del experts.gradient_observer
        inputs = _mean_squared_inputs(self._collector.take(index), described)
        rows = {role: (total_MO / self._n_tokens).float().cpu() for role, total_MO in sums.by_role().items()}
        found = {role: MatrixSensitivity(rows[role][:, None], inputs[role][:, None]) for role in rows}
        self._sensitivities.save_layer(index, found)
        self._progress(1)


class _GradientSums:
    """Sums over tokens of squared gradients at the outputs of one layer's matrices, float64."""

    def __init__(self, layer: LayerSpec, device: torch.device | None) -> None:
        def zeros(*sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device=device)

        matrices = matrices_beside_experts(layer)
        self.of_matrix = {tensor.role: zeros(layer.dimensions(tensor)[0]) for tensor in matrices}
        self._input_roles = () if layer.routed is None else layer.routed.input_roles
        self._gate_up_E2F = zeros(layer.n_experts, layer.expert_input_rows)
        self._down_ED = zeros(layer.n_experts, layer.expert_size)

    def of_expert(self, expert: int, gate_up_gradient_n2F: torch.Tensor, down_gradient_nD: torch.Tensor) -> None:
        """Adds the squares of one expert's tokens."""
        self._gate_up_E2F[expert] += gate_up_gradient_n2F.float().square().sum(0)
        self._down_ED[expert] += down_gradient_nD.float().square().sum(0)

    def by_role(self) -> dict[Role, torch.Tensor]:
        """The sums by role: [M, O]."""
        found = {role: total_O[None] for role, total_O in self.of_matrix.items()}
        if len(self._down_ED):
            found |= zip(self._input_roles, self._gate_up_E2F.chunk(len(self._input_roles), dim=-1), strict=True)
            found[Role.EXPERT_DOWN] = self._down_ED
        return found


def _on_output(total_O: torch.Tensor) -> Any:
    """A hook that adds the squares of the gradient at a module's output to ``total_O``."""

    def add(gradient: torch.Tensor) -> None:
        total_O.add_(gradient.flatten(0, -2).float().square().sum(0))

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(add)

    return hook


def _mean_squared_inputs(statistics: LayerStatistics, layer: LayerSpec) -> dict[Role, torch.Tensor]:
    """E[x^2] of the inputs of a layer's matrices by role: float32 [M, I]."""
    found = {tensor.role: statistics.mean_input_squares(tensor)[None] for tensor in matrices_beside_experts(layer)}
    if layer.routed is not None:
        counts_E1 = statistics.count_E[:, None].clamp_min(1)
        of_inputs = (statistics.gate_up_input_square_ED / counts_E1).float()
        found |= dict.fromkeys(layer.routed.input_roles, of_inputs)
        found[Role.EXPERT_DOWN] = (statistics.down_input_square_EF / counts_E1).float()
    return found


class _HeadSums:
    """Computes the loss, and sums squares at the head over its positions."""

    def __init__(self, model: StreamedModel, tokens_BT: torch.Tensor, seed: int) -> None:
        self._model = model
        self._n_tokens = tokens_BT.numel()
        self._uniform_N = random_numbers((seed,), self._n_tokens)
        size, device = model.spec.hidden_size, model.device
        self._uncertainty_V = torch.zeros(model.spec.vocab_size, dtype=torch.float64, device=device)
        self._input_moments_DD = torch.zeros(size, size, dtype=torch.float64, device=device)

    def loss(self, positions: slice, states_nD: torch.Tensor, head: Head) -> torch.Tensor:
        """The summed negative log-likelihood of a token that is drawn at each position."""
        logits_nV = head(states_nD).float()
        with torch.no_grad():
            self._add(states_nD)
            drawn = [
                draw_tokens(part, uniform.to(part.device))
                for part, uniform in zip(
                    logits_nV.detach().split(_DRAWN_AT_ONCE),
                    self._uniform_N[positions].split(_DRAWN_AT_ONCE),
                    strict=True,
                )
            ]
            for part in logits_nV.detach().split(_DRAWN_AT_ONCE):
                probability = part.softmax(-1)
                uncertainty = probability - probability.square()
                if (cap := self._model.spec.logit_cap) is not None:
                    uncertainty *= (1 - (part / cap).square()).square()  # logits move less than what is capped
                self._uncertainty_V += uncertainty.sum(0)
        return functional.cross_entropy(logits_nV, torch.cat(drawn), reduction="sum")

    def with_lookup(self, gradient_BTD: torch.Tensor, tokens_BT: torch.Tensor) -> VocabularySensitivities:
        """Adds what the gradients at the states that enter the first layer tell."""
        spec = self._model.spec
        gradient_TD, tokens_T = gradient_BTD.flatten(0, 1).double() * spec.embedding_scale, tokens_BT.flatten()
        moments_DD = gradient_TD.T @ gradient_TD / self._n_tokens
        lookups_V = torch.zeros(spec.vocab_size, dtype=torch.float64)
        lookups_V.index_add_(0, tokens_T, gradient_TD.square().sum(-1) / self._n_tokens)
        head_rows_V = self._uncertainty_V.cpu() / self._n_tokens / spec.logit_divisor**2
        input_moments_DD = self._input_moments_DD.cpu() / self._n_tokens
        return VocabularySensitivities(
            lookup_rows_V=lookups_V.float(),
            lookup_columns_D=(moments_DD.diagonal() / moments_DD.trace().clamp_min(1e-300)).float(),
            head_rows_V=head_rows_V.float(),
            head_columns_D=input_moments_DD.diagonal().float(),
            embedding_gradient_moments=moments_DD.float(),
            head_input_moments=input_moments_DD.float(),
            kappa=head_rows_V.sum().float(),
        )

    def _add(self, states_nD: torch.Tensor) -> None:
        inputs_nD = self._model.head_inputs(states_nD).float()
        self._input_moments_DD += inputs_nD.T @ inputs_nD
