"""What a decoder's ONNX graph must take in and give out to be run by us."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from compressors.model.errors import InputError

__all__ = ["check_decoder", "float_type"]

_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def float_type(values: Sequence[onnxruntime.NodeArg], name: str) -> np.dtype[Any]:
    """numpy's type of a cache or of the logits, among a session's inputs or outputs."""
    return next(_NUMPY_TYPES[value.type] for value in values if value.name == name)


def check_decoder(path: Path, session: onnxruntime.InferenceSession, cache_sizes: Collection[str]) -> None:
    """Refuses a graph that cannot be fed, naming what is in the way.

    Args:
        path: of the graph.
        session: the loaded graph.
        cache_sizes: names of the cache inputs whose size is known.

    Raises:
        InputError: an input is unknown, or something is missing or of another type.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    caches = [name for name in inputs if name.startswith("past_key_values.")]
    unknown = set(inputs) - set(caches) - {"input_ids", "attention_mask", "position_ids"}
    absent = ({"input_ids"} - set(inputs)) | ({"logits"} - set(outputs))
    absent |= {name.replace("past_key_values", "present") for name in caches} - set(outputs)
    what = "it is no decoder as onnxruntime-genai and optimum export them; export it with a key-value cache"
    if unknown or absent:
        sentence = [f"input {', '.join(sorted(unknown))} is unknown"] if unknown else []
        sentence += [f"{', '.join(sorted(absent))} is missing"] if absent else []
        raise InputError(f"{path}: {' and '.join(sentence)}: {what}")
    strange = [inputs[name] for name in caches if inputs[name].type not in _NUMPY_TYPES]
    strange += [outputs["logits"]] if outputs["logits"].type not in _NUMPY_TYPES else []
    if strange:
        raise InputError(f"{path}: {strange[0].name} is of type {strange[0].type}; float32 and float16 can be run")
    if set(cache_sizes) != set(caches) or not isinstance(outputs["logits"].shape[-1], int):
        raise InputError(f"{path} does not declare the size of its cache or of its vocabulary: {what}")
