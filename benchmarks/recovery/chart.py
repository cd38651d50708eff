"""``recovery.png``: the divergence that each arm leaves; ``recovery_fine_coarse.png``: both models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from benchmarks.recovery.measure import Measured
from benchmarks.recovery.runs import KINDS, MODELS, SHORT_BLOCKS
from benchmarks.recovery.students import PRUNED
from benchmarks.recovery.table import ladder, short, untaught

__all__ = ["write_comparison", "write_ladder"]

# Okabe and Ito's colours, which are told apart with any colour vision
_COLOURS = {"fine": "#0072B2", "coarse": "#D55E00"}


def write_ladder(results: Sequence[Measured], path: Path) -> None:
    """Draws a dot for each seed of each arm, sorted by what they leave."""
    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot

    arms = [taught for taught in ladder(results, PRUNED) if not taught.diverged]
    before = untaught(results, "fine", PRUNED)
    figure, panel = pyplot.subplots(figsize=(8, 1.4 + 0.3 * len(arms)))
    for place, taught in enumerate(arms):
        values = [result.divergence for result in taught.results]
        panel.plot(values, [place] * len(values), "o", color=_COLOURS["fine"], ms=6, alpha=0.7)
    if before is not None and before.divergence is not None:
        panel.axvline(before.divergence, color="black", linewidth=1, linestyle="--", label="no recovery")
        panel.legend(fontsize=8, frameon=False)
    panel.set_yticks(range(len(arms)), [taught.run.arm for taught in arms], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("fine, 16 of 32 experts left by REAP, 400 thousand tokens", fontsize=10)
    panel.set_xlabel("KL divergence from the original on held-out text, nats (left is better)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


def write_comparison(results: Sequence[Measured], path: Path) -> None:
    """Draws a bar for each model and each way of compressing, and a dot for each seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.5, 3.6))
    for offset, model in zip((-0.2, 0.2), MODELS, strict=True):
        label: str | None = model
        for place, student in enumerate(KINDS):
            taught = short(results, model, student)
            if taught is None or taught.diverged:
                continue
            closed = [100 * share for share in taught.closed]
            panel.bar(place + offset, mean(closed), 0.36, color=_COLOURS[model], alpha=0.55, label=label)
            panel.plot([place + offset] * len(closed), closed, "o", color=_COLOURS[model], ms=5)
            label = None
    panel.set_xticks(range(len(KINDS)), KINDS)
    panel.set_ylabel("share of the divergence that is gone, %", fontsize=9)
    panel.set_title(f"Router KD, {SHORT_BLOCKS * 512:,} tokens, held-out text", fontsize=10)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=9, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
