"""Error feedback for every matrix of a student, from the second moments of its inputs; both writers use it.

Sums are made a layer at a time, when the first matrix of the layer is asked for, so layers are best taken in order.
An expert's sums are made in the thread that quantizes the expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compressors.calibration.layer_inputs import KEPT_TOKENS
from compressors.calibration.second_moments import (
    ROWS_AT_ONCE,
    TOKENS_AT_ONCE,
    ExpertInputs,
    LayerMoments,
    SecondMoments,
)
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.quantize.feedback import Feedback, conditioned

__all__ = ["EmbeddingGradient", "ExpertFeedback", "StudentFeedback", "least_feedback_bytes", "threads_within"]

_ATTENTION = (Role.QUERY, Role.KEY, Role.VALUE)


@dataclass(frozen=True)
class EmbeddingGradient:
    """Gradient moments that weigh the errors of an embedding where it is looked up; a tied one is also the head."""

    moments_DD: torch.Tensor  # float32: the mean of g g^T, g the gradient of log p(text) at the embedding's output
    kappa: float  # the mean squared gradient at the logits, which weighs the head's moments beside these


class ExpertFeedback:
    """The feedback of one layer's experts; it may be asked in any thread."""

    def __init__(self, inputs: ExpertInputs) -> None:
        self._inputs = inputs

    def gate_up(self, expert: int) -> Feedback:
        """The feedback of gate and up, whose inputs are rows like all of the layer's."""
        moments = self._inputs.gate_up(expert)
        return Feedback.of(conditioned(moments.mean_NN, moments.n_tokens, self._inputs.all_tokens.mean_NN))

    def down(self, expert: int, gate_FD: torch.Tensor, up_FD: torch.Tensor) -> Feedback:
        """The feedback of down, whose inputs are the expert's own neurons."""
        moments = self._inputs.down(expert, gate_FD, up_FD)
        return Feedback.of(conditioned(moments.mean_NN, moments.n_tokens, None))


class StudentFeedback:
    """The feedback of a student's matrices.

    Args:
        moments: the student's second moments.
        tied: True if the embedding is the head.
        gradient: the embedding's; without it a tied embedding is treated as a head, any other gets no feedback.
    """

    def __init__(self, moments: SecondMoments, *, tied: bool, gradient: EmbeddingGradient | None = None) -> None:
        self._moments = moments
        self._tied = tied
        self._gradient = gradient
        self._found: dict[str, Feedback] = {}  # for the part of the model that was last asked for
        self._layer: tuple[int, LayerMoments] | None = None

    def matrix(self, role: Role, layer: int | None) -> Feedback | None:
        """The feedback of a matrix that is no expert's; None if nothing is known of its inputs.

        Raises:
            InputError: the stored inputs, or weights, cannot be read, or give values that are not finite.
        """
        if role is Role.TOKEN_EMBEDDING or role is Role.HEAD:
            return self._of_vocabulary(role)
        if layer is None or role not in (*_ATTENTION, Role.ATTENTION_OUTPUT):
            return None
        moments = self._of_layer(layer)
        what = "attention" if role in _ATTENTION else "attention output"
        if what not in self._found:
            found = moments.attention if role in _ATTENTION else moments.attention_output
            self._found[what] = Feedback.of(conditioned(found.mean_NN, found.n_tokens, None))
        return self._found[what]

    def experts(self, layer: int) -> ExpertFeedback:
        """The feedback of a layer's experts. The errors are those of :meth:`matrix`."""
        inputs = self._of_layer(layer).experts
        assert inputs is not None, f"layer {layer} has no experts"
        return ExpertFeedback(inputs)

    def _of_layer(self, layer: int) -> LayerMoments:
        if self._layer is None or self._layer[0] != layer:
            self._layer = None  # its memory is needed
            self._found = {}
            self._layer = layer, self._moments.layer(layer)
        return self._layer[1]

    def _of_vocabulary(self, role: Role) -> Feedback | None:
        if str(role) not in self._found:
            moments_DD = self._vocabulary_moments(role)
            if moments_DD is None:
                return None
            self._layer, self._found = None, {str(role): Feedback.of(moments_DD)}
        return self._found[str(role)]

    def _vocabulary_moments(self, role: Role) -> torch.Tensor | None:
        """The moments for embedding or head; quantizing a tied matrix moves both states and logits."""
        gradient = self._gradient
        is_head = role is Role.HEAD or self._tied
        head_DD = self._moments.head().mean_NN if is_head else None
        if gradient is None or role is Role.HEAD:
            return head_DD
        return gradient.moments_DD if head_DD is None else gradient.moments_DD + gradient.kappa * head_DD


def threads_within(n_bytes: int, spec: ModelSpec, threads: int) -> int:
    """The number of threads that can choose codes in ``n_bytes`` beside the process itself: 1 to ``threads``."""
    return max(1, min(threads, (n_bytes - _shared_bytes(spec)) // _thread_bytes(spec)))


def least_feedback_bytes(spec: ModelSpec) -> int:
    """Bytes that choosing a student's codes needs beside the process itself, in one thread."""
    return _shared_bytes(spec) + _thread_bytes(spec)


_ARRAYS = 8  # of the moments' size that are alive at once while they are factored
_ACTIVATIONS = 16  # arrays of the states' size in a run of attention


def _attention_width(spec: ModelSpec) -> int:
    return spec.n_heads * spec.head_dim


def _shared_bytes(spec: ModelSpec) -> int:
    """Bytes of experts' inputs and attention's sums: of one layer, and of the next while the last experts are made."""
    sums = 4 * (2 * spec.hidden_size**2 + _attention_width(spec) ** 2)
    return 2 * (2 * KEPT_TOKENS * spec.hidden_size + sums) + 4 * spec.dense_layer_parameters


def _thread_bytes(spec: ModelSpec) -> int:
    """Bytes of the largest moments while they are factored, with an expert and its rows; or of blocks in attention."""
    size = max(spec.hidden_size, spec.expert_width, _attention_width(spec))
    expert = 4 * spec.expert_parameters + 4 * ROWS_AT_ONCE * (spec.hidden_size + 3 * spec.expert_width)
    factored = 4 * _ARRAYS * size**2 + expert
    width = max(spec.hidden_size, _attention_width(spec))
    products = 2 * 4 * (2 * spec.hidden_size**2 + _attention_width(spec) ** 2)
    return max(factored, 4 * _ACTIVATIONS * TOKENS_AT_ONCE * width + products)
