"""``quality.png``: the divergence of every method at the larger share, both models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from benchmarks.quality.measure import Measured
from benchmarks.quality.methods import ARMS, FREQUENCY, SHARES
from benchmarks.quality.table import by_divergence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["lay_out_divergences", "write_chart"]

_WIDE = 100  # the largest divergence of an axis, in relation to the least

# Okabe and Ito's colours, which are told apart with any colour vision
_COLOURS = {
    "prune": "#0072B2",
    "merge": "#D55E00",
    "slim": "#009E73",
    "decompose": "#CC79A7",
    "drop": "#E69F00",
    "sparsity": "#7F7F7F",
}


def write_chart(results: Sequence[Measured], path: Path) -> None:
    """Draws one dot for each method, sorted; hollow where no file gets smaller."""
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    models = list(dict.fromkeys(result.model for result in results))
    share = max(SHARES)
    height = 1.6 + 0.24 * max(len(by_divergence(results, model, share)) for model in models)
    figure, panels = pyplot.subplots(1, len(models), figsize=(6.2 * len(models), height), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        shown = [result for result in by_divergence(results, model, share) if result.divergence is not None]
        for place, result in enumerate(shown):
            colour = _COLOURS[result.kind]
            filled = not result.smaller_files.startswith("no")
            panel.plot(result.divergence, place, "o", color=colour, mfc=colour if filled else "white", ms=6, zorder=3)
            if result.method == FREQUENCY:
                panel.axvline(result.divergence, color="black", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(shown)), [result.method for result in shown], fontsize=8)
        for label, result in zip(panel.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if result.method == FREQUENCY else "normal")
        panel.set_title(f"{model}: {share:.0%} of expert parameters removed, no recovery", fontsize=10)
        lay_out_divergences(panel)
    kinds = [kind for kind in _COLOURS if any(arm.kind == kind for arm in ARMS.values())]
    legend = [Line2D([], [], marker="o", linestyle="", color=_COLOURS[kind], label=kind) for kind in kinds]
    legend.append(Line2D([], [], marker="o", linestyle="", color="black", mfc="white", label="no file gets smaller"))
    legend.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label="frequency pruning"))
    figure.legend(handles=legend, loc="lower center", ncols=4 * len(models), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def lay_out_divergences(panel: Axes) -> None:
    """Gives a panel a logarithmic axis of divergences, and its rows from the top."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.invert_yaxis()
    panel.set_xscale("log")
    lowest, highest = panel.get_xlim()
    labelled = (1, 2, 5) if highest < _WIDE * lowest else (1,)  # or the labels of a wide axis overlap
    panel.xaxis.set_major_locator(LogLocator(subs=labelled))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_xlabel("KL divergence from the original, nats (left is better)", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
