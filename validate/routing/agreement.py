"""Routing agreement: how far two models send the same tokens to the same experts.

For a token let A be the reference's chosen experts and B the model's. When the reference is the teacher, A is first
mapped through the expert map: dropped experts leave A, merged ones become one. Tokens whose mapped A is empty say
nothing about the router and are left out; the surviving share of the teacher's gate weight shows how much that hides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord
from compressors.model.sources.student import ExpertMap
from validate.metrics.bootstrap import Interval, bootstrap_interval

__all__ = ["LayerAgreement", "RoutingAgreement", "overlaps", "routing_agreement", "same_sets"]


@dataclass(frozen=True)
class LayerAgreement:
    """Means over the tokens of one layer, each between 0 and 1."""

    overlap: float  # |A & B| / |A|
    exact: float  # share of tokens whose A is all in B
    top1: float  # share of tokens whose strongest of A is the strongest of B
    weighted: float  # share of A's gate weight that lies on experts in B
    kept_gate_weight: float  # share of the reference's gate weight on experts that survive; 1 without an expert map


@dataclass(frozen=True)
class RoutingAgreement:
    """Agreement by layer, None where the layer has no experts; the overall figures are means over the others."""

    layers: tuple[LayerAgreement | None, ...]
    overlap_interval: Interval | None  # the overall overlap's, by block bootstrap; None for a single block

    def mean(self, name: str) -> float:
        """The mean of one figure over the layers that have experts."""
        return float(np.mean([getattr(layer, name) for layer in self.layers if layer is not None]))

    def figures(self) -> dict[str, Any]:
        """Means, interval and layers as plain data for JSON."""
        overall: dict[str, Any] = {figure.name: self.mean(figure.name) for figure in fields(LayerAgreement)}
        overall["overlap_interval"] = self.overlap_interval
        return overall | {"per_layer": [None if layer is None else asdict(layer) for layer in self.layers]}


def routing_agreement(
    reference: RoutingRecord, model: RoutingRecord, experts: ExpertMap | None = None, *, n_chunks: int = 1
) -> RoutingAgreement:
    """Compares two recordings of the same tokens.

    Args:
        reference: A, in the teacher's own numbering if ``experts`` is given, else in the model's.
        model: B.
        experts: maps the teacher's experts to the student's.
        n_chunks: the number of chunks of equal length in the tokens; the interval draws whole chunks.
    """
    layers: list[LayerAgreement | None] = []
    overlaps: list[_ChunkOverlap] = []
    for layer, model_TK in enumerate(model.experts_LTK):
        if (model_TK == NO_EXPERT).all():
            layers.append(None)
            continue
        source = layer if experts is None else experts.layers[layer].source
        table = None if experts is None else experts.student_of(layer).numpy()
        layer_agreement, overlap = _layer_agreement(
            reference.experts_LTK[source], reference.weights_LTK[source], model_TK, table, n_chunks
        )
        layers.append(layer_agreement)
        overlaps.append(overlap)
    return RoutingAgreement(tuple(layers), bootstrap_interval(n_chunks, lambda draws: _mean_overlap(overlaps, draws)))


def same_sets(first: RoutingRecord, second: RoutingRecord) -> npt.NDArray[np.bool_]:
    """True where a token's chosen sets are equal in a layer: bool [L, T]."""
    same = np.sort(first.experts_LTK, axis=-1) == np.sort(second.experts_LTK, axis=-1)
    result: npt.NDArray[np.bool_] = same.all(axis=-1)
    return result


def overlaps(reference: RoutingRecord, model: RoutingRecord) -> npt.NDArray[np.float64]:
    """overlap@k of two routings of one student, by layer and token: [L, T]; 0 where no expert is chosen."""
    layers = zip(reference.experts_LTK, model.experts_LTK, strict=True)
    return np.stack([_overlaps_of_layer(reference_TK, model_TK) for reference_TK, model_TK in layers])


def _overlaps_of_layer(reference_TK: npt.NDArray[np.int32], model_TK: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    chosen = reference_TK != NO_EXPERT
    shared = (reference_TK[:, :, None] == model_TK[:, None, :]).any(axis=-1) & chosen
    shares_T: npt.NDArray[np.float64] = shared.sum(axis=-1) / np.maximum(chosen.sum(axis=-1), 1)
    return shares_T


@dataclass(frozen=True)
class _ChunkOverlap:
    """One layer's overlap, summed by chunk (B), and the number of tokens in each sum."""

    sum_B: npt.NDArray[np.float64]
    tokens_B: npt.NDArray[np.int64]


def _mean_overlap(overlaps: list[_ChunkOverlap], draws_DB: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The overall overlap of each draw of chunks: [D]."""
    layers_LD = [draws_DB @ layer.sum_B / np.maximum(draws_DB @ layer.tokens_B, 1) for layer in overlaps]
    means_D: npt.NDArray[np.float64] = np.mean(layers_LD, axis=0)
    return means_D


def _layer_agreement(
    chosen_TK: npt.NDArray[np.int32],
    weights_TK: npt.NDArray[np.float32],
    model_TK: npt.NDArray[np.int32],
    table_E: npt.NDArray[np.int64] | None,
    n_chunks: int,
) -> tuple[LayerAgreement, _ChunkOverlap]:
    mapped = chosen_TK.astype(np.int64) if table_E is None else table_E[chosen_TK]
    all_weights = weights_TK.astype(np.float64)
    mapped, weights = _collapse(mapped, all_weights)
    present = mapped >= 0
    told = present.any(axis=1)
    told_B = told.reshape(n_chunks, -1).sum(1)
    if not told.any():
        return LayerAgreement(0.0, 0.0, 0.0, 0.0, 0.0), _ChunkOverlap(np.zeros(n_chunks), told_B)
    kept = (weights * present).sum(1) / all_weights.sum(1)
    mapped, weights, present, model = mapped[told], weights[told] * present[told], present[told], model_TK[told]
    shared = (mapped[:, :, None] == model[:, None, :]).any(-1) & present
    overlap_T = np.zeros(len(chosen_TK))
    overlap_T[told] = shared.sum(1) / present.sum(1)
    strongest = np.take_along_axis(mapped, weights.argmax(1)[:, None], 1)[:, 0]
    agreement = LayerAgreement(
        overlap=float(overlap_T[told].mean()),
        exact=float((shared == present).all(1).mean()),
        top1=float((strongest == model[:, 0]).mean()),
        weighted=float(((weights * shared).sum(1) / weights.sum(1)).mean()),
        kept_gate_weight=float(kept.mean()),
    )
    return agreement, _ChunkOverlap(overlap_T.reshape(n_chunks, -1).sum(1), told_B)


def _collapse(
    mapped_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Makes each expert appear once per token: later copies become -1 and give their weight to the first."""
    mapped, weights = mapped_TK.copy(), weights_TK.copy()
    for slot in range(1, mapped.shape[1]):
        for earlier in range(slot):
            copy = (mapped[:, slot] == mapped[:, earlier]) & (mapped[:, slot] >= 0)
            weights[copy, earlier] += weights[copy, slot]
            weights[copy, slot] = 0.0
            mapped[copy, slot] = -1
    return mapped, weights
