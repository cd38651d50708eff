"""A student as a Hugging Face checkpoint: one safetensors file per layer, its index, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import prod
from pathlib import Path

import torch

from compressors.model.config.reading import language_model_config
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.tensors import Fused, Kind, TensorSpec
from compressors.model.sources.adapters import adapter_names
from compressors.model.sources.student import Student
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.file_names import SHARED_BASES
from exporter.writing.files import write_atomically
from exporter.writing.pieces import Piece, row_slices, write_pieces
from exporter.writing.resumable import Part, is_published, resuming
from exporter.writing.tokenizer_copy import copy_tokenizer

__all__ = ["write_checkpoint"]

_COPIED = ("tokenizer*", "*.jinja", "generation_config.json", "LICENSE*")
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""safetensors' names, in the order in which it stores tensors."""


def write_checkpoint(
    student: Student, folder: Path, *, resume: bool = False, progress: Callable[[int], None] | None = None
) -> None:
    """Writes the student, a few tensors or slices at a time; ``config.json`` comes last.

    Args:
        student: the model to write; experts get its numbers and one tensor per projection, as on the hub. A
            dense one becomes a checkpoint of the family's dense counterpart. Experts that stand on shared bases are
            not written, but the bases and their adapters, which :func:`exporter.api.load_student` puts together.
        folder: the folder, which is created.
        resume: continue the files that an attempt for the same student left in ``folder``, and leave them there
            if this one fails. Without it the folder must not exist.
        progress: called with 1 after each layer.

    Raises:
        InputError: a tensor cannot be read, or the disk is full.
        UnsupportedError: the student's layers differ.
    """
    refuse_unless_held(student.spec, Container.STUDENT)
    folder.mkdir(parents=True, exist_ok=resume)
    n_blocks = len(student.spec.blocks)
    n_files = n_blocks + 1
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(n_files):
        is_layer = number < n_blocks
        tensors = list(_layer(student, number)) if is_layer else _outside_of_layers(student)
        file = folder / f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        _write_file(student, tensors, file, resume=resume)
        weight_map |= {tensor.name: file.name for tensor in tensors}
        total_bytes += sum(tensor.n_bytes for tensor in tensors)
        if progress is not None and is_layer:
            progress(1)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    _write_config(student, folder)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, to be read when its turn comes.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: the dtype of its values.
        sources: the tensors of the student that it consists of, one after another.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[_Source | _FusedExpert | _Factor, ...]

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Source:
    """One tensor of the student."""

    role: Role
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]

    @property
    def slices(self) -> list[slice]:
        """Rows that are read together: some of a large matrix."""
        n_rows = self.shape[0]
        if self.expert is not None or len(self.shape) == 1:
            return [slice(0, n_rows)]
        return row_slices(n_rows, prod(self.shape[1:]))


@dataclass(frozen=True)
class _FusedExpert:
    """One expert's values in a tensor that holds all experts of a layer.

    Attributes:
        parts: the expert's matrices that lie together there, the first part first.
        layer: the layer.
        expert: the expert.
        shape: their shape in the tensor.
    """

    parts: tuple[TensorSpec, ...]
    layer: int
    expert: int
    shape: tuple[int, ...]

    @property
    def slices(self) -> list[slice]:
        """All rows at once."""
        return [slice(0, self.shape[0])]


@dataclass(frozen=True)
class _Factor:
    """A base that experts stand on, or one of the two factors of their adapters.

    Attributes:
        read: reads its values.
        shape: their shape.
    """

    read: Callable[[], torch.Tensor]
    shape: tuple[int, ...]

    @property
    def slices(self) -> list[slice]:
        """All rows at once."""
        return [slice(0, self.shape[0])]


def _outside_of_layers(student: Student) -> list[_Tensor]:
    return [_tensor(student, tensor) for tensor in student.spec.written.tensors]


def _layer(student: Student, layer: int) -> Iterator[_Tensor]:
    """The layer's tensors: first those outside of experts, then each expert's."""
    written = student.spec.written.blocks[layer]
    for tensor in written.shared_tensors:
        if not student.spec.tensor(tensor.role, layer).is_per_expert:
            yield _tensor(student, tensor, layer)
    shared = student.shared(layer)
    for expert in range(student.spec.blocks[layer].n_experts):
        for tensor in written.tensors:
            is_apart = tensor.fused is None or not tensor.fused.is_only_form or shared is not None
            is_whole = shared is None or shared.base_of[expert] is None or tensor.kind is not Kind.MATRIX
            if student.spec.tensor(tensor.role, layer).is_per_expert and is_apart and is_whole:
                yield _tensor(student, tensor, layer, expert)
    if shared is None:
        yield from _fused(student, layer)
    else:
        yield from _on_bases(student, layer, shared)


