"""Compares a model with its reference by domain: pruning does not harm all kinds of text equally."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from validate.metrics.bootstrap import mean_interval, perplexity_ratio_interval
from validate.metrics.evaluation import Evaluation
from validate.metrics.statistics import perplexity, share

__all__ = ["domain_figures"]


def domain_figures(evaluation: Evaluation, reference: str, domains_B: Sequence[str]) -> list[dict[str, Any]]:
    """Returns figures of each domain in the order of the text, as plain data; docs/validation.md describes the fields.

    Args:
        evaluation: the evaluation of the whole text.
        reference: the name of the reference in the evaluation.
        domains_B: the domain of each of its chunks; a domain's chunks need not lie together.
    """
    against = evaluation.against[reference]
    shape = (evaluation.n_chunks, -1)
    likelihood_BS = evaluation.negative_log_likelihood_N.reshape(shape)
    reference_BS = against.negative_log_likelihood_N.reshape(shape)
    divergence_BS, same_top_BS = against.kl_divergence_N.reshape(shape), against.same_top_N.reshape(shape)
    of_chunk = np.array(domains_B)
    rows = []
    for domain in dict.fromkeys(domains_B):
        chunks = of_chunk == domain
        n_chunks = int(chunks.sum())
        likelihood_N, reference_N = likelihood_BS[chunks].ravel(), reference_BS[chunks].ravel()
        divergence_N, same_top_N = divergence_BS[chunks].ravel(), same_top_BS[chunks].ravel()
        value, error = perplexity(likelihood_N)
        rows.append(
            {
                "domain": domain,
                "chunks": n_chunks,
                "tokens": len(likelihood_N),
                "perplexity": value,
                "perplexity_error": error,
                "perplexity_teacher": (base := perplexity(reference_N)[0]),
                "perplexity_ratio": value / base,
                "perplexity_ratio_interval": perplexity_ratio_interval(likelihood_N, reference_N, n_chunks),
                "kld": {
                    "mean": float(divergence_N.mean(dtype=np.float64)),
                    "mean_interval": mean_interval(divergence_N, n_chunks),
                },
                "top1_agreement": share(same_top_N)[0],
                "top1_agreement_interval": mean_interval(same_top_N, n_chunks),
            }
        )
    return rows
