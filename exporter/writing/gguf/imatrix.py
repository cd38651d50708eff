"""Reads llama.cpp's importance matrices into our own, and writes them for its tools.

A file has, for each matrix of a model, the sum of squares of each input feature and the number of tokens in the sum;
for the experts of a layer, it has both for each expert. ``llama-imatrix`` writes two formats, GGUF and the older one
that is called dat (``common/imatrix-loader.cpp``); :func:`read_imatrix` turns both, to the last bit, into the vectors
that ``llama-quantize`` makes of them (``load_imatrix`` in ``tools/quantize/quantize.cpp``).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from compressors.calibration.statistics import Importance, LayerStatistics
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.gguf_file import GgufEntry, GgufFile
from compressors.model.files.raw_file import RawFile
from compressors.model.names import shown
from compressors.model.sources.student import ExpertMap
from exporter.writing.files import replacing
from exporter.writing.gguf.container import (
    TensorEntry,
    aligned,
    render_header,
    render_values,
    string,
    string_array,
    uint32,
)
from exporter.writing.gguf.layout import PlannedTensor, plan_tensors

__all__ = ["read_imatrix", "write_imatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK_TOKENS = 512
_MAGIC = b"GGUF"
_LONGEST_NAME = 1000  # bytes
_MADE_ELSEWHERE = "it was made of another model; make one of this model with llama-imatrix, or leave it out"
_DAMAGED = "is neither a GGUF file nor llama.cpp's older format of importance matrices, or is cut off"

_Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Entry:
    """The sums and counts that a file has for one matrix, or for all experts of a layer."""

    sums: _Array  # flat
    counts: _Array  # numbers of tokens, one for each expert or one for all

    def means(self) -> _Array:
        """The vectors that llama-quantize uses, flat: ones where there were no tokens."""
        sums_EN = self.sums.reshape(len(self.counts), -1)
        counted_E = self.counts > 0
        means_EN = np.ones_like(sums_EN)
        means_EN[counted_E] = sums_EN[counted_E] / self.counts[counted_E, None]
        return means_EN.reshape(-1)


def read_imatrix(path: Path, spec: ModelSpec) -> Importance:
    """Reads the importance of every matrix of this model from a file of llama.cpp.

    ``llama-imatrix`` leaves out the embedding, and the head unless told otherwise. The vector of an expert that no
    token reached is all ones, which weighs all input features alike.

    Raises:
        InputError: the file is damaged, or belongs to another model; the message names the matrix.
    """
    entries = _read_gguf(path) if RawFile(path).start(len(_MAGIC)) == _MAGIC else _read_dat(path)
    found: Importance = {}
    for tensor in plan_tensors(spec, "F32"):
        if not tensor.is_matrix:
            continue
        if tensor.name in entries:
            importance = _of_inputs(tensor, _importance(path, tensor, entries[tensor.name]), spec)
            if importance is not None:
                found.setdefault((tensor.role, tensor.layer), importance)
        elif _is_counted(tensor, spec):
            raise InputError(f"{path} has nothing about {tensor.name}: {_MADE_ELSEWHERE}")
    _check_layers(path, entries, spec)
    return found


def _importance(path: Path, tensor: PlannedTensor, entry: _Entry) -> torch.Tensor:
    """The importance of a tensor: float32 [inputs], or [E, inputs] for the experts of a layer."""
    n_matrices = _n_matrices(tensor)
    expected = n_matrices * tensor.row_length
    if len(entry.sums) != expected or len(entry.counts) not in (1, n_matrices):
        raise InputError(
            f"{path} has {len(entry.sums)} values for {len(entry.counts)} matrices about {tensor.name}, which needs "
            f"{expected} for {n_matrices}: {_MADE_ELSEWHERE}"
        )
    means = entry.means()
    if not np.isfinite(means).all() or (means < 0).any():
        raise InputError(f"{path}: what it has about {tensor.name} holds NaN, infinity or a negative value; remake it")
    vectors = torch.from_numpy(means).reshape(-1, tensor.row_length)
    return vectors if tensor.n_experts else vectors.mean(0) if n_matrices > 1 else vectors[0]


def _of_inputs(tensor: PlannedTensor, importance: torch.Tensor, spec: ModelSpec) -> torch.Tensor | None:
    """The importance of the inputs of the model's tensor; None if the file's tensor has other inputs."""
    places = _input_places(tensor, importance.shape[-1], spec)
    if places is None:
        return None
    found = torch.empty_like(importance)
    found[..., places] = importance
    return found


def _input_places(tensor: PlannedTensor, n_inputs: int, spec: ModelSpec) -> torch.Tensor | None:
    """The index in the model's tensor of each input of the file's tensor; None if the inputs differ."""
    sizes = {} if tensor.layer is None else spec.blocks[tensor.layer].sizes
    return tensor.transform.inputs(torch.arange(n_inputs), sizes)


def _check_layers(path: Path, entries: Mapping[str, _Entry], spec: ModelSpec) -> None:
    for name in entries:
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= len(spec.blocks):
            raise InputError(
                f"{path} has {shown(name)}, but the model has {len(spec.blocks)} layers: {_MADE_ELSEWHERE}"
            )


def _read_gguf(path: Path) -> dict[str, _Entry]:
    file = GgufFile(path)
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if not names:
        raise InputError(f"{path} is a GGUF file, but not an importance matrix; give what llama-imatrix wrote")
    entries = {}
    for name in names:
        sums, counts = (file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS))
        if sums is None or counts is None or not {sums.ggml_type, counts.ggml_type} == {GGMLQuantizationType.F32}:
            raise InputError(f"{path}: sums and counts of {shown(name)} are not both there in F32; make the file again")
        entries[name] = _entry(path, name, _read(file, sums), np.rint(_read(file, counts)))
    return entries


def _read(file: GgufFile, entry: GgufEntry) -> _Array:
    n_rows = entry.n_bytes // max(1, entry.row_bytes)
    values: _Array = file.read_rows(entry, 0, n_rows).reshape(-1).view(np.float32)
    return values


def _entry(path: Path, name: str, sums: _Array, counts: _Array) -> _Entry:
    if not len(counts) or len(sums) % len(counts):
        raise InputError(f"{path} has {len(sums)} values for {len(counts)} matrices about {shown(name)}; make it again")
    return _Entry(sums, counts)


def _read_dat(path: Path) -> dict[str, _Entry]:
    """Reads the older format: sums over means of chunks, and the number of chunks, the same for all experts."""
    reader = _DatReader(path)
    entries = {}
    for _ in range(reader.number(at_least=1)):
        name = reader.text()
        n_chunks, n_values = reader.number(), reader.number(at_least=1)
        sums = reader.floats(n_values)
        entries[name] = _Entry(sums, np.array([n_chunks or 1], dtype=np.float32))
    return entries


class _DatReader:
    """Reads numbers and texts one after another.

    Raises:
        InputError: the next bytes are something else, or the file ends.
    """

    def __init__(self, path: Path) -> None:
        self._file = RawFile(path)
        self._offset = 0

    def number(self, *, at_least: int = 0) -> int:
        """A signed integer of 32 bits that is no smaller than this."""
        (value,) = struct.unpack("<i", self._bytes(4))
        if value < at_least:
            raise InputError(f"{self._file.path} {_DAMAGED}")
        return int(value)

    def text(self) -> str:
        """A text with its length before it."""
        return self._bytes(min(self.number(), _LONGEST_NAME)).decode("utf-8", errors="replace")

    def floats(self, n_values: int) -> _Array:
        """The next ``n_values`` float32 values."""
        return np.frombuffer(self._bytes(4 * n_values), dtype="<f4")

    def _bytes(self, n_bytes: int) -> bytes:
        if n_bytes > self._file.size - self._offset:
            raise InputError(f"{self._file.path} {_DAMAGED}")
        data = self._file.start(n_bytes, self._offset)
        self._offset += n_bytes
        return data


def write_imatrix(
    path: Path, spec: ModelSpec, layers: Sequence[LayerStatistics], experts: ExpertMap, datasets: Sequence[str]
) -> None:
    """Writes the statistics of a calibration in llama.cpp's GGUF format, for ``llama-quantize --imatrix``.

    Args:
        path: the file; it is complete or absent.
        spec: the model that the file is for.
        layers: the statistics of each layer of the model that was watched.
        experts: the parts of that model that this one has; :meth:`ExpertMap.identity` if it has them all.
        datasets: names of the texts that were calibrated on.

    Raises:
        InputError: the file cannot be written.
    """
    tensors = [tensor for tensor in plan_tensors(spec, "F32") if _is_counted(tensor, spec)]
    n_chunks = int(layers[experts.layers[0].source].n_tokens) // _CHUNK_TOKENS
    metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": string_array(datasets),
        "imatrix.chunk_count": uint32(n_chunks),
        "imatrix.chunk_size": uint32(_CHUNK_TOKENS),
    }
    directory = [entry for tensor in tensors for entry in _directory(tensor)]
    with replacing(path) as file:
        file.write(render_header(len(metadata), render_values(metadata), directory))
        for values in _in_file(tensors, _values(tensors, layers, experts, spec), spec):
            data = values.astype("<f4").tobytes()
            file.write(data.ljust(aligned(len(data)), b"\0"))


def _is_counted(tensor: PlannedTensor, spec: ModelSpec) -> bool:
    """True if importance matrices must have this tensor, because a calibration sees its inputs."""
    is_in_layer = tensor.is_matrix and tensor.layer is not None
    return is_in_layer and _input_places(tensor, tensor.row_length, spec) is not None


def _directory(tensor: PlannedTensor) -> Iterator[TensorEntry]:
    n_matrices = _n_matrices(tensor)
    for suffix, length in ((_SUMS, tensor.row_length), (_COUNTS, 1)):
        n_bytes = 4 * n_matrices * length
        yield TensorEntry(tensor.name + suffix, (n_matrices, length), GGMLQuantizationType.F32, n_bytes)


def _n_matrices(tensor: PlannedTensor) -> int:
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def _in_file(
    tensors: Sequence[PlannedTensor], values: Iterator[npt.NDArray[np.float64]], spec: ModelSpec
) -> Iterator[npt.NDArray[np.float64]]:
    """Yields the sums and counts of the model's tensors in the order of the file's tensors, for each matrix."""
    for tensor in tensors:
        sums, counts = next(values), next(values)
        if not tensor.n_experts:
            sums, counts = (np.tile(value.reshape(1, -1), (_n_matrices(tensor), 1)) for value in (sums, counts))
        places = _input_places(tensor, tensor.row_length, spec)
        yield sums[..., places]
        yield counts


def _values(
    tensors: Sequence[PlannedTensor], layers: Sequence[LayerStatistics], experts: ExpertMap, spec: ModelSpec
) -> Iterator[npt.NDArray[np.float64]]:
    """Yields the sums, then the counts, of each matrix."""
    for tensor in tensors:
        assert tensor.layer is not None
        came_from = experts.blocks[tensor.layer]
        layer = layers[came_from.source]
        kept = list(came_from.kept)
        if not tensor.n_experts:
            input_role = spec.tensor(tensor.role, tensor.layer).input_role
            yield from (layer.input_squares[input_role].numpy(), layer.n_tokens.numpy())
        else:
            is_down = tensor.role is Role.EXPERT_DOWN
            sums = layer.down_input_square_EF if is_down else layer.gate_up_input_square_ED
            yield from (sums[kept].numpy(), layer.count_E[kept].numpy())
