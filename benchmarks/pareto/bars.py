"""Compares our files with the divergences that were promised for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from exporter.curve.rows import OURS, ParetoRow, best_no_larger

__all__ = ["SIZES_IN_BYTES", "SIZES_OF_PRESETS", "THIRD", "Judged", "judged"]

THIRD = "third"
"""The model that nothing was developed on."""

_RATIOS: Mapping[str, float] = {
    "Q6_K": 1.0,
    "Q5_K_M": 0.7,
    "Q4_K_M": 0.45,
    "IQ4_XS": 0.45,
    "Q3_K_M": 0.45,
    "Q2_K": 0.45,
    "IQ2_M": 0.6,
    "IQ2_XXS": 0.7,
}
"""The largest promised ratio of our divergence to the best baseline's of no more bytes, at the bytes of each preset."""

_THIRD_RATIOS: Mapping[str, float] = {"Q4_K_M": 0.6, "Q2_K": 0.6}

_DIVERGENCES: Mapping[str, Mapping[str, float]] = {
    "fine": {"7.0 MB": 0.025, "6.3 MB": 0.045, "9%": 0.16},
    "coarse": {"5.6 MB": 0.05, "9%": 0.16},
}
"""The largest promised divergence in nats, at sizes below the presets."""

SIZES_IN_BYTES: Mapping[str, Mapping[str, int]] = {
    "fine": {"7.0 MB": 7_000_000, "6.3 MB": 6_300_000},
    "coarse": {"5.6 MB": 5_600_000},
}
"""Sizes by model; a further size is 9 % of the bytes in bfloat16."""

SIZES_OF_PRESETS: Mapping[str, tuple[str, ...]] = {
    "fine": tuple(_RATIOS),
    "coarse": tuple(_RATIOS),
    THIRD: tuple(_THIRD_RATIOS),
}


@dataclass(frozen=True)
class Judged:
    """One of our files beside what was promised."""

    row: ParetoRow
    baseline: ParetoRow | None  # the best of no more bytes; None if none is so small
    bar: float  # the largest promised divergence, nats
    said: str  # the promise

    @property
    def is_kept(self) -> bool:
        """True if the divergence is as low as promised, and no baseline of no more bytes has a lower one."""
        best = float("inf") if self.baseline is None else self.baseline.divergence
        return self.row.divergence <= min(self.bar, best)


def judged(rows: Sequence[ParetoRow]) -> Iterator[Judged]:
    """All of our files for which something was promised, in the order of the table."""
    for row in rows:
        if row.method != OURS:
            continue
        baseline = best_no_larger(rows, row)
        ratios = _THIRD_RATIOS if row.model == THIRD else _RATIOS
        if row.mix in ratios and baseline is not None:
            ratio = ratios[row.mix]
            yield Judged(row, baseline, ratio * baseline.divergence, f"{ratio:g} x")
        elif row.mix in _DIVERGENCES.get(row.model, {}):
            bar = _DIVERGENCES[row.model][row.mix]
            yield Judged(row, baseline, bar, f"{bar:g} nats")
