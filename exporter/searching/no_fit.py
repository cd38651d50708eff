"""The refusal of a budget that no file meets."""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.errors import BudgetError
from exporter.estimating.sizes import format_size
from exporter.planning.recipe import BudgetChoice

__all__ = ["nothing_fits"]


def nothing_fits(budget: BudgetChoice, least: Mapping[str, tuple[int, str]]) -> BudgetError:
    """The error names the smallest budget that all formats meet, and the formats that meet this one.

    Args:
        budget: is smaller than one of the files.
        least: for each format (``gguf``, ``onnx``) the bytes of the smallest file, as the budget counts them, and a
            description of its student.
    """
    artifact = max(least, key=lambda name: least[name][0])
    n_bytes, student = least[artifact]
    counted = "" if budget.kind == "file" else f" of memory at {budget.context} tokens of context"
    fitting = [name for name, (size, _) in least.items() if size <= budget.bytes]
    alone = f", and {fitting[0].upper()} alone fits yours: --formats {fitting[0]}" if fitting else ""
    return BudgetError(
        f"nothing fits a budget of {format_size(budget.bytes)}: with {student} the smallest {artifact.upper()} file "
        f"needs {format_size(n_bytes)}{counted}. "
        f"The smallest budget that works is --budget {n_bytes}B{alone}"
    )
