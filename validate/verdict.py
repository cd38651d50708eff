"""Pass or fail: measured values against stated thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["REQUIREMENTS", "Check", "Fidelity", "fidelity_for", "required_checks"]


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
    """How near a file must come to the unquantized student that it was written from."""

    perplexity_change: float  # largest |perplexity / student's perplexity - 1|
    routing_overlap: float  # smallest mean overlap of the chosen experts


_FIDELITY = {
    "F32": Fidelity(0.001, 0.99),
    "BF16": Fidelity(0.003, 0.97),
    "Q8_0": Fidelity(0.005, 0.97),
    "Q6_K": Fidelity(0.01, 0.95),
    "Q5_1": Fidelity(0.02, 0.92),
    "Q5_K": Fidelity(0.02, 0.92),
    "Q5_0": Fidelity(0.02, 0.92),
    "Q4_K": Fidelity(0.05, 0.85),
    "Q4_0": Fidelity(0.05, 0.85),
}


def fidelity_for(weight_type: str) -> Fidelity:
    """The default thresholds for a type of weights."""
    return _FIDELITY[weight_type]


REQUIREMENTS: Mapping[str, str] = {
    "kld": "largest mean divergence from the teacher, in nats",
    "top1": "smallest share of positions where teacher and file find the same token most probable",
    "routing": "smallest overlap of a file's experts with the student's in torch",
    "perplexity_change": "largest relative change of perplexity from the student in torch to a file",
}
"""Names that ``--require NAME=VALUE`` knows."""


def required_checks(
    artifact: str,
    weight_type: str,
    require: Mapping[str, float],
    *,
    is_routed: bool,
    kld: float | None,
    top1: float | None,
    routing: float | None,
    perplexity_change: float | None,
) -> list[Check]:
    """The fidelity checks of one artifact: defaults of its type, replaced and joined by what was required.

    A dense model is not ``is_routed``: nothing is asked of its routing.
    """
    default = fidelity_for(weight_type)
    checks = [
        Check.at_most(
            f"{artifact}.perplexity_change",
            perplexity_change,
            require.get("perplexity_change", default.perplexity_change),
        ),
    ]
    if is_routed:
        checks.append(Check.at_least(f"{artifact}.routing", routing, require.get("routing", default.routing_overlap)))
    if "kld" in require:
        checks.append(Check.at_most(f"{artifact}.kld", kld, require["kld"]))
    if "top1" in require:
        checks.append(Check.at_least(f"{artifact}.top1", top1, require["top1"]))
    return checks
