"""Floors: the changes that a runtime makes by itself, measured where both sides hold the same numbers.

Two models with equal weights differ only by their arithmetic: order of sums, rounded inputs, kernels. A divergence
between two runtimes, or between a file and its original, means nothing below its floor.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from compressors.model.predictions.routing_record import RoutingRecord
from validate.metrics.bootstrap import mean_interval, perplexity_ratio_interval
from validate.metrics.evaluation import Evaluation
from validate.metrics.statistics import compare_perplexities, divergence, perplexity, share
from validate.routing.agreement import LayerAgreement, routing_agreement

__all__ = ["floor_figures"]


def floor_figures(evaluation: Evaluation, reference: str, reference_routing: RoutingRecord | None) -> dict[str, Any]:
    """Compares a runtime with torch with the same weights, as plain data; docs/validation.md describes the fields.

    Args:
        evaluation: the evaluation of the runtime.
        reference: the name of torch's log-probabilities in it; they have 16 bits, so divergences below 1e-6 nats
            mean nothing.
        reference_routing: torch's routing; None for a dense model.
    """
    likelihood_N, n_chunks = evaluation.negative_log_likelihood_N, evaluation.n_chunks
    against = evaluation.against[reference]
    compared = compare_perplexities(likelihood_N, against.negative_log_likelihood_N)
    return {
        "tokens": len(likelihood_N),
        "chunks": n_chunks,
        "perplexity": perplexity(likelihood_N)[0],
        "perplexity_torch": compared.base,
        "perplexity_difference": compared.difference,
        "perplexity_difference_error": compared.difference_error,
        "perplexity_ratio": compared.ratio,
        "perplexity_ratio_interval": perplexity_ratio_interval(
            likelihood_N, against.negative_log_likelihood_N, n_chunks
        ),
        "kld": asdict(divergence(against.kl_divergence_N))
        | {"mean_interval": mean_interval(against.kl_divergence_N, n_chunks)},
        "top1_agreement": share(against.same_top_N)[0],
        "top1_agreement_interval": mean_interval(against.same_top_N, n_chunks),
        "routing": _routing(evaluation, reference_routing),
    }


def _routing(evaluation: Evaluation, reference: RoutingRecord | None) -> dict[str, Any] | None:
    if reference is None or evaluation.routing is None:
        return None
    agreement = routing_agreement(reference, evaluation.routing, n_chunks=evaluation.n_chunks)
    figures: dict[str, Any] = {figure.name: agreement.mean(figure.name) for figure in fields(LayerAgreement)}
    return figures | {"overlap_interval": agreement.overlap_interval}
