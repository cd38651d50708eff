"""Shows a run to people: the page, the model card and the last lines in the terminal, all from report.json."""

from __future__ import annotations

from validate.report.curve import render_curve
from validate.report.html import render_html
from validate.report.model_card import render_model_card
from validate.report.parts import render_parts
from validate.report.run import run_instructions, where_the_rest_is
from validate.report.short import short_summary
from validate.report.terminal import summary

__all__ = [
    "render_curve",
    "render_html",
    "render_model_card",
    "render_parts",
    "run_instructions",
    "short_summary",
    "summary",
    "where_the_rest_is",
]
