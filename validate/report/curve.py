"""The page of a curve of divergence against bytes: its plot and its table in one self-contained file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

from validate.report.html import environment
from validate.report.tables import Table

__all__ = ["render_curve"]


def render_curve(name: str, explanation: Sequence[str], table: Table, plot: bytes) -> str:
    """Renders a curve as one page that asks for nothing from outside.

    Args:
        name: the model's name.
        explanation: paragraphs that say what was measured.
        table: a row for each file.
        plot: the plot as a PNG file's bytes.

    Returns:
        The page. Equal arguments give equal text.
    """
    template = environment().get_template("curve.html.j2")
    return template.render(name=name, explanation=explanation, table=table, plot=b64encode(plot).decode("ascii"))
