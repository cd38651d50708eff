"""The exact size of a student's ONNX files, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.description.spec import ModelSpec
from exporter.writing.onnx.graph import build_model
from exporter.writing.onnx.layout import plan_tensors

__all__ = ["predict_size"]


def predict_size(spec: ModelSpec, preset: str, encodings: Mapping[str, str] | None = None) -> int:
    """Returns the exact bytes of ``model.onnx`` and ``model.onnx.data`` together, for any inputs; reads no weight.

    Args:
        spec: the model.
        preset: a name from :data:`exporter.writing.onnx.encodings.PRESETS`.
        encodings: encodings of units that differ from the preset, as in
            :func:`~exporter.writing.onnx.layout.plan_tensors`.

    Raises:
        InputError: there is no such preset, unit or encoding.
        UnsupportedError: the operators cannot hold the model.
    """
    layout = plan_tensors(spec, preset, encodings)
    return layout.data_bytes + int(build_model(layout).ByteSize())
