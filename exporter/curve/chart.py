"""The plot of curves of divergence against bytes, a panel for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressors.model.errors import UnsupportedError
from exporter.curve.rows import OURS, ParetoRow

__all__ = ["require_matplotlib", "write_chart"]

# Okabe and Ito's colours, which are told apart with any colour vision
_OURS_COLOUR = "#D55E00"
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def require_matplotlib() -> None:
    """Refuses to begin hours of work whose plot cannot be drawn in the end.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError("the plot needs matplotlib: pip install matplotlib, or 'moe-export[plot]'") from None


def write_chart(rows: Sequence[ParetoRow], path: Path) -> None:
    """Draws each method as a line through its files; both axes are logarithmic."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(6.4 * len(models), 4.8), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        of_model = [row for row in rows if row.model == model]
        for method, colour in _methods(of_model).items():
            line = sorted((row for row in of_model if row.method == method), key=lambda row: row.n_bytes)
            sizes, values = [row.n_bytes / 1e6 for row in line], [row.divergence for row in line]
            errors = [row.divergence_error for row in line]
            width = 1.8 if method == OURS else 1.0
            panel.errorbar(sizes, values, errors, marker="o", ms=4, lw=width, color=colour, label=method, zorder=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#DDDDDD", linewidth=0.6, which="both")
        panel.set_axisbelow(True)
        panel.set_title(model, fontsize=10)
        panel.set_xlabel("file, MB", fontsize=9)
        panel.set_ylabel("KL divergence from the original in llama.cpp, nats (lower is better)", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _methods(rows: Sequence[ParetoRow]) -> dict[str, str]:
    """Each method's colour."""
    baselines = [method for method in dict.fromkeys(row.method for row in rows) if method != OURS]
    colours = dict(zip(baselines, _COLOURS, strict=False))
    return {**colours, OURS: _OURS_COLOUR} if any(row.method == OURS for row in rows) else colours
