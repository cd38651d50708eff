"""``lightmoe.png``: the divergence of every arm, a panel for each model and share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.lightmoe.arms import LIGHT
from benchmarks.lightmoe.measure import Measured
from benchmarks.lightmoe.table import found
from benchmarks.quality.chart import lay_out_divergences

__all__ = ["write_chart"]

_TRAINED, _UNTRAINED = "#0072B2", "white"


def write_chart(results: Sequence[Measured], path: Path, shares: Sequence[float]) -> None:
    """Draws a dot for each arm, sorted; hollow where nothing was trained."""
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    models = list(dict.fromkeys(result.model for result in results))
    figure, panels = pyplot.subplots(len(shares), len(models), figsize=(6.4 * len(models), 3.8 * len(shares)))
    for row, share in zip(panels, shares, strict=True):
        for panel, model in zip(row, models, strict=True):
            chosen = found(results, model, share)
            for place, result in enumerate(chosen):
                fill = _UNTRAINED if result.arm.endswith("not trained") else _TRAINED
                panel.plot(result.divergence, place, "o", color=_TRAINED, mfc=fill, ms=6, zorder=3)
            panel.set_yticks(range(len(chosen)), [result.arm for result in chosen], fontsize=8)
            for label, result in zip(panel.get_yticklabels(), chosen, strict=True):
                label.set_fontweight("bold" if result.arm == LIGHT else "normal")
            panel.set_title(f"{model}: {share:.0%} of the experts' bytes removed", fontsize=10)
            lay_out_divergences(panel)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
