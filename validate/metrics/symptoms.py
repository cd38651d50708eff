"""Describes a file's faults in words: figures show that something is wrong, symptoms show where to look.

Tensors that are damaged, and settings that are not the model's, are facts. Everything else is read from the
measurements, and only reported for a file that failed: a layer whose routing falls, a router whose choices are the
original's under other numbers, an expert whose tokens diverge. (The place of the divergence in a chunk says nothing:
even with a wrong rotary base it does not grow over the scored positions, the second half.) Layers and experts are
counted from 0, as in the files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compressors.model.description.rope import RopeKind
from compressors.model.description.spec import ModelSpec
from compressors.model.predictions.routing_record import NO_EXPERT, RoutingRecord
from validate.files.file_facts import FileFacts
from validate.report import numbers
from validate.routing.agreement import RoutingAgreement
from validate.runtimes.backend import scored_positions

__all__ = ["divergence_symptoms", "routing_symptoms", "setting_symptoms"]

_SAME_SETTING = 0.1  # relative; a rotary base that was read from a table of cosines in float16 is up to 5 % off
_FALL = 0.75  # a layer that agrees by less than this share of the layer before falls
_SAME_EXPERT = 0.8  # share of the tokens of an original expert that choose the same expert of the file
_DIVERGES, _TOKENS = 5.0, 20  # an expert's divergence relative to the others', and its fewest tokens


def setting_symptoms(facts: FileFacts, spec: ModelSpec) -> list[str]:
    """Lists settings of the file that are not the model's."""
    is_plain = [rope.kind for rope in spec.ropes] == [RopeKind.DEFAULT]
    rope = spec.rope if is_plain else None
    settings = (
        (
            "rope base (position-dependent: every rotation is another)",
            None if rope is None else facts.rope_base,  # a scaled table does not show its base
            1.0 if rope is None else rope.theta,
        ),
        ("epsilon of the norms", facts.rms_norm_eps, spec.rms_norm_eps),
        ("number of experts per token", facts.top_k, min(spec.top_k, facts.n_experts or spec.top_k)),
    )
    return [
        f"{name}: {_number(found)} in the file, {_number(expected)} in config.json"
        for name, found, expected in settings
        if found is not None and abs(found / expected - 1) > _SAME_SETTING
    ]


def routing_symptoms(agreement: RoutingAgreement, reference: RoutingRecord, found: RoutingRecord) -> list[str]:
    """Lists layers where routing falls, and the reason. Both models must number their experts alike."""
    symptoms = []
    before, place = 1.0, "all before"
    for index, layer in enumerate(agreement.layers):
        if layer is None:
            continue
        if layer.overlap < _FALL * before:
            text = f"layer {index}: routing overlap falls from {before:.2f} ({place}) to {layer.overlap:.2f}"
            symptoms.append(text + _router(reference.experts_LTK[index], found.experts_LTK[index]))
        before, place = layer.overlap, f"layer {index}"
    return symptoms


def divergence_symptoms(
    kl_divergence_N: npt.NDArray[np.float32], n_chunks: int, chunk_length: int, reference: RoutingRecord
) -> list[str]:
    """Names the expert whose tokens diverge most, if they diverge several times as much as all others."""
    kld_BS = kl_divergence_N.reshape(n_chunks, -1).astype(np.float64)
    scored = scored_positions(chunk_length)
    n_layers, _, top_k = reference.experts_LTK.shape
    chosen_LBTK = reference.experts_LTK.reshape(n_layers, n_chunks, chunk_length, top_k)
    worst, text = _DIVERGES, []
    for layer, chosen_BTK in enumerate(chosen_LBTK):
        chosen_BSK = chosen_BTK[:, scored]
        for expert in np.unique(chosen_BSK[chosen_BSK != NO_EXPERT]).tolist():
            by_expert = (chosen_BSK == expert).any(-1)
            if not _TOKENS <= by_expert.sum() < by_expert.size:
                continue
            its_own, others = float(kld_BS[by_expert].mean()), float(kld_BS[~by_expert].mean())
            if its_own > worst * others > 0:
                worst = its_own / others
                text = [
                    f"layer {layer}: tokens that expert {expert} gets diverge by {numbers.divergence(its_own)} nats, "
                    f"the others by {numbers.divergence(others)}: that expert"
                ]
    return text


def _router(reference_TK: npt.NDArray[np.int32], found_TK: npt.NDArray[np.int32]) -> str:
    """Says whether the file chooses the original's experts under other numbers."""
    chosen = max(int(reference_TK.max()), int(found_TK.max())) + 1
    together = np.zeros((chosen, chosen))
    for slot in range(reference_TK.shape[1]):
        for other in range(found_TK.shape[1]):
            np.add.at(together, (reference_TK[:, slot], found_TK[:, other]), 1)
    tokens = np.array([(reference_TK == expert).any(1).sum() for expert in range(chosen)])
    often = np.flatnonzero(tokens >= _TOKENS)
    partner = together.argmax(1)
    sure = [expert for expert in often if together[expert, partner[expert]] > _SAME_EXPERT * tokens[expert]]
    moved = [expert for expert in sure if partner[expert] != expert]
    # two routers that both prefer a few experts choose those together too: a permutation gives each its own
    is_permutation = len(set(partner[sure])) == len(sure)
    if not moved or not is_permutation or 2 * len(sure) < len(often):
        return ": its router, or what comes into it"
    expert = moved[0]
    return (
        f": its router's rows are permuted; tokens of expert {expert} go to {partner[expert]}, and so on for "
        f"{len(moved)} of {len(often)} experts"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"
