"""Records of the chosen experts, which validation counts. Needs numpy only, for the runtimes' processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from compressors.model.errors import InputError

__all__ = ["NO_EXPERT", "RoutingRecord", "selection_margins"]

NO_EXPERT = -1
"""Fills up the choices of layers with fewer experts per token than the largest top-k; its gate weight is 0."""


@dataclass(frozen=True)
class RoutingRecord:
    """Chosen experts of every layer and token, by falling gate weight, in the numbering of the model that ran."""

    experts_LTK: npt.NDArray[np.int32]
    weights_LTK: npt.NDArray[np.float32]  # gate weights as they were applied
    margins_LT: npt.NDArray[np.float32] | None = None  # see selection_margins; None if they were not recorded

    def save(self, path: Path) -> None:
        """Writes the arrays into one safetensors file."""
        tensors = {"experts": self.experts_LTK, "weights": self.weights_LTK, "margins": self.margins_LT}
        # safetensors ignores strides and writes an array's memory as it lies
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items() if array is not None}, path)

    @classmethod
    def load(cls, path: Path) -> RoutingRecord:
        """The inverse of :meth:`save`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the routing in {path} cannot be read ({error})") from None
        return cls(tensors["experts"], tensors["weights"], tensors.get("margins"))

    def tokens(self, tokens: slice | npt.NDArray[np.int64]) -> RoutingRecord:
        """The routing of these tokens alone."""
        margins_LT = None if self.margins_LT is None else self.margins_LT[:, tokens]
        return RoutingRecord(self.experts_LTK[:, tokens], self.weights_LTK[:, tokens], margins_LT)

    @classmethod
    def concatenate(cls, parts: list[RoutingRecord]) -> RoutingRecord:
        """Joins the tokens of several recordings of one model."""
        margins = [part.margins_LT for part in parts if part.margins_LT is not None]
        return cls(
            np.concatenate([part.experts_LTK for part in parts], axis=1),
            np.concatenate([part.weights_LTK for part in parts], axis=1),
            np.concatenate(margins, axis=1) if len(margins) == len(parts) else None,
        )


def selection_margins(scores_TE: npt.NDArray[np.float32], top_k: int) -> npt.NDArray[np.float32]:
    """Returns how far each token is from choosing another expert: its k-th largest score minus the next, float32 [T].

    Scores are :meth:`~compressors.model.description.routing.Routing.selection_scores`. Where they are router logits, a
    margin is the logarithm of the ratio of both experts' weights before these are normalised (of a softmax's; a
    sigmoid's are at most that far apart). It is infinite where no other expert can be chosen. The distance to choosing
    another group of experts is not in it.
    """
    n_tokens, n_experts = scores_TE.shape
    if top_k == n_experts:
        return np.full(n_tokens, np.inf, dtype=np.float32)
    last, first_left_out = n_experts - top_k, n_experts - top_k - 1  # by rising logit
    sorted_TE = np.partition(scores_TE, (first_left_out, last), axis=1)
    margins_T: npt.NDArray[np.float32] = sorted_TE[:, last] - sorted_TE[:, first_left_out]
    return margins_T.astype(np.float32, copy=False)
