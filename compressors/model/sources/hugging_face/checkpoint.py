"""A Hugging Face checkpoint on disk, read lazily: headers at once, tensors one at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.config.reading import language_model_config, read_spec
from compressors.model.description.family import Family
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import Kind, TensorSpec
from compressors.model.description.transforms import SAME
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.gguf.mxfp4 import MXFP4_SUFFIXES
from compressors.model.files.json_file import read_json
from compressors.model.files.safetensors_header import TensorHeader
from compressors.model.files.storage_type import StorageType
from compressors.model.files.weight_file import WeightFile
from compressors.model.names import shown
from compressors.model.sources.hugging_face.accounting import is_scale_of_activations, parts_read_past, unclaimed
from compressors.model.sources.hugging_face.float8 import FLOAT8, GIVE_THE_ORIGINAL, Float8, scales_of
from compressors.model.sources.hugging_face.foreign_folder import check_folder
from compressors.model.sources.hugging_face.fused_experts import FusedExperts, Mxfp4Experts
from compressors.model.sources.hugging_face.misfits import is_classifier, likely_cause, with_prefix
from compressors.model.sources.hugging_face.mtp_part import MODEL_TABLES, find_mtp, refuse_more_mtp
from compressors.model.sources.hugging_face.output_head import is_own_head
from compressors.model.sources.hugging_face.quantized_config import read_float8, read_mxfp4_type
from compressors.model.sources.hugging_face.unknown_family import refuse_unknown_family
from compressors.model.sources.hugging_face.weight_folder import INDEX, SINGLE, find_weights, oddities

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

_FORMATS = ("F32", "F16", "BF16")
_READ = ", ".join(_FORMATS)
_CODES = "U8"  # the format of MXFP4's codes and scales


class Checkpoint:
    """The tensors of a MoE checkpoint by role, in their storage dtype.

    Opening reads only headers (and, where a head stands beside a tied embedding, these two), and checks that every
    tensor the family needs is there with the shape that ``config.json`` implies. Both layouts are read: one tensor per
    expert, and all experts of a layer fused. Names without ``model.``, from a model saved without its head, are read
    too. Float8 with scales, and experts in MXFP4, are read as the dtype that ``config.json`` names.

    Args:
        folder: the checkpoint.
        keeps_mtp: the layer that predicts one more token is a part of the model; else it is read past.

    Raises:
        InputError: a file is missing, truncated or not safetensors; a tensor is missing or of the wrong shape or dtype.
        UnsupportedError: the checkpoint is quantized in another way, is not a language model, or has a setting that
            cannot be represented.
    """

    def __init__(self, folder: Path, *, keeps_mtp: bool = False) -> None:
        self.path = folder
        check_folder(folder)
        refuse_unknown_family(folder)
        self.float8: Float8 | None = read_float8(folder)
        self.spec: ModelSpec = read_spec(folder)
        self.config: Mapping[str, Any] = read_json(self.config_path)
        self._mxfp4_type = read_mxfp4_type(folder, self.spec)
        self._weights = find_weights(folder)
        self.files = self._weights.files
        self._opened = {file: WeightFile(file) for file in self.files}
        self.headers: dict[str, TensorHeader] = {}  # by the names of the whole language model
        for opened in self._opened.values():
            prefixes = self.spec.family.prefixes
            self.headers.update({with_prefix(name, prefixes): header for name, header in opened.tensors.items()})
        self._check_tensors()
        if self._has_own_head():
            self.spec = replace(self.spec, tied_embeddings=False)
        if keeps_mtp:
            self._add_mtp()

    @property
    def config_path(self) -> Path:
        """The file that the settings are from."""
        return self.path / "config.json"

    @property
    def tokenizer_folder(self) -> Path:
        """The checkpoint's folder: all files lie in one."""
        return self.path

    @property
    def family(self) -> Family:
        """The architecture."""
        return self.spec.family

    @property
    def stored_as(self) -> str | None:
        """The format of the files' quantized weights; None: they hold none."""
        if self.float8 is not None:
            return self.float8.describe(self.headers)
        has_codes = self._mxfp4_type is not None and any(name.endswith(MXFP4_SUFFIXES) for name in self.headers)
        return "experts in MXFP4" if has_codes else None

    @property
    def storage_type(self) -> StorageType:
        """The format of the experts' values."""
        with_experts = next(index for index, layer in enumerate(self.spec.blocks) if layer.n_experts)
        down = self.spec.tensor(Role.EXPERT_DOWN, with_experts)
        fused = self._fused(down, with_experts)
        return self._storage_type(down.name.format(layer=with_experts, expert=0) if fused is None else fused.main)

    @property
    def dtype(self) -> torch.dtype:
        """The same as torch's dtype."""
        return self.storage_type.dtype

    def dtype_of(self, role: Role, layer: int | None = None) -> torch.dtype:
        """Storage dtype of a tensor outside of experts."""
        return self._storage_type(self._name(role, layer)).dtype

    @property
    def n_bytes(self) -> int:
        """Size in bytes of all weights in storage dtype."""
        scales = {scales_of(name, self.headers) for name, header in self.headers.items() if header.format == FLOAT8}
        if self.float8 is not None:
            scales |= {name for name in self.headers if is_scale_of_activations(name)}
        as_they_are = sum(
            math.prod(header.shape) * self._storage_type(name).itemsize if header.format == FLOAT8 else header.n_bytes
            for name, header in self.headers.items()
            if name not in scales and header.format != _CODES
        )
        return as_they_are + sum(
            layer.n_values(tensor) * self._mxfp4_type.itemsize
            for index, layer in enumerate(self.spec.blocks)
            for tensor in layer.expert_tensors
            if self._mxfp4_type is not None and isinstance(self._fused(tensor, index), Mxfp4Experts)
        )

    @property
    def parts_read_past(self) -> Mapping[str, int]:
        """Parts of the files that are no part of the model, in words, each with its number of tensors."""
        claimed = {name for name, _ in self.expected_shapes()}
        return parts_read_past(self.headers, claimed, self.spec, is_float8=self.float8 is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Oddities of the files that can still be read: sentences without a full stop."""
        return tuple(oddities(self._weights, {file: opened.tensors for file, opened in self._opened.items()}))

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role outside of experts, in storage dtype; a tied head is the embedding."""
        return self.rows(role, layer, slice(None))

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of a tensor outside of experts, in storage dtype."""
        return self._read_rows(self._name(role, layer), rows)

    def _read_rows(self, name: str, rows: slice) -> torch.Tensor:
        import torch

        n_rows, *rest = self.headers[name].shape
        start, stop, _ = rows.indices(n_rows)
        out = torch.empty(stop - start, *rest, dtype=self._storage_type(name).dtype)
        self._read_into(name, out, start * (out[0].numel() if len(out) else 0))
        return out

    def expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One expert's gate [F, D], up [F, D] or down [D, F] projection, in storage dtype."""
        import torch

        out = torch.empty(self.spec.dimensions(role, layer), dtype=self.dtype)
        self.read_expert(role, layer, expert, out)
        return out

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous and of the expert's shape, with the values that :meth:`expert` returns."""
        tensor = self.spec.tensor(role, layer)
        fused = self._fused(tensor, layer)
        if fused is None:
            self._read_into(tensor.name.format(layer=layer, expert=expert), out, 0)
        else:
            fused.read(expert, out, self._read_into)

    def stored_types(self, role: Role, layer: int | None) -> tuple[GGMLQuantizationType, ...]:
        """ggml's MXFP4 for experts that are stored in it; nothing for all others."""
        tensor = self.spec.tensor(role, layer)
        is_mxfp4 = layer is not None and isinstance(self._fused(tensor, layer), Mxfp4Experts)
        is_alike = [part.transform for part in tensor.gguf_parts] == [SAME]
        return (GGMLQuantizationType.MXFP4,) if is_mxfp4 and is_alike else ()

    def stored_rows(
        self, role: Role, layer: int | None, part: int, rows: slice, expert: int | None = None
    ) -> torch.Tensor:
        """Rows of an expert in ggml's MXFP4, uint8 [rows, bytes]."""
        assert layer is not None and expert is not None, "only experts are stored in blocks"
        fused = self._fused(self.spec.tensor(role, layer), layer)
        assert isinstance(fused, Mxfp4Experts), "only such experts are asked for"
        return fused.ggml_rows(expert, self._read_into)[rows]

    def identity(self) -> str:
        """SHA-256 over ``config.json`` and the header of every weight file: equal for equal checkpoints."""
        digest = hashlib.sha256(self.config_path.read_bytes())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size} {self._opened[file].header_sha256}".encode())
        return digest.hexdigest()

    def expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the family needs, as (name on disk, shape)."""
        for tensor in self.spec.written.tensors:
            yield tensor.name, self.spec.dimensions(tensor.role)
        for index in range(len(self.spec.blocks)):
            yield from self._expected_in_layer(index)

    def _expected_in_layer(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        layer = self.spec.blocks[index]
        for tensor in layer.shared_tensors:
            yield tensor.name.format(layer=index), layer.dimensions(tensor)
        yield from self._expected_experts(index)

    def _expected_experts(self, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        layer = self.spec.blocks[index]
        apart = []
        for tensor in layer.expert_tensors:
            fused = self._fused(tensor, index)
            if fused is None:
                apart.append(tensor)
            elif fused.fused.part == 0:
                yield from fused.tensors(layer.n_experts).items()
        shapes = [(tensor.name, layer.dimensions(tensor)) for tensor in apart]
        for expert in range(layer.n_experts):
            for name, shape in shapes:
                yield name.format(layer=index, expert=expert), shape

    def _fused(self, tensor: TensorSpec, layer: int) -> FusedExperts | Mxfp4Experts | None:
        """The tensors that hold all experts of a layer; None if each expert has its own."""
        if tensor.fused is None:
            return None
        name = tensor.fused.name.format(layer=layer)
        rows, columns = self.spec.blocks[layer].dimensions(tensor)
        if name not in self.headers and self._mxfp4_type is not None and tensor.fused.may_be_mxfp4:
            return Mxfp4Experts(name, tensor.fused, rows, columns)
        if name in self.headers or tensor.fused.is_only_form:
            return FusedExperts(name, tensor.fused, rows, columns)
        return None

    def _has_own_head(self) -> bool:
        """True if the weights hold a head that differs from the embedding although ``tie_word_embeddings`` is true."""
        names = [self.spec.tensor(role).name for role in (Role.HEAD, Role.TOKEN_EMBEDDING)]
        if not self.spec.tied_embeddings or names[0] not in self.headers:
            return False
        self._check(names[0], self.spec.dimensions(Role.HEAD))
        return self._differ(*names)

    def _differ(self, *names: str) -> bool:
        """True if two tensors with a row for each token differ."""
        one, other = (partial(self._read_rows, name) for name in names)
        state = [(file, stat.st_size, stat.st_mtime_ns) for file in self.files for stat in [file.stat()]]
        return is_own_head((*state, *names), self.spec.vocab_size, one, other)

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        if (problem := self._problem(name, expected)) is not None:
            raise InputError(problem)
        self._check_scales(name)

    def _add_mtp(self) -> None:
        """Makes the layer that predicts one more token a part of the model.

        It has tables of its own only where they differ from the model's, which llama.cpp takes in their place.
        """
        layer, index = find_mtp(self.spec, self.headers, self.path), self.spec.n_layers
        self.spec = replace(self.spec, mtp=layer)
        for name, expected in self._expected_in_layer(index):
            self._check(name, expected)
        refuse_more_mtp(self.spec, self.headers, {name for name, _ in self._expected_in_layer(index)}, self.path)
        copies = [
            tensor
            for tensor in layer.tensors
            if tensor.kind is Kind.TABLE
            and not self._differ(tensor.name.format(layer=index), self._name(MODEL_TABLES[tensor.role], None))
        ]
        kept = tuple(tensor for tensor in layer.tensors if tensor not in copies)
        self.spec = replace(self.spec, mtp=replace(layer, tensors=kept))

    def _check_tensors(self) -> None:
        config = language_model_config(self.config)
        if (classifier := is_classifier(config, self.headers)) is not None:
            raise UnsupportedError(f"{self.path}: {classifier}")
        claimed = dict(self.expected_shapes())
        for name, expected in claimed.items():
            problem = self._problem(name, expected)
            if problem is not None:
                cause = self._likely_cause(config, name)
                raise InputError(problem if cause is None else f"{self.path}: {cause}")
            self._check_scales(name)
        self._refuse_unclaimed(config, claimed)

    def _refuse_unclaimed(self, config: Mapping[str, Any], claimed: Collection[str]) -> None:
        """Refuses the first tensor that the description does not know."""
        names = unclaimed(self.headers, claimed, self.spec, is_float8=self.float8 is not None)
        name = next(names, None)
        if name is None:
            return
        cause = self._likely_cause(config, name)
        if cause is not None:
            raise InputError(f"{self.path}: {cause}")
        raise UnsupportedError(
            f"{self.headers[name].file}: tensor {shown(name)} belongs to no part of a {self.family.architecture} with "
            "this config.json; without it another model would be read. Give the config.json that the weights were "
            "saved with, or the original checkpoint"
        )

    def _likely_cause(self, config: Mapping[str, Any], name: str) -> str | None:
        is_quantized = self.float8 is not None or self._mxfp4_type is not None
        return likely_cause(self.path, config, self.headers, name, is_quantized=is_quantized)

    def _problem(self, name: str, expected: tuple[int, ...]) -> str | None:
        """Says what is wrong with a tensor that the family needs; None if nothing is."""
        header = self.headers.get(name)
        if header is None:
            return f"{self.path}: tensor {name} is in none of the weight files; {self._where_to_look(name)}"
        if header.shape != expected:
            return (
                f"{header.file}: tensor {name} has shape {list(header.shape)}, but config.json implies "
                f"{list(expected)}; config and weights do not belong together"
            )
        has_dtype = f"{header.file}: tensor {name} has dtype {header.format}"
        if self._mxfp4_type is not None and name.endswith(MXFP4_SUFFIXES):
            is_right = header.format == _CODES
            return None if is_right else f"{has_dtype}; codes and scales of MXFP4 are {_CODES}"
        if header.format == FLOAT8 and self.float8 is None:
            return f"{has_dtype}, but config.json has no quantization_config; without, only {_READ} are read"
        if header.format not in (*_FORMATS, FLOAT8):
            return f"{has_dtype}; only {_READ}, and {FLOAT8} with scales, are read: {GIVE_THE_ORIGINAL}"
        return None

    def _where_to_look(self, name: str) -> str:
        if self._weights.beside_index:
            return f"{SINGLE} is read, as transformers does, and not {INDEX} beside it: remove the one that is old"
        if self._weights.without_index:
            return f"{INDEX} is missing: download it, and the files that it names"
        if name in self._weights.index:
            return f"the index says that it lies in {shown(self._weights.index[name])}: download that file again"
        return "download them again"

    def _check_scales(self, name: str) -> None:
        header, scales = self.headers[name], self._scales(name)
        if header.format == FLOAT8 and self.float8 is not None:
            self.float8.check(header, scales)
        elif scales is not None:
            raise InputError(
                f"{header.file}: tensor {name} has dtype {header.format}, but scales for float8 "
                f"({shown(scales.name)}); remove them, or download the files again"
            )

    def _scales(self, name: str) -> TensorHeader | None:
        scales = scales_of(name, self.headers)
        return None if scales is None else self.headers[scales]

    def _name(self, role: Role, layer: int | None) -> str:
        if role is Role.HEAD and self.spec.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        return self.spec.tensor(role, layer).name.format(layer=layer)

    def _storage_type(self, name: str) -> StorageType:
        header = self.headers[name]
        if header.format == FLOAT8 and self.float8 is not None:
            return self.float8.storage_type
        if header.format == _CODES and self._mxfp4_type is not None:
            return self._mxfp4_type
        return header.storage_type

    def _read_into(self, name: str, out: torch.Tensor, first: int) -> None:
        header, scales = self.headers[name], self._scales(name)
        if self.float8 is not None and header.format == FLOAT8 and scales is not None:
            self.float8.fill(out, first, self._located(header), self._located(scales))
        else:
            file, stored = self._located(header)
            file.read_into(stored, out, first)

    def _located(self, header: TensorHeader) -> tuple[WeightFile, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        return self._opened[header.file], header.name
