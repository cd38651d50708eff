"""A student as a Hugging Face checkpoint: one safetensors file per layer, its index, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from compressors.model.description.legacy import role_shape
from compressors.model.description.roles import Role
from compressors.model.files.json_file import read_json
from compressors.model.sources.student import Student
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.writing.files import write_atomically
from exporter.writing.pieces import Piece, row_slices, write_pieces
from exporter.writing.resumable import Part, is_published, resuming
from exporter.writing.tokenizer_copy import copy_tokenizer

__all__ = ["write_checkpoint"]

_COPIED = ("tokenizer*", "*.jinja", "generation_config.json", "LICENSE*")
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors calls them, in the order in which it stores them."""


def write_checkpoint(
    student: Student, folder: Path, *, resume: bool = False, progress: Callable[[int], None] | None = None
) -> None:
    """Writes the student, a few tensors or slices at a time; ``config.json`` comes last.

    Args:
        student: what to write; experts get the student's numbers and one tensor per projection, as on the hub. A
            dense one becomes a checkpoint of the family's dense counterpart.
        folder: is made.
        resume: go on with what an attempt for the same student left in ``folder``, and leave what is written there
            if this one fails. Without it the folder must not exist.
        progress: called with 1 after each layer.

    Raises:
        InputError: a tensor cannot be read, or the disk is full.
        UnsupportedError: its layers differ.
    """
    refuse_unless_held(student.spec, Container.STUDENT)
    folder.mkdir(parents=True, exist_ok=resume)
    n_files = student.spec.n_layers + 1
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(n_files):
        tensors = list(_layer(student, number) if number < student.spec.n_layers else _global(student))
        file = folder / f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        _write_file(student, tensors, file, resume=resume)
        weight_map |= {tensor.name: file.name for tensor in tensors}
        total_bytes += sum(tensor.n_bytes for tensor in tensors)
        if progress is not None and number < student.spec.n_layers:
            progress(1)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    _write_config(student, folder)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the student, to be read when its turn comes."""

    name: str
    role: Role
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def _layer(student: Student, layer: int) -> Iterator[_Tensor]:
    for role in student.spec.layer_roles(layer):
        if role in student.spec.stored_roles:
            yield _tensor(student, role, layer)
    for expert in range(student.spec.n_experts):
        for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
            yield _tensor(student, role, layer, expert)


def _global(student: Student) -> Iterator[_Tensor]:
    for role in student.spec.stored_roles:
        if role.is_global:
            yield _tensor(student, role)


def _tensor(student: Student, role: Role, layer: int | None = None, expert: int | None = None) -> _Tensor:
    name, dtype = student.spec.stored_name(role, layer, expert), student.dtype(role, layer, expert)
    return _Tensor(name, role, layer, expert, role_shape(role, student.spec), dtype)


def _write_file(student: Student, tensors: Sequence[_Tensor], path: Path, *, resume: bool) -> None:
    """Writes what ``safetensors.torch.save_file`` would, without holding more than a few slices."""
    order = list(_DTYPE_NAMES)
    stored = sorted(tensors, key=lambda tensor: (order.index(tensor.dtype), tensor.name))
    header = _header(stored)
    pieces = [Piece(len(header), len(header), lambda: lambda: [(0, memoryview(header))])]
    for tensor in stored:
        n_rows = tensor.shape[0]
        row_bytes = tensor.n_bytes // n_rows
        whole = tensor.expert is not None or len(tensor.shape) == 1
        start = pieces[-1].end
        for rows in [slice(0, n_rows)] if whole else row_slices(n_rows, tensor.shape[1]):
            end = start + rows.stop * row_bytes
            n_bytes = end - pieces[-1].end
            pieces.append(Piece(n_bytes, end, partial(_read, student, tensor, rows, pieces[-1].end)))
    if resume and is_published(path, pieces):
        return
    with resuming(path, header, pieces, keep=resume) as file:
        write_pieces(file, pieces, threads=1)


def _header(tensors: Sequence[_Tensor]) -> bytes:
    """The header's length in 8 bytes, then JSON, padded so that the tensors are aligned to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.n_bytes
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _read(student: Student, tensor: _Tensor, rows: slice, offset: int) -> Callable[[], list[Part]]:
    if tensor.expert is not None and tensor.layer is not None:
        values = student.expert(tensor.role, tensor.layer, tensor.expert)
    elif len(tensor.shape) == 1:
        values = student.tensor(tensor.role, tensor.layer)
    else:
        values = student.rows(tensor.role, tensor.layer, rows)
    return lambda: [(offset, values.contiguous().reshape(-1).view(torch.uint8).numpy().data)]


def _write_config(student: Student, folder: Path) -> None:
    source = student.source.folder
    config = read_json(source / "config.json")
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():  # no folder, pipe or device
                shutil.copyfile(file, folder / file.name)
    copy_tokenizer(source, folder)
    write_atomically(folder / "config.json", json.dumps(student.spec.in_config(config), indent=1))
