"""The rule by which a router's logits become chosen experts and their weights.

:meth:`Routing.choose` and :meth:`Routing.weights` are the definition, in numpy; the torch forms do the same on tensors
that may need gradients. The tests compare both with each other and with the classes of every family of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["GroupScore", "Routing", "Score"]

Floats = npt.NDArray[np.float32]


class Score(StrEnum):
    """The function that turns logits into scores."""

    SOFTMAX = "softmax"  # a softmax over all experts
    SIGMOID = "sigmoid"  # the sigmoid of each logit by itself
    LOGITS = "logits"  # the largest logits are chosen, and a softmax over these alone gives the weights


class GroupScore(StrEnum):
    """The score by which a group of experts is chosen."""

    BEST_TWO = "sum of the best two"
    BEST = "best"

    @property
    def n_best(self) -> int:
        """The number of a group's experts that it is scored by, which every group must have."""
        return 2 if self is GroupScore.BEST_TWO else 1


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighed. Everything is computed in float32.

    Attributes:
        score: see :class:`Score`.
        has_selection_bias: a vector is added to the scores for the choice, and not for the weights.
        n_groups: the number of groups of neighbouring experts; only experts of the best groups can be chosen.
        n_chosen_groups: the number of groups whose experts can be chosen; together they have at least top-k.
        group_score: see :class:`GroupScore`; transformers' classes compute it even for a single group.
        normalizes: the chosen weights are divided by their sum.
        epsilon: added to that sum.
        least_sum: a sum below this counts as this.
        scale: a factor of all weights.
        has_expert_scale: at the end, each weight is multiplied by a number that belongs to its expert.
    """

    score: Score = Score.SOFTMAX
    has_selection_bias: bool = False
    n_groups: int = 1
    n_chosen_groups: int = 1
    group_score: GroupScore = GroupScore.BEST
    normalizes: bool = True
    epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    has_expert_scale: bool = False

    def choose(self, logits_TE: Floats, top_k: int, bias_E: Floats | None = None) -> npt.NDArray[np.int64]:
        """Chooses experts, by falling score: [T, K]. Among equal scores the lower index comes first.

        Args:
            logits_TE: router logits, a router's own bias included.
            top_k: experts of each token.
            bias_E: the selection bias, where the rule has one.
        """
        scores_TE = self._choice_scores(logits_TE, bias_E)
        chosen_TK: npt.NDArray[np.int64] = np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k]
        return chosen_TK

    def selection_scores(self, logits_TE: Floats, bias_E: Floats | None = None) -> Floats:
        """Returns the values that decide the order in which experts are chosen: [T, E].

        They are the logits where only the score comes between, as every score rises with its logit. Elsewhere they
        are scores with the selection bias; those of experts outside of the best groups are -inf.
        """
        return logits_TE if self._orders_as_logits else self._choice_scores(logits_TE, bias_E)

    def weights(self, logits_TE: Floats, chosen_TK: npt.NDArray[np.int64], scale_E: Floats | None = None) -> Floats:
        """Returns the weights of these experts: [T, K]; ``scale_E`` are their scales, where the rule has them."""
        if self.score is Score.LOGITS:
            weights_TK = _softmax(np.take_along_axis(logits_TE, chosen_TK, axis=1))
        else:
            weights_TK = np.take_along_axis(self._scores(logits_TE), chosen_TK, axis=1)
            if self.normalizes:
                total_T1 = weights_TK.sum(axis=1, keepdims=True) + np.float32(self.epsilon)
                weights_TK = weights_TK / np.maximum(total_T1, np.float32(self.least_sum))
        weights_TK = weights_TK * np.float32(self.scale)
        if not self.has_expert_scale:
            return weights_TK
        assert scale_E is not None, "the rule multiplies by the experts' scales"
        return weights_TK * scale_E[chosen_TK]

    def torch_choose(self, logits_TE: torch.Tensor, top_k: int, bias_E: torch.Tensor | None = None) -> torch.Tensor:
        """Does what :meth:`choose` does, for tensors; among equal scores torch decides: int64 [T, K]."""
        return self._torch_choice_scores(logits_TE, bias_E).topk(top_k, dim=-1).indices

    def torch_selection_scores(self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None = None) -> torch.Tensor:
        """Does what :meth:`selection_scores` does, for tensors."""
        return logits_TE if self._orders_as_logits else self._torch_choice_scores(logits_TE, bias_E)

    def torch_weights(
        self, logits_TE: torch.Tensor, chosen_TK: torch.Tensor, scale_E: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Does what :meth:`weights` does, for tensors: [T, K]; gradients reach the logits."""
        if self.score is Score.LOGITS:
            weights_TK = logits_TE.gather(-1, chosen_TK).softmax(-1)
        else:
            weights_TK = self._torch_scores(logits_TE).gather(-1, chosen_TK)
            if self.normalizes:
                total_T1 = weights_TK.sum(-1, keepdim=True)
                total_T1 = total_T1 + self.epsilon if self.epsilon else total_T1
                weights_TK = weights_TK / (total_T1.clamp_min(self.least_sum) if self.least_sum else total_T1)
        weights_TK = weights_TK if self.scale == 1.0 else weights_TK * self.scale
        if not self.has_expert_scale:
            return weights_TK
        assert scale_E is not None, "the rule multiplies by the experts' scales"
        return weights_TK * scale_E[chosen_TK]

    def torch_probabilities(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Returns the probability that a router gives each expert: the sigmoid of its logit, or a softmax over all."""
        return logits_TE.sigmoid() if self.score is Score.SIGMOID else logits_TE.softmax(-1)

    @property
    def description(self) -> str:
        """The rule in words, without top-k."""
        parts = [f"{self.score} over all experts" if self.score is Score.SOFTMAX else str(self.score)]
        if self.score is Score.LOGITS:
            parts = ["softmax over the chosen experts"]
        elif self.normalizes:
            parts.append("weights normalised")
        if self.has_selection_bias:
            parts.append("a bias for the choice")
        if self.n_groups > 1:
            groups = f"the best {self.n_chosen_groups} of {self.n_groups} groups"
            parts.append(f"{groups} by the {self.group_score} of each")
        if self.scale != 1.0:
            parts.append(f"weights times {self.scale:g}")
        if self.has_expert_scale:
            parts.append("weights times a scale of each expert")
        return ", ".join(parts)

    @property
    def _orders_as_logits(self) -> bool:
        return not self.has_selection_bias and self.n_groups == 1

    def _choice_scores(self, logits_TE: Floats, bias_E: Floats | None) -> Floats:
        scores_TE = self._scores(logits_TE)
        if self.has_selection_bias:
            assert bias_E is not None, "the rule adds a selection bias"
            scores_TE = scores_TE + bias_E
        return self._of_best_groups(scores_TE) if self.n_groups > 1 else scores_TE

    def _scores(self, logits_TE: Floats) -> Floats:
        if self.score is Score.SIGMOID:
            return np.exp(-np.logaddexp(np.float32(0), -logits_TE))  # 1 / (1 + exp(-x)) that cannot overflow
        return _softmax(logits_TE) if self.score is Score.SOFTMAX else logits_TE

    def _of_best_groups(self, scores_TE: Floats) -> Floats:
        """Returns the scores, with -inf for experts outside of the best groups."""
        grouped_TGM = scores_TE.reshape(len(scores_TE), self.n_groups, -1)
        best_TGM = -np.sort(-grouped_TGM, axis=2)
        groups_TG = best_TGM[:, :, : self.group_score.n_best].sum(axis=2)
        kept_TG = np.argsort(-groups_TG, axis=1, kind="stable")[:, : self.n_chosen_groups]
        is_kept_TG = np.zeros(groups_TG.shape, dtype=bool)
        np.put_along_axis(is_kept_TG, kept_TG, True, axis=1)
        masked_TGM: Floats = np.where(is_kept_TG[:, :, None], grouped_TGM, np.float32(-np.inf))
        return masked_TGM.reshape(scores_TE.shape)

    def _torch_choice_scores(self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        scores_TE = self._torch_scores(logits_TE)
        if self.has_selection_bias:
            assert bias_E is not None, "the rule adds a selection bias"
            scores_TE = scores_TE + bias_E
        return self._torch_of_best_groups(scores_TE) if self.n_groups > 1 else scores_TE

    def _torch_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        if self.score is Score.SIGMOID:
            return logits_TE.sigmoid()
        return logits_TE.softmax(-1) if self.score is Score.SOFTMAX else logits_TE

    def _torch_of_best_groups(self, scores_TE: torch.Tensor) -> torch.Tensor:
        import torch

        grouped_TGM = scores_TE.unflatten(-1, (self.n_groups, -1))
        groups_TG = grouped_TGM.topk(self.group_score.n_best, dim=-1).values.sum(-1)
        kept_TG = groups_TG.topk(self.n_chosen_groups, dim=-1).indices
        is_kept_TG = torch.zeros_like(groups_TG, dtype=torch.bool).scatter_(-1, kept_TG, True)
        masked_TE: torch.Tensor = grouped_TGM.masked_fill(~is_kept_TG[..., None], -torch.inf).flatten(-2)
        return masked_TE


def _softmax(logits_TE: Floats) -> Floats:
    powers_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    softmax_TE: Floats = powers_TE / powers_TE.sum(axis=1, keepdims=True)
    return softmax_TE
