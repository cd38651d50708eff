"""A Hugging Face checkpoint on disk, read lazily: headers at once, tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compressors.model.errors import InputError
from compressors.model.families import Family, Role
from compressors.model.shape import MoeShape, read_shape

__all__ = ["Checkpoint", "TensorHeader", "role_shape"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies, without its values."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size on disk in bytes."""
        elements = 1
        for length in self.shape:
            elements *= length
        return elements * self.dtype.itemsize


class Checkpoint:
    """The tensors of a MoE checkpoint by role, in their storage dtype.

    Opening reads only headers, and checks that every tensor the family needs is there with the shape that
    ``config.json`` implies. Both layouts are read: one tensor per expert, and all experts of a layer fused.

    Raises:
        InputError: a file is missing, truncated or not safetensors; a tensor is missing or of the wrong shape or dtype.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shape: MoeShape = read_shape(folder)
        self.headers: dict[str, TensorHeader] = {}
        self.files = _weight_files(folder)
        self._readers: dict[Path, Any] = {}  # opening a file parses its whole header: do it once
        for file in self.files:
            self.headers.update(_read_headers(file))
        self._check_tensors()

    @property
    def family(self) -> Family:
        """The architecture's row in the table of families."""
        return self.shape.family

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the experts."""
        return self.headers[self._expert_location(Role.EXPERT_DOWN, 0, 0)[0]].dtype

    @property
    def n_bytes(self) -> int:
        """Size of all tensors on disk in bytes."""
        return sum(header.n_bytes for header in self.headers.values())

    def tensor(self, role: Role, layer: int | None = None) -> torch.Tensor:
        """The tensor of a role that is not an expert's, in storage dtype; a tied head is the embedding."""
        if role is Role.HEAD and self.shape.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        return self._read(self.family.names[role].format(layer=layer))

    def expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One expert's gate [F, D], up [F, D] or down [D, F] projection, in storage dtype."""
        name, fused_rows = self._expert_location(role, layer, expert)
        if fused_rows is None:
            return self._read(name)
        return self._read(name, fused_rows)

    def identity(self) -> str:
        """SHA-256 over ``config.json`` and the header of every weight file: equal for equal checkpoints."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size} {_header_digest(file)}".encode())
        return digest.hexdigest()

    def expected_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the family needs, as (name on disk, shape)."""
        roles = [role for role in self.family.roles if not (role is Role.HEAD and self.shape.tied_embeddings)]
        for role in roles:
            if role.is_global:
                yield self.family.names[role], role_shape(role, self.shape)
        for layer in range(self.shape.n_layers):
            for role in self.family.layer_roles:
                yield self.family.names[role].format(layer=layer), role_shape(role, self.shape)
            yield from self._expected_experts(layer)

    def _expected_experts(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        shape = self.shape
        fused = self.family.fused_gate_up.format(layer=layer)
        if fused in self.headers:
            yield fused, (shape.n_experts, 2 * shape.expert_width, shape.hidden_size)
            down = self.family.fused_down.format(layer=layer)
            yield down, (shape.n_experts, shape.hidden_size, shape.expert_width)
            return
        for expert in range(shape.n_experts):
            for role in (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN):
                yield self.family.names[role].format(layer=layer, expert=expert), role_shape(role, shape)

    def _check_tensors(self) -> None:
        for name, expected in self.expected_shapes():
            header = self.headers.get(name)
            if header is None:
                raise InputError(f"{self.folder}: tensor {name} is in none of the weight files; download them again")
            if header.shape != expected:
                raise InputError(
                    f"{header.file}: tensor {name} has shape {list(header.shape)}, but config.json implies "
                    f"{list(expected)}; config and weights do not belong together"
                )

    def _expert_location(self, role: Role, layer: int, expert: int) -> tuple[str, tuple[int, slice] | None]:
        """Name on disk, and for fused experts which part of it."""
        width = self.shape.expert_width
        fused_gate_up = self.family.fused_gate_up.format(layer=layer)
        if fused_gate_up not in self.headers:
            return self.family.names[role].format(layer=layer, expert=expert), None
        if role is Role.EXPERT_GATE:
            return fused_gate_up, (expert, slice(0, width))
        if role is Role.EXPERT_UP:
            return fused_gate_up, (expert, slice(width, 2 * width))
        return self.family.fused_down.format(layer=layer), (expert, slice(None))

    def _read(self, name: str, part: tuple[int, slice] | None = None) -> torch.Tensor:
        file = self.headers[name].file
        try:
            if file not in self._readers:
                self._readers[file] = safe_open(file, framework="pt")
            reader = self._readers[file]
            tensor: torch.Tensor = reader.get_tensor(name) if part is None else reader.get_slice(name)[part[0], part[1]]
            return tensor
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: tensor {name} cannot be read ({error}); was the file changed or cut off?"
            ) from None


def role_shape(role: Role, shape: MoeShape) -> tuple[int, ...]:
    """The shape that a role's tensor has (for experts: each expert's) in a model of this shape."""
    hidden, query = shape.hidden_size, shape.n_heads * shape.head_dim
    key_value = shape.n_kv_heads * shape.head_dim
    return {
        Role.TOKEN_EMBEDDING: (shape.vocab_size, hidden),
        Role.FINAL_NORM: (hidden,),
        Role.HEAD: (shape.vocab_size, hidden),
        Role.ATTENTION_NORM: (hidden,),
        Role.QUERY: (query, hidden),
        Role.KEY: (key_value, hidden),
        Role.VALUE: (key_value, hidden),
        Role.ATTENTION_OUTPUT: (hidden, query),
        Role.QUERY_NORM: (shape.head_dim,),
        Role.KEY_NORM: (shape.head_dim,),
        Role.MOE_NORM: (hidden,),
        Role.ROUTER: (shape.n_experts, hidden),
        Role.EXPERT_GATE: (shape.expert_width, hidden),
        Role.EXPERT_UP: (shape.expert_width, hidden),
        Role.EXPERT_DOWN: (hidden, shape.expert_width),
    }[role]


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if not index.is_file():
        single = folder / _SINGLE
        if not single.is_file():
            raise InputError(f"{folder} holds neither {_SINGLE} nor {_INDEX}: only safetensors checkpoints are read")
        return (single,)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is not a weight index: download it again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder}: the index names {missing[0]}, which is missing; download it again")
    return files


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    headers = {}
    try:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - the reader is not a mapping
                part = reader.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise InputError(
                        f"{file}: tensor {name} has dtype {dtype}; only {', '.join(_DTYPES)} checkpoints are read"
                    )
                headers[name] = TensorHeader(file, _DTYPES[dtype], tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}); download it again") from None
    return headers


def _header_digest(file: Path) -> str:
    """SHA-256 of a safetensors file's header (8 bytes of length, then JSON)."""
    with file.open("rb") as stream:
        length = stream.read(8)
        return hashlib.sha256(length + stream.read(int.from_bytes(length, "little"))).hexdigest()
