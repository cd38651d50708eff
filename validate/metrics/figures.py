"""The figures of a model and its reference in a row of the report, as plain data for JSON.

docs/validation.md describes every field.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from validate.metrics.bootstrap import mean_interval, perplexity_interval
from validate.metrics.evaluation import Evaluation
from validate.metrics.statistics import compare_perplexities, divergence, perplexity, probability_change, share

__all__ = ["fidelity_figures"]


def fidelity_figures(evaluation: Evaluation, reference: str) -> dict[str, Any]:
    """Perplexity, divergence and same-top of an evaluation against one of its references."""
    likelihood_N, n_chunks = evaluation.negative_log_likelihood_N, evaluation.n_chunks
    against = evaluation.against[reference]
    value, error = perplexity(likelihood_N)
    same_top, same_top_error = share(against.same_top_N)
    return {
        "tokens": len(likelihood_N),
        "chunks": n_chunks,
        "perplexity": value,
        "perplexity_error": error,
        "perplexity_interval": perplexity_interval(likelihood_N, n_chunks),
        "perplexity_vs_teacher": asdict(compare_perplexities(likelihood_N, against.negative_log_likelihood_N)),
        "kld": asdict(divergence(against.kl_divergence_N))
        | {"mean_interval": mean_interval(against.kl_divergence_N, n_chunks)},
        "delta_p": asdict(probability_change(likelihood_N, against.negative_log_likelihood_N)),
        "top1_agreement": same_top,
        "top1_agreement_error": same_top_error,
        "top1_agreement_interval": mean_interval(against.same_top_N, n_chunks),
    }
