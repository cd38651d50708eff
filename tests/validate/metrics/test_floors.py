"""Floors against figures made by hand from the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from compressors.model.predictions.routing_record import RoutingRecord
from validate.metrics.evaluation import AgainstReference, Evaluation
from validate.metrics.floors import floor_figures

_CHUNKS, _SCORED, _TOKENS = 12, 20, 41


def _routing(generator: np.random.Generator) -> RoutingRecord:
    experts = np.stack([generator.permutation(8)[:2] for _ in range(3 * _CHUNKS * _TOKENS)])
    weights = np.tile(np.float32([0.75, 0.25]), (len(experts), 1))
    shape = (3, _CHUNKS * _TOKENS, 2)
    return RoutingRecord(experts.reshape(shape).astype(np.int32), weights.reshape(shape))


@pytest.fixture
def evaluation() -> Evaluation:
    generator = np.random.default_rng(0)
    reference = generator.gamma(2.0, 1.5, _CHUNKS * _SCORED).astype(np.float32)
    # whole chunks are off together, as text is
    off = np.repeat(generator.normal(0.01, 0.02, _CHUNKS), _SCORED) + generator.normal(0, 0.01, len(reference))
    against = AgainstReference(
        generator.gamma(1.0, 0.001, len(reference)).astype(np.float32),
        generator.random(len(reference)) < 0.9,
        reference,
        np.zeros(len(reference), np.bool_),
    )
    likelihood = (reference + off).astype(np.float32)
    return Evaluation(_CHUNKS, likelihood, {"torch": against}, _routing(generator), np.zeros(len(reference), np.bool_))


def test_figures_are_those_of_the_scores(evaluation: Evaluation) -> None:
    reference_routing = _routing(np.random.default_rng(7))
    found = floor_figures(evaluation, "torch", reference_routing)
    against = evaluation.against["torch"]
    mine, theirs = (
        np.exp(v.astype(np.float64).mean())
        for v in (evaluation.negative_log_likelihood_N, against.negative_log_likelihood_N)
    )
    assert found["perplexity"] == pytest.approx(mine)
    assert found["perplexity_torch"] == pytest.approx(theirs)
    assert found["perplexity_difference"] == pytest.approx(mine - theirs)
    assert found["perplexity_ratio"] == pytest.approx(mine / theirs)
    assert found["kld"]["mean"] == pytest.approx(against.kl_divergence_N.mean())
    assert found["kld"]["p999"] == pytest.approx(np.percentile(against.kl_divergence_N, 99.9), rel=1e-4)
    assert found["top1_agreement"] == against.same_top_N.mean()
    assert (found["chunks"], found["tokens"]) == (_CHUNKS, _CHUNKS * _SCORED)
    model = evaluation.routing
    assert model is not None
    shared = [
        len(set(a) & set(b)) / 2
        for a, b in zip(model.experts_LTK.reshape(-1, 2), reference_routing.experts_LTK.reshape(-1, 2), strict=True)
    ]
    assert found["routing"]["overlap"] == pytest.approx(np.mean(shared))
    assert found["routing"]["overlap_interval"][0] < np.mean(shared) < found["routing"]["overlap_interval"][1]


def test_both_perplexities_get_the_same_draws(evaluation: Evaluation) -> None:
    """Drawn apart, the ratio would move a hundred times as far."""
    likelihoods = [evaluation.negative_log_likelihood_N, evaluation.against["torch"].negative_log_likelihood_N]
    means = [values.reshape(_CHUNKS, -1).mean(1, dtype=np.float64) for values in likelihoods]
    expected = bootstrap(
        means,
        lambda model, reference, axis: np.exp(model.mean(axis) - reference.mean(axis)),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        random_state=np.random.default_rng(5),
    ).confidence_interval
    found = floor_figures(evaluation, "torch", None)["perplexity_ratio_interval"]
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * (expected.high - expected.low))


def test_a_dense_model_has_no_routing(evaluation: Evaluation) -> None:
    assert floor_figures(evaluation, "torch", None)["routing"] is None
