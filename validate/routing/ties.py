"""Tells routings that differ from routings that only broke ties differently.

A token whose k-th and next router logits are nearly equal loses nothing by taking the other expert: both would have
the same gate weight. Such tokens are counted apart from those that went to other experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord
from validate.routing.agreement import overlaps, same_sets

__all__ = ["TIE_MARGIN", "Ties", "find_ties"]

TIE_MARGIN = 0.01
"""A choice is a tie below this difference of router logits: the gate weights of the expert that was taken and of the
one that was not differ by less than 1 %. It is fixed, so that files and runtimes can be compared; rounding in float32
alone changes margins a thousand times less (:attr:`validate.routing.router_alone.RouterAlone.margin_error`)."""


@dataclass(frozen=True)
class Ties:
    """Shares of all tokens in all layers that have experts; margins are the reference's, in router logits."""

    threshold: float
    tokens: float  # share that is a tie
    differing: float  # share for which the chosen sets differ
    differing_tied: float | None  # the share of these that is a tie; None if none differs
    overlap_without_ties: float | None  # overlap@k of tokens without ties, mean over layers; None if all are ties
    median_margin: float | None  # None if no expert was ever left out
    median_margin_differing: float | None
    median_margin_change: float | None  # how far the model moves a margin; None if it recorded none


def find_ties(reference: RoutingRecord, model: RoutingRecord) -> Ties | None:
    """Judges two routings of one student by the margins of the reference; None if it recorded none."""
    if reference.margins_LT is None:
        return None
    routed = (model.experts_LTK != NO_EXPERT).any(axis=(1, 2))
    reference, model = _layers(reference, routed), _layers(model, routed)
    margins_LT = reference.margins_LT
    assert margins_LT is not None
    tied_LT, differs_LT = margins_LT < TIE_MARGIN, ~same_sets(reference, model)
    overlap_LT = overlaps(reference, model)
    by_layer = [overlap[~tied].mean() for overlap, tied in zip(overlap_LT, tied_LT, strict=True) if not tied.all()]
    known_LT = np.isfinite(margins_LT)
    moved = None if model.margins_LT is None else np.abs(model.margins_LT[known_LT] - margins_LT[known_LT])
    return Ties(
        threshold=TIE_MARGIN,
        tokens=float(tied_LT.mean()),
        differing=float(differs_LT.mean()),
        differing_tied=float(tied_LT[differs_LT].mean()) if differs_LT.any() else None,
        overlap_without_ties=float(np.mean(by_layer)) if by_layer else None,
        median_margin=_median(margins_LT),
        median_margin_differing=_median(margins_LT[differs_LT]),
        median_margin_change=None if moved is None else _median(moved),
    )


def _layers(routing: RoutingRecord, which_L: npt.NDArray[np.bool_]) -> RoutingRecord:
    margins_LT = None if routing.margins_LT is None else routing.margins_LT[which_L]
    return RoutingRecord(routing.experts_LTK[which_L], routing.weights_LTK[which_L], margins_LT)


def _median(values: npt.NDArray[np.float32]) -> float | None:
    """The median of the finite values: there is no margin if all experts are chosen."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None
