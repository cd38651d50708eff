"""Error feedback for every matrix of a student, from the second moments of its inputs; both writers use it.

Sums are computed a layer at a time, when the first matrix of the layer is asked for, so layers are best taken in order.
An expert's sums are computed in the thread that quantizes the expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from compressors.calibration.second_moments import ExpertInputs, LayerMoments, SecondMoments
from compressors.model.description.roles import Role
from compressors.quantize.feedback import Feedback, conditioned

__all__ = ["EmbeddingGradient", "ExpertFeedback", "StudentFeedback"]


@dataclass(frozen=True)
class EmbeddingGradient:
    """Gradient moments that weigh the errors of an embedding where it is looked up; a tied one is also the head."""

    moments_DD: torch.Tensor  # float32: the mean of g g^T, g the gradient of log p(text) at the rows looked up
    kappa: float  # the mean squared gradient at the head's products, which weighs the head's moments beside these


class ExpertFeedback:
    """The feedback of one layer's experts; it may be asked in any thread."""

    def __init__(self, inputs: ExpertInputs) -> None:
        self._inputs = inputs

    def gate_up(self, expert: int) -> Feedback:
        """The feedback of gate and up, whose inputs are rows of the layer's inputs."""
        moments = self._inputs.gate_up(expert)
        return Feedback.of(conditioned(moments.mean_NN, moments.n_tokens, self._inputs.all_tokens.mean_NN))

    def down(self, expert: int, *of_inputs: torch.Tensor) -> Feedback:
        """The feedback of down, whose inputs are the expert's own neurons, made from gate and up, or from up alone."""
        moments = self._inputs.down(expert, *of_inputs)
        return Feedback.of(conditioned(moments.mean_NN, moments.n_tokens, None))


class StudentFeedback:
    """The feedback of a student's matrices.

    Args:
        moments: the student's second moments.
        tied: True if the embedding is the head.
        gradient: the embedding's; with None, a tied embedding is treated as a head, any other gets no feedback.
        remove: removes the stored inputs of a layer, or of the head as number L, after their last use; None: they stay.
    """

    def __init__(
        self,
        moments: SecondMoments,
        *,
        tied: bool,
        gradient: EmbeddingGradient | None = None,
        remove: Callable[[int], None] | None = None,
    ) -> None:
        self._moments = moments
        self._tied = tied
        self._gradient = gradient
        self._remove = remove
        self._found: dict[Role, Feedback] = {}  # for the part of the model that was last asked for
        self._layer: tuple[int, LayerMoments] | None = None

    def matrix(self, role: Role, layer: int | None) -> Feedback | None:
        """The feedback of a matrix outside of experts; None if nothing is known about its inputs.

        Raises:
            InputError: the stored inputs, or weights, cannot be read, or give values that are not finite.
        """
        if role is Role.TOKEN_EMBEDDING or role is Role.HEAD:
            return self._of_vocabulary(role)
        tensor = self._moments.spec.tensor(role, layer)
        if layer is None or tensor.is_per_expert or not tensor.is_quantizable:
            return None
        moments = self._of_layer(layer).matrices[tensor.input_role]
        if tensor.input_role not in self._found:
            self._found[tensor.input_role] = Feedback.of(conditioned(moments.mean_NN, moments.n_tokens, None))
        return self._found[tensor.input_role]

    def experts(self, layer: int) -> ExpertFeedback:
        """The feedback of a layer's experts. The errors are those of :meth:`matrix`."""
        inputs = self._of_layer(layer).experts
        assert inputs is not None, f"layer {layer} has no experts"
        return ExpertFeedback(inputs)

    def release(self, layer: int | None) -> Callable[[], None] | None:
        """Returns the function to call when all matrices of a layer are written, or with None all outside of layers.

        Returns:
            None if nothing is to be done then.
        """
        number = self._moments.spec.n_layers if layer is None else layer
        is_behind = layer is not None and layer >= self._moments.spec.n_layers  # its inputs were never kept
        return None if self._remove is None or is_behind else partial(self._remove, number)

    def forget(self) -> None:
        """Frees the memory of what was found for the part of the model that was last asked for."""
        self._layer, self._found = None, {}

    def _of_layer(self, layer: int) -> LayerMoments:
        if self._layer is None or self._layer[0] != layer:
            self._layer = None  # its memory is needed
            self._found = {}
            self._layer = layer, self._moments.layer(layer)
        return self._layer[1]

    def _of_vocabulary(self, role: Role) -> Feedback | None:
        if role not in self._found:
            moments_DD = self._vocabulary_moments(role)
            if moments_DD is None:
                return None
            self._layer, self._found = None, {role: Feedback.of(moments_DD)}
        return self._found[role]

    def _vocabulary_moments(self, role: Role) -> torch.Tensor | None:
        """The moments for embedding or head; quantizing a tied matrix moves both states and logits."""
        gradient = self._gradient
        is_head = role is Role.HEAD or self._tied
        head_DD = self._moments.head().mean_NN if is_head else None
        if gradient is None or role is Role.HEAD:
            return head_DD
        return gradient.moments_DD if head_DD is None else gradient.moments_DD + gradient.kappa * head_DD