def _on_bases(student: Student, layer: int, shared: SharedBases) -> Iterator[_Tensor]:
    """The bases of a layer, once each, and the adapters of the experts on them, by their names in overlays."""
    spec = student.spec.blocks[layer]
    assert spec.routed is not None, "a layer with bases has experts"
    for base in range(shared.n_bases):
        for role in (*spec.routed.input_roles, Role.EXPERT_DOWN):
            source = _Factor(partial(student.base, role, layer, base), student.spec.dimensions(role, layer))
            yield _Tensor(student.base_name(role, layer, base), source.shape, student.expert_dtype, (source,))
    for expert in shared.replaced:
        for roles in (spec.routed.input_roles, (Role.EXPERT_DOWN,)):
            rows, columns = student.spec.dimensions(roles[0], layer)
            shapes = ((len(roles), shared.rank, columns), (len(roles), rows, shared.rank))
            names = adapter_names(student.name(roles[0], layer, expert))
            for factor, (name, shape) in enumerate(zip(names, shapes, strict=True)):
                read = partial(_read_factor, student, roles, layer, expert, factor)
                yield _Tensor(name, shape, torch.float32, (_Factor(read, shape),))


def _read_factor(student: Student, roles: Sequence[Role], layer: int, expert: int, factor: int) -> torch.Tensor:
    """A (0) or B (1) of the matrices that an adapter is for."""
    return torch.stack([student.adapter(role, layer, expert)[factor] for role in roles])


def _fused(student: Student, layer: int) -> Iterator[_Tensor]:
    """The tensors that hold all experts of a layer, in families whose checkpoints never hold each by itself."""
    of_layer = student.spec.written.blocks[layer]
    by_name: dict[str, list[TensorSpec]] = {}
    for tensor in of_layer.expert_tensors:
        if tensor.fused is not None and tensor.fused.is_only_form:
            by_name.setdefault(tensor.fused.name.format(layer=layer), []).append(tensor)
    for name, parts in by_name.items():
        experts = range(of_layer.n_experts)
        dtypes = (student.dtype(part.role, layer, expert) for expert in experts for part in parts)
        rows, columns = of_layer.dimensions(parts[0])
        shape = _layout(parts[0]).of_expert(rows, columns)
        sources = tuple(_FusedExpert(tuple(parts), layer, expert, shape) for expert in experts)
        yield _Tensor(name, (len(experts), *shape), reduce(torch.promote_types, dtypes), sources)


def _layout(tensor: TensorSpec) -> Fused:
    assert tensor.fused is not None
    return tensor.fused


def _tensor(student: Student, tensor: TensorSpec, layer: int | None = None, expert: int | None = None) -> _Tensor:
    """A tensor under its name in files; for a dense counterpart it is the only expert's."""
    shape, dtype = student.spec.written.dimensions(tensor.role, layer), student.dtype(tensor.role, layer, expert)
    source = _Source(tensor.role, layer, expert, shape)
    return _Tensor(tensor.name.format(layer=layer, expert=expert), shape, dtype, (source,))


def _write_file(student: Student, tensors: Sequence[_Tensor], path: Path, *, resume: bool) -> None:
    """Writes the same file as ``safetensors.torch.save_file``, without holding more than a few slices."""
    order = list(_DTYPE_NAMES)
    stored = sorted(tensors, key=lambda tensor: (order.index(tensor.dtype), tensor.name))
    header = _header(stored)
    pieces = [Piece(len(header), len(header), lambda: lambda: [(0, memoryview(header))])]
    for tensor in stored:
        for source in tensor.sources:
            row_bytes = prod(source.shape[1:]) * tensor.dtype.itemsize
            for rows in source.slices:
                n_bytes, start = (rows.stop - rows.start) * row_bytes, pieces[-1].end
                read = partial(_read, student, source, tensor.dtype, rows, start)
                pieces.append(Piece(n_bytes, start + n_bytes, read))
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


def _read(
    student: Student, source: _Source | _FusedExpert | _Factor, dtype: torch.dtype, rows: slice, offset: int
) -> Callable[[], list[Part]]:
    if isinstance(source, _FusedExpert):
        values = torch.empty(source.shape, dtype=dtype)
        for part in source.parts:
            _layout(part).matrix(values).copy_(student.expert(part.role, source.layer, source.expert))
    elif isinstance(source, _Factor):
        values = source.read()
    elif source.expert is not None and source.layer is not None:
        values = student.expert(source.role, source.layer, source.expert)
    elif len(source.shape) == 1:
        values = student.tensor(source.role, source.layer)
    else:
        values = student.rows(source.role, source.layer, rows)
    return lambda: [(offset, values.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)]


def _write_config(student: Student, folder: Path) -> None:
    source = student.source
    for pattern in _COPIED:
        for file in source.tokenizer_folder.glob(pattern):
            if file.is_file():  # no folder, pipe or device
                shutil.copyfile(file, folder / file.name)
    copy_tokenizer(source.tokenizer_folder, folder)
    bases = [layer.bases for layer in student.spec.layers]
    if any(bases):
        layers = [None if shared is None else shared.to_json() for shared in bases]
        write_atomically(folder / SHARED_BASES, json.dumps({"layers": layers}))
    written, config = student.spec.written, language_model_config(source.config)
    write_atomically(folder / "config.json", json.dumps(written.family.edited(written, config), indent=1))
