"""Limits how slow the types of a file may make decoding, relative to the named mix of about its size."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.searching.decode_cost import seconds_of
from exporter.searching.units import fitting_mixes
from exporter.searching.untyped_file import UntypedFile
from exporter.writing.gguf.layout import plan_tensors
from exporter.writing.gguf.type_table import weights_of_a_token

__all__ = ["most_seconds"]

_TIMES_AS_SLOW: Mapping[str, float] = {"quality": 1.25, "speed": 1.0}
"""Limits by ``--prefer``. Codebook types have the lowest divergence for their bytes, but a CPU decodes them slowly."""


def most_seconds(untyped: UntypedFile, prefer: str) -> float | None:
    """The most seconds to decode a token; None if no mix fits, or the artifact is not GGUF."""
    mixes = fitting_mixes(untyped) if untyped.artifact == "gguf" else []
    if not mixes:
        return None
    spec, choice = untyped.spec, mixes[0][0]
    of_mix = sum(
        seconds_of(tensor.ggml_type.name, weights_of_a_token(spec, tensor))
        for tensor in plan_tensors(spec, choice.mix)
        if tensor.is_matrix
    )
    return _TIMES_AS_SLOW[prefer] * of_mix
