"""Writes ``model.onnx`` and ``model.onnx.data``: the graph at once, the weights one expert or row chunk at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.errors import InputError
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.quantize import GGMLQuantizationType, quantize_rows
from compressors.statistics import Importance
from exporter.files import check_free_space, replacing
from exporter.onnx.blocks import from_q4_0, from_q8_0
from exporter.onnx.graph import build_model
from exporter.onnx.layout import DATA_FILE, MODEL_FILE, Encoding, TensorLayout, TensorPlan, WeightPlan, plan_tensors

__all__ = ["predict_size", "with_context", "write_onnx"]

_GGML_TYPES = {
    Encoding.FLOAT32: GGMLQuantizationType.F32,
    Encoding.Q4_0: GGMLQuantizationType.Q4_0,
    Encoding.Q8_0: GGMLQuantizationType.Q8_0,
}
_CHUNK_VALUES = 4 << 20  # of a matrix that is no expert: 16 MiB of float32 at a time


def with_context(shape: MoeShape, context_length: int | None) -> MoeShape:
    """The model with a shorter context, which its rotary caches are made for; None keeps the model's own.

    Raises:
        InputError: the context is longer than the model's, or not positive.
    """
    if context_length is None:
        return shape
    if not 0 < context_length <= shape.context_length:
        raise InputError(
            f"a context of {context_length} tokens is asked for; the model has 1 to {shape.context_length}"
        )
    return replace(shape, context_length=context_length)


def predict_size(shape: MoeShape, preset: str, context_length: int | None = None) -> int:
    """Bytes of ``model.onnx`` and ``model.onnx.data`` together, exactly; reads no weight.

    Raises:
        InputError: there is no such preset, or the context does not fit the model.
        UnsupportedError: the preset cannot hold the model.
    """
    layout = plan_tensors(with_context(shape, context_length), preset)
    return layout.data_bytes + int(build_model(layout).ByteSize())


def write_onnx(
    student: Student,
    preset: str,
    folder: Path,
    *,
    importance: Importance | None = None,
    context_length: int | None = None,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the student's graph and weights into ``folder``, which is made if it is missing.

    Weights are quantized with ggml's kernels, so a GGUF file of the same types and importance holds the same numbers.
    The bytes do not depend on ``threads``. ``model.onnx`` appears last: a folder without it is unfinished. On any
    failure nothing is left behind, and a model that was there stays as it was.

    Args:
        student: the model to write.
        preset: a name from :data:`exporter.onnx.layout.PRESETS`.
        folder: where the two files go.
        importance: weighs quantization errors; None weighs all input features alike.
        context_length: tokens that the rotary caches cover; None for the model's own maximum.
        threads: experts or row chunks that are quantized at a time.
        progress: is called with the number of bytes written since its last call.

    Raises:
        InputError: no such preset or context; a weight is not finite or cannot be read; the disk is full.
        UnsupportedError: the preset cannot hold the model.
    """
    layout = plan_tensors(with_context(student.shape, context_length), preset)
    model = build_model(layout)
    folder.mkdir(parents=True, exist_ok=True)
    check_free_space(folder, layout.data_bytes + model.ByteSize())
    with replacing(folder / MODEL_FILE) as graph_stream:
        graph_stream.write(model.SerializeToString(deterministic=True))
        with replacing(folder / DATA_FILE) as stream, ThreadPoolExecutor(threads) as pool:
            _DataWriter(student, layout, importance or {}, stream, progress).write(pool)
            (folder / MODEL_FILE).unlink(missing_ok=True)  # an old graph must not be found beside the new weights


