"""The figures of one position, computed and rounded as in llama-perplexity.

Sums over the vocabulary are in double precision, single terms in float32 (``log_softmax`` in
``tools/perplexity/perplexity.cpp`` of llama.cpp), so our figures are the tool's to the digits that it prints. Tokens to
which the reference gives a log-probability of -16 or less are left out of the divergence, as the tool does: in 16 bits
they cannot be told apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compressors.model.predictions.log_probs import log_sum_exp

if TYPE_CHECKING:
    import torch

__all__ = ["ReferenceLogProbs", "Scores"]

_LEAST_LOG_PROB = -16.0


class ReferenceLogProbs(Protocol):
    """A reference's log-probabilities at the scored positions of all chunks, chunk after chunk."""

    def __len__(self) -> int:
        """The number of positions."""

    def decoded(self, start: int, stop: int) -> torch.Tensor:
        """Log-probabilities of positions start..stop: float32 [stop - start, V]."""


class Scores:
    """Scores a model's logits at N positions.

    Args:
        logits_NV: float32.
        targets_N: int64, the tokens that follow.
    """

    def __init__(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
        largest, log_sum = log_sum_exp(logits_NV)
        self._logits_NV = logits_NV
        self._targets_N1 = targets_N[:, None]
        self._normalizer_N1 = largest + log_sum

    def negative_log_likelihood(self) -> torch.Tensor:
        """-log p(target): float32 [N]."""
        return (self._normalizer_N1 - self._logits_NV.gather(-1, self._targets_N1))[:, 0]

    def reference_likelihood(self, reference_NV: torch.Tensor) -> torch.Tensor:
        """-log p(target) of the reference: float32 [N]."""
        return -reference_NV.gather(-1, self._targets_N1)[:, 0]

    def kl_divergence(self, reference_NV: torch.Tensor) -> torch.Tensor:
        """KL(reference || model) in nats: float32 [N]."""
        import torch

        terms = (reference_NV - self._logits_NV).add_(self._normalizer_N1)
        terms.mul_(reference_NV.double().exp_().float())
        terms.masked_fill_(reference_NV <= _LEAST_LOG_PROB, 0.0)
        return terms.sum(-1, dtype=torch.float64).float()

    def same_top(self, reference_NV: torch.Tensor) -> torch.Tensor:
        """True if both find the same token most probable, of equal ones the first: bool [N].

        Equal ones are not rare in the reference, which has 65,536 steps over 16 nats.
        """
        import torch

        return torch.from_numpy(reference_NV.numpy().argmax(-1) == self._logits_NV.numpy().argmax(-1))

    def right(self) -> torch.Tensor:
        """True if the model finds the target most probable: bool [N]."""
        return self._is_top(self._logits_NV)

    def reference_right(self, reference_NV: torch.Tensor) -> torch.Tensor:
        """True if the reference finds the target most probable: bool [N]."""
        return self._is_top(reference_NV)

    def _is_top(self, values_NV: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.from_numpy(values_NV.numpy().argmax(-1) == self._targets_N1[:, 0].numpy())
