"""The sentence on a budget that no file meets."""

from __future__ import annotations

from exporter.planning.recipe import BudgetChoice
from exporter.searching.no_fit import nothing_fits


def _budget(kind: str) -> BudgetChoice:
    return BudgetChoice.model_validate({"bytes": 90_000_000, "kind": kind, "context": 2048, "kv_type": "f16"})


def test_the_larger_file_is_named_and_the_format_that_fits() -> None:
    error = nothing_fits(_budget("total"), {"gguf": (75_000_000, "4 experts"), "onnx": (125_000_000, "8 experts")})
    assert str(error) == (
        "nothing fits a budget of 90.0 MB (85.8 MiB): with 8 experts the smallest ONNX file needs 125.0 MB (119.2 MiB) "
        "of memory at 2048 tokens of context. The smallest budget that works is --budget 125000000B, "
        "and GGUF alone fits yours: --formats gguf"
    )


def test_no_format_is_recommended_where_none_fits() -> None:
    error = nothing_fits(_budget("file"), {"gguf": (95_000_000, "4 experts"), "onnx": (91_000_000, "8 experts")})
    assert str(error) == (
        "nothing fits a budget of 90.0 MB (85.8 MiB): with 4 experts the smallest GGUF file needs 95.0 MB (90.6 MiB). "
        "The smallest budget that works is --budget 95000000B"
    )
