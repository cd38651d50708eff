"""Writes a student as one GGUF file, streaming: no more than one matrix is held, and only slices of it in float32."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.families import Role
from compressors.model.shape import MoeShape
from compressors.model.student import Student
from compressors.quantize import quantize_rows
from compressors.statistics import Importance
from exporter.files import check_free_space, replacing
from exporter.gguf.container import TensorEntry, aligned, render_header, render_values
from exporter.gguf.layout import GgufTensor, plan_tensors
from exporter.gguf.metadata import model_metadata
from exporter.gguf.vocabulary import vocabulary_metadata

__all__ = ["predict_file_size", "write_gguf"]

_VALUES_PER_TASK = 1 << 20  # 4 MiB in float32: small beside a matrix, large beside the cost of starting a task


def predict_file_size(shape: MoeShape, source_folder: Path, preset: str, name: str) -> int:
    """Exact size in bytes of the file that :func:`write_gguf` would write for a student of this shape.

    ``source_folder`` is the teacher's checkpoint: tokenizer and licence come from there. No weight is read.
    The errors are those of :func:`write_gguf`, apart from the weights'.
    """
    tensors = plan_tensors(shape, preset)
    return _file_size(_header(shape, source_folder, preset, name, tensors), tensors)


def write_gguf(
    student: Student,
    preset: str,
    path: Path,
    *,
    importance: Importance | None = None,
    name: str,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes ``path``; on any failure nothing is left behind and a file that was there stays as it was.

    The bytes depend on the student, the preset, the importance and the name, not on the number of threads.
    ``progress`` is called with the number of bytes written since its last call.

    Raises:
        InputError: a weight is not finite, the tokenizer is damaged, or the disk is full.
        UnsupportedError: llama.cpp cannot represent the model.
    """
    tensors = plan_tensors(student.shape, preset)
    header = _header(student.shape, student.source.folder, preset, name, tensors)
    expected_size = _file_size(header, tensors)
    check_free_space(path.parent, expected_size)
    report = progress or (lambda n_bytes: None)
    with replacing(path) as file, ThreadPoolExecutor(threads) as pool:
        file.write(header)
        report(len(header))
        for tensor in tensors:
            start = file.tell()
            for rows in _in_order(pool, _row_tasks(student, tensor, importance or {}), ahead=2 * threads):
                file.write(rows.data)
                report(rows.nbytes)
            written = file.tell() - start
            assert written == tensor.n_bytes, f"{tensor.name}: {written} bytes written, {tensor.n_bytes} declared"
            file.write(bytes(aligned(written) - written))
        assert file.tell() == expected_size, f"{path}: {file.tell()} bytes written, {expected_size} declared"


def _header(shape: MoeShape, source_folder: Path, preset: str, name: str, tensors: tuple[GgufTensor, ...]) -> bytes:
    metadata = {
        **model_metadata(shape, source_folder, name, preset),
        **vocabulary_metadata(source_folder, shape.vocab_size),
    }
    entries = (TensorEntry(tensor.name, tensor.shape, tensor.ggml_type, tensor.n_bytes) for tensor in tensors)
    return render_header(len(metadata), render_values(metadata), entries)


def _file_size(header: bytes, tensors: tuple[GgufTensor, ...]) -> int:
    return len(header) + sum(aligned(tensor.n_bytes) for tensor in tensors)


@dataclass(frozen=True)
class _RowTask:
    """Some rows of one matrix, to be quantized."""

    values_RN: torch.Tensor  # storage dtype
    importance_N: torch.Tensor | None
    tensor: GgufTensor
    name: str

    def run(self) -> npt.NDArray[np.uint8]:
        importance = None if self.importance_N is None else self.importance_N.float().numpy()
        values = self.values_RN.float().numpy()
        return quantize_rows(values, self.tensor.ggml_type, importance, name=self.name)


def _row_tasks(student: Student, tensor: GgufTensor, importance: Importance) -> Iterator[_RowTask]:
    """The tensor's rows in order, each matrix read when its first rows are asked for."""
    weights = importance.get((tensor.role, tensor.layer))
    rows_per_task = max(1, _VALUES_PER_TASK // tensor.row_length)
    for expert, name, matrix_RN in _matrices(student, tensor):
        weights_N = weights if weights is None or expert is None else weights[expert]
        for rows_RN in matrix_RN.split(rows_per_task):
            yield _RowTask(rows_RN, weights_N, tensor, name)


def _matrices(student: Student, tensor: GgufTensor) -> Iterator[tuple[int | None, str, torch.Tensor]]:
    """(expert, name on disk, values in storage dtype) of each matrix; a norm is a matrix of one row."""
    if tensor.role.is_expert:
        assert tensor.layer is not None
        for expert in range(student.shape.n_experts):
            name = student.name(tensor.role, tensor.layer, expert)
            yield expert, name, student.expert(tensor.role, tensor.layer, expert)
        return
    values = student.tensor(tensor.role, tensor.layer)
    if student.family.gguf.rotary_is_interleaved and tensor.role in (Role.QUERY, Role.KEY):
        n_heads = student.shape.n_heads if tensor.role is Role.QUERY else student.shape.n_kv_heads
        values = _interleave_rotary_rows(values, n_heads)
    yield None, student.name(tensor.role, tensor.layer), values.reshape(-1, tensor.row_length)


def _interleave_rotary_rows(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Puts the rows of each head that one rotation mixes, i and i + head_dim / 2, side by side.

    ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``.
    """
    n_rows, n_inputs = weight.shape
    return weight.reshape(n_heads, 2, n_rows // n_heads // 2, n_inputs).transpose(1, 2).reshape(n_rows, n_inputs)


def _in_order(pool: ThreadPoolExecutor, tasks: Iterator[_RowTask], ahead: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Results in the order of the tasks, with at most ``ahead`` tasks waiting or done before their turn."""
    waiting: deque[Future[npt.NDArray[np.uint8]]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task.run))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
