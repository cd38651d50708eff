"""The inputs and outputs that a decoder's ONNX graph must have so that we can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from compressors.model.errors import InputError
from compressors.model.files.onnx_names import NUM_LOGITS_TO_KEEP, continued_cache, is_cache_input, is_state

__all__ = [
    "CacheShape",
    "bind_logits_to_keep",
    "cache_shapes",
    "check_decoder",
    "float_type",
    "keeps_last_logits",
    "sized",
    "token_inputs",
]

_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}

CacheShape = tuple[int | None, ...]
"""The sizes of a cache without the batch; None stands for the number of tokens."""

_INTEGERS = ("tensor(int64)", "tensor(int32)")
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CACHE_RANK, _LOGITS_RANK = 4, 3


def float_type(values: Sequence[onnxruntime.NodeArg], name: str) -> np.dtype[Any]:
    """The numpy type of a cache or of the logits, among a session's inputs or outputs."""
    return next(_NUMPY_TYPES[value.type] for value in values if value.name == name)


def cache_shapes(session: onnxruntime.InferenceSession) -> dict[str, CacheShape]:
    """Cache inputs by name, as outputs or inputs declare their sizes; others are left out."""
    outputs = {output.name: output.shape for output in session.get_outputs()}
    found = {}
    for value in session.get_inputs():
        if is_cache_input(value.name):
            declared = (outputs.get(continued_cache(value.name), []), value.shape)
            shapes = (_cache_shape(value.name, shape) for shape in declared)
            shape = next((shape for shape in shapes if shape is not None), None)
            if shape is not None:
                found[value.name] = shape
    return found


def _cache_shape(name: str, declared: Sequence[int | str | None]) -> CacheShape | None:
    """The sizes behind the batch: all of a state, or heads, tokens and width of keys or values; None: not all known."""
    sizes = [size if isinstance(size, int) else None for size in declared[1:]]
    if not is_state(name):
        heads, _, width = sizes if len(declared) == _CACHE_RANK else (None, None, None)
        return None if heads is None or width is None else (heads, None, width)
    return tuple(sizes) if sizes and None not in sizes else None


def sized(shape: CacheShape, n_texts: int, n_tokens: int) -> tuple[int, ...]:
    """The sizes of a cache of so many texts with room for so many tokens."""
    return (n_texts, *(n_tokens if size is None else size for size in shape))


def token_inputs(
    session: onnxruntime.InferenceSession, tokens: npt.NDArray[np.int64], past_length: int
) -> dict[str, npt.NDArray[np.int64]]:
    """The token inputs that the graph has: not every exporter feeds positions."""
    end = past_length + len(tokens)
    values = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, end), dtype=np.int64),
        "position_ids": np.arange(past_length, end, dtype=np.int64)[None],
    }
    known = {value.name: value for value in session.get_inputs()}
    return {
        name: array.astype(np.int32) if known[name].type == "tensor(int32)" else array
        for name, array in values.items()
        if name in known
    }


def keeps_last_logits(session: onnxruntime.InferenceSession) -> bool:
    """True if the graph makes logits of a text's last position alone, unless it is asked for more."""
    return any(value.name == NUM_LOGITS_TO_KEEP for value in session.get_overridable_initializers())


def bind_logits_to_keep(binding: onnxruntime.IOBinding, n_positions: int) -> None:
    """Asks such a graph for the logits of so many last positions; 0: of all."""
    number = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(n_positions, dtype=np.int64))
    binding.bind_ortvalue_input(NUM_LOGITS_TO_KEEP, number)  # arrays cannot be bound to inputs with a default


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
    if len(logits) != _LOGITS_RANK or not isinstance(logits[-1], int) or set(cache_shapes(session)) != set(caches):
        raise InputError(f"{path} does not declare the size of its cache or of its vocabulary: {what}")
