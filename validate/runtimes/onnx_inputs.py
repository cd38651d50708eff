"""The inputs and outputs that a decoder's ONNX graph must have so that we can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compressors.model.errors import InputError
from compressors.model.files.onnx_names import continued_cache, is_cache_input

__all__ = ["cache_dimensions", "check_decoder", "float_type"]

_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


_INTEGERS = ("tensor(int64)", "tensor(int32)")
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CACHE_RANK, _LOGITS_RANK = 4, 3


def float_type(values: Sequence[onnxruntime.NodeArg], name: str) -> np.dtype[Any]:
    """The numpy type of a cache or of the logits, among a session's inputs or outputs."""
    return next(_NUMPY_TYPES[value.type] for value in values if value.name == name)


def cache_dimensions(session: onnxruntime.InferenceSession) -> dict[str, tuple[int, int]]:
    """Cache inputs by name, as (heads, head width), as outputs or inputs declare them; others are left out."""
    outputs = {output.name: output.shape for output in session.get_outputs()}
    dimensions = {}
    for value in session.get_inputs():
        if is_cache_input(value.name):
            for shape in (outputs.get(continued_cache(value.name), []), value.shape):
                if len(shape) == _CACHE_RANK and isinstance(shape[1], int) and isinstance(shape[3], int):
                    dimensions[value.name] = (shape[1], shape[3])
                    break
    return dimensions


def check_decoder(path: Path, session: onnxruntime.InferenceSession) -> None:
    """Refuses a graph that cannot be fed, naming the reason.

    Args:
        path: the graph.
        session: the loaded graph.

    Raises:
        InputError: an input is unknown, or something is missing or of another type.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    caches = [name for name in inputs if is_cache_input(name)]
    unknown = set(inputs) - set(caches) - set(_TOKEN_INPUTS)
    absent = ({"input_ids"} - set(inputs)) | ({"logits"} - set(outputs))
    absent |= {continued_cache(name) for name in caches} - set(outputs)
    what = "it is no decoder as onnxruntime-genai and optimum export them; export it with a key-value cache"
    if unknown or absent:
        sentence = [f"input {', '.join(sorted(unknown))} is unknown"] if unknown else []
        sentence += [f"{', '.join(sorted(absent))} is missing"] if absent else []
        raise InputError(f"{path}: {' and '.join(sentence)}: {what}")
    numbers = [inputs[name] for name in inputs if name not in caches]
    strange = [value for value in numbers if value.type not in _INTEGERS]
    if strange:
        raise InputError(f"{path}: {strange[0].name} is of type {strange[0].type}; int64 and int32 can be given")
    floats = [
        *(inputs[name] for name in caches),
        *(outputs[continued_cache(name)] for name in caches),
        outputs["logits"],
    ]
    strange = [value for value in floats if value.type not in _NUMPY_TYPES]
    if strange:
        raise InputError(f"{path}: {strange[0].name} is of type {strange[0].type}; float32 and float16 can be run")
    logits = outputs["logits"].shape
    if len(logits) != _LOGITS_RANK or not isinstance(logits[-1], int) or set(cache_dimensions(session)) != set(caches):
        raise InputError(f"{path} does not declare the size of its cache or of its vocabulary: {what}")
