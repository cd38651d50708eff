"""Figures by domain against those of evaluations that saw that domain alone."""

from __future__ import annotations

import numpy as np
import pytest

from validate.metrics.domains import domain_figures
from validate.metrics.evaluation import AgainstReference, Evaluation
from validate.metrics.figures import fidelity_figures

_SCORED = 15
_DOMAINS = ["code", "prose", "code", "prose", "prose", "religion"]


def _evaluation(chunks: list[int]) -> Evaluation:
    """The same scores for a chunk, whatever chunks are beside it."""
    parts = []
    for chunk in chunks:
        generator = np.random.default_rng(chunk)
        reference = generator.gamma(2.0, 1.0 + chunk, _SCORED).astype(np.float32)
        model = reference + generator.normal(0.1, 0.2, _SCORED).astype(np.float32)
        divergence = generator.gamma(1.0, 0.1 * (1 + chunk), _SCORED).astype(np.float32)
        same, right = generator.random((2, _SCORED)) < 0.7
        parts.append((model, divergence, same, reference, right))
    model, *against = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Evaluation(len(chunks), model, {"teacher": AgainstReference(*against)}, None, np.zeros(len(model), np.bool_))


def test_each_domain_is_what_its_chunks_say() -> None:
    rows = domain_figures(_evaluation(list(range(6))), "teacher", _DOMAINS)
    assert [row["domain"] for row in rows] == ["code", "prose", "religion"]
    for row in rows:
        alone = _evaluation([chunk for chunk, domain in enumerate(_DOMAINS) if domain == row["domain"]])
        expected = fidelity_figures(alone, "teacher")
        for key in ("chunks", "tokens", "perplexity", "perplexity_error", "top1_agreement", "top1_agreement_interval"):
            assert row[key] == pytest.approx(expected[key]), key
        assert row["kld"] == {
            "mean": pytest.approx(expected["kld"]["mean"]),
            "mean_interval": expected["kld"]["mean_interval"],
        }
        assert row["perplexity_teacher"] == pytest.approx(expected["perplexity_vs_teacher"]["base"])
        assert row["perplexity_ratio"] == pytest.approx(expected["perplexity_vs_teacher"]["ratio"])


def test_a_single_chunk_has_no_interval() -> None:
    *_, religion = domain_figures(_evaluation(list(range(6))), "teacher", _DOMAINS)
    assert religion["kld"]["mean_interval"] is None
    assert religion["perplexity_ratio_interval"] is None
