"""Decides pass or fail: compares measured values with stated thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["BANDS", "REQUIREMENTS", "Band", "Check", "Fidelity", "Figures"]
__all__ += ["band_of", "required_checks"]


@dataclass(frozen=True)
class Check:
    """One line of the verdict; ``value`` is None when it could not be measured."""

    name: str
    value: float | None
    threshold: float
    passed: bool

    @classmethod
    def at_most(cls, name: str, value: float | None, threshold: float) -> Check:
        """Passes if the value was measured and does not exceed the threshold."""
        return cls(name, value, threshold, value is not None and value <= threshold)

    @classmethod
    def at_least(cls, name: str, value: float | None, threshold: float) -> Check:
        """Passes if the value was measured and reaches the threshold."""
        return cls(name, value, threshold, value is not None and value >= threshold)


@dataclass(frozen=True)
class Fidelity:
    """The limits of a file's distance from the unquantized model that it was written from."""

    perplexity_change: float  # largest |perplexity / model's perplexity - 1|
    routing_overlap: float  # smallest mean overlap of the chosen experts
    kld: float  # largest mean divergence, nats
    top1: float  # smallest share of positions with the same token most probable


@dataclass(frozen=True)
class Band:
    """Files of about the same bits per weight, and the fidelity expected of them."""

    name: str
    least_bits: float  # bits per weight of the experts, scales included
    fidelity: Fidelity


BANDS = (
    Band("32-bit", 24.0, Fidelity(0.001, 0.99, 0.0005, 0.99)),
    Band("16-bit", 12.0, Fidelity(0.003, 0.97, 0.005, 0.97)),
    Band("8-bit", 7.0, Fidelity(0.005, 0.97, 0.01, 0.96)),
    Band("6-bit", 6.25, Fidelity(0.01, 0.95, 0.015, 0.94)),
    Band("5-bit", 5.0, Fidelity(0.02, 0.92, 0.03, 0.92)),
    Band("4-bit", 4.0, Fidelity(0.05, 0.85, 0.06, 0.88)),
    Band("3-bit", 3.0, Fidelity(0.15, 0.75, 0.2, 0.8)),
    Band("2-bit", 0.0, Fidelity(0.5, 0.5, 0.6, 0.65)),
)
"""From the most bits down. Limits of divergence and same top are looser than the known figures of good files.

Published mean divergences (nats) of quantized, unpruned models, llama-perplexity on wikitext: Llama-3-8B (llama.cpp,
tools/perplexity/README.md) q8_0 0.0014, q6_K 0.0055 with 96.0 % same top, q5_K_M 0.0108, q4_K_M 0.031 with 91.9 %,
q3_K_M 0.084 to 0.10, iq3_XXS 0.18, q2_K 0.33 to 0.45 with 71 %; Qwen3.6-35B-A3B (model card of mudler's APEX files)
Q8_0 0.0059, where batches decide ties between experts, Q5 0.0083, Q4 0.0138, Q3 0.0435; 4-bit files of
Qwen3.5-35B-A3B from 0.0102 to 0.0524. The logits of float16 models alone differ by 0.00055. Nobody has published
routing overlaps: their limits, and those of perplexity, come from our own two trained models down to 4 bits, and are
guesses below.
"""


def band_of(bits_per_weight: float) -> Band:
    """The band of a file."""
    return next(band for band in BANDS if bits_per_weight >= band.least_bits)


REQUIREMENTS: Mapping[str, str] = {
    "kld": "largest mean divergence from the teacher, in nats",
    "top1": "smallest share of positions where teacher and file find the same token most probable",
    "routing": "smallest overlap of a file's experts with the student's in torch",
    "perplexity_change": "largest relative change of perplexity from the student in torch to a file",
    "loops": "largest share of a file's greedy texts that end in a loop; an export measures it",
}
"""The names that ``--require NAME=VALUE`` knows, with their meaning."""


@dataclass(frozen=True)
class Figures:
    """The figures that are judged; None if one was not measured."""

    kld: float | None  # divergence from the original
    top1: float | None
    routing: float | None  # overlap with the unquantized model that the file was written from
    perplexity_change: float | None  # relative to that model
    loops: float | None = None  # share of greedy texts
    loops_allowed: float | None = None  # the largest share that is not significantly more than the original's


def required_checks(
    artifact: str,
    fidelity: Fidelity | None,
    require: Mapping[str, float],
    figures: Figures,
    *,
    is_routed: bool,
    is_whole: bool,
) -> list[Check]:
    """The fidelity checks of one artifact: the defaults, replaced and extended by required ones.

    Args:
        artifact: the beginning of the checks' names.
        fidelity: the defaults of its band; None: only required checks are made.
        require: thresholds by name.
        figures: the measured figures.
        is_routed: False for a dense model, whose routing is not checked.
        is_whole: True if the original was quantized and nothing else. No band of divergences exists for models that
            were pruned or merged, so theirs are not checked by default.
    """
    defaults: dict[str, float] = {}
    if fidelity is not None:
        defaults["perplexity_change"] = fidelity.perplexity_change
        if is_routed:
            defaults["routing"] = fidelity.routing_overlap
        if figures.loops_allowed is not None:
            defaults["loops"] = figures.loops_allowed
        if is_whole:
            defaults |= {"kld": fidelity.kld, "top1": fidelity.top1}
    thresholds = defaults | dict(require)
    return [
        judge(f"{artifact}.{name}", getattr(figures, name), thresholds[name])
        for name, judge in _JUDGES.items()
        if name in thresholds and (is_routed or name != "routing")
    ]


_JUDGES: Mapping[str, Callable[[str, float | None, float], Check]] = {
    "perplexity_change": Check.at_most,
    "routing": Check.at_least,
    "kld": Check.at_most,
    "top1": Check.at_least,
    "loops": Check.at_most,
}