class _DataWriter:
    """Fills the data file: every tensor at its planned offset, and exactly the planned bytes of it."""

    def __init__(
        self,
        student: Student,
        layout: TensorLayout,
        importance: Importance,
        stream: BinaryIO,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._student = student
        self._layout = layout
        self._importance = importance
        self._stream = stream
        self._lock = threading.Lock()
        self._progress = progress
        self._written = 0

    def write(self, pool: ThreadPoolExecutor) -> None:
        """Writes all weights and caches and checks their bytes against the plan."""
        self._stream.truncate(self._layout.data_bytes)
        for weight in self._layout.weights:
            jobs = self._expert_jobs(weight) if weight.roles[0].is_expert else self._matrix_jobs(weight)
            before = self._written
            for n_bytes in pool.map(lambda job: job(), jobs):
                self._advance(n_bytes)
            declared = sum(tensor.n_bytes for tensor in weight.tensors)
            assert self._written - before == declared, f"{weight.codes.name}: {declared} bytes planned, not written"
        for plan, values in zip(
            (self._layout.rotary_cosine, self._layout.rotary_sine), _rotary_caches(self._layout.shape), strict=True
        ):
            self._advance(self._put(plan, 0, values.numpy()))

    def _advance(self, n_bytes: int) -> None:
        self._written += n_bytes
        if self._progress is not None:
            self._progress(n_bytes)

    def _expert_jobs(self, weight: WeightPlan) -> Iterator[Callable[[], int]]:
        for expert in range(weight.shape[0]):
            yield partial(self._write_expert, weight, expert)

    def _write_expert(self, weight: WeightPlan, expert: int) -> int:
        """Reads, quantizes and writes one expert; rows of its roles alternate."""
        assert weight.layer is not None
        parts = []
        for role in weight.roles:
            values = self._student.expert(role, weight.layer, expert)
            importance = self._importance.get((role, weight.layer))
            row_importance = None if importance is None else importance[expert]
            parts.append(_quantize(weight, values, row_importance, f"{weight.codes.name}[{expert}] ({role})"))
        rows = np.stack(parts, axis=1).reshape(-1, parts[0].shape[1])
        return self._put_rows(weight, expert * len(rows), rows)

    def _matrix_jobs(self, weight: WeightPlan) -> Iterator[Callable[[], int]]:
        values_RN = self._student.tensor(weight.roles[0], weight.layer).reshape(-1, weight.shape[-1])
        n_rows = max(1, _CHUNK_VALUES // values_RN.shape[1])
        for first in range(0, len(values_RN), n_rows):
            yield partial(self._write_rows, weight, first, values_RN[first : first + n_rows])

    def _write_rows(self, weight: WeightPlan, first: int, values_RN: torch.Tensor) -> int:
        importance = self._importance.get((weight.roles[0], weight.layer))
        return self._put_rows(weight, first, _quantize(weight, values_RN, importance, weight.codes.name))

    def _put_rows(self, weight: WeightPlan, first: int, rows: npt.NDArray[np.uint8]) -> int:
        """Stores ggml rows, the first of which is row ``first`` of the weight; returns their bytes in the file."""
        if weight.scales is None:
            return self._put(weight.codes, first, rows)
        blocks = from_q4_0(rows) if weight.encoding is Encoding.Q4_0 else from_q8_0(rows)
        return self._put(weight.codes, first, blocks.codes) + self._put(weight.scales, first, blocks.scales_RN)

    def _put(self, tensor: TensorPlan, first_row: int, rows: npt.NDArray[np.generic]) -> int:
        data = np.ascontiguousarray(rows).tobytes()
        start = first_row * (len(data) // len(rows))
        assert start + len(data) <= tensor.n_bytes, f"{tensor.name} overflows"
        with self._lock:
            self._stream.seek(tensor.offset + start)
            return self._stream.write(data)


def _quantize(
    weight: WeightPlan, values_RN: torch.Tensor, importance_N: torch.Tensor | None, name: str
) -> npt.NDArray[np.uint8]:
    """ggml rows of the weight's encoding: uint8 [R, row bytes]."""
    importance = None if importance_N is None else importance_N.float().numpy()
    return quantize_rows(values_RN.float().numpy(), _GGML_TYPES[weight.encoding], importance, name=name)


def _rotary_caches(shape: MoeShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, float32 [context, head_dim / 2], as transformers computes them."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / (shape.rope_theta**exponents)
    angles = torch.outer(torch.arange(shape.context_length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()
