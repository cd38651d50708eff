"""A Hugging Face checkpoint on disk, read lazily: headers at once, tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from compressors.model.config import read_shape
from compressors.model.errors import InputError
from compressors.model.families import Family, Role
from compressors.model.shape import MoeShape
from compressors.model.weight_file import TensorHeader, WeightFile

__all__ = ["Checkpoint", "role_shape"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
        self.files = _weight_files(folder)
        self._opened = {file: WeightFile(file) for file in self.files}
        self.headers: dict[str, TensorHeader] = {}
        for opened in self._opened.values():
            self.headers.update(opened.tensors)
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

    def rows(self, role: Role, layer: int | None, rows: slice) -> torch.Tensor:
        """Some consecutive rows of a tensor that is not an expert's, in storage dtype."""
        if role is Role.HEAD and self.shape.tied_embeddings:
            role = Role.TOKEN_EMBEDDING
        name = self.family.names[role].format(layer=layer)
        n_rows, *rest = self.headers[name].shape
        start, stop, _ = rows.indices(n_rows)
        out = torch.empty(stop - start, *rest, dtype=self.headers[name].dtype)
        self._file_of(name).read_into(name, out, start * (out[0].numel() if len(out) else 0))
        return out

    def expert(self, role: Role, layer: int, expert: int) -> torch.Tensor:
        """One expert's gate [F, D], up [F, D] or down [D, F] projection, in storage dtype."""
        out = torch.empty(role_shape(role, self.shape), dtype=self.dtype)
        self.read_expert(role, layer, expert, out)
        return out

    def read_expert(self, role: Role, layer: int, expert: int, out: torch.Tensor) -> None:
        """Fills ``out``, contiguous and of the expert's shape, with what :meth:`expert` would return."""
        name, first = self._expert_location(role, layer, expert)
        self._file_of(name).read_into(name, out, first)

    def identity(self) -> str:
        """SHA-256 over ``config.json`` and the header of every weight file: equal for equal checkpoints."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size} {self._opened[file].header_sha256}".encode())
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
            if header.dtype not in _WEIGHT_DTYPES:
                raise InputError(
                    f"{header.file}: tensor {name} holds {header.dtype}; only float32, float16 and bfloat16 "
                    "checkpoints are read"
                )

    def _expert_location(self, role: Role, layer: int, expert: int) -> tuple[str, int]:
        """Name on disk, and the flat index in it of the expert's first value."""
        gate_up, down = (
            template.format(layer=layer) for template in (self.family.fused_gate_up, self.family.fused_down)
        )
        if gate_up not in self.headers:
            return self.family.names[role].format(layer=layer, expert=expert), 0
        matrix = self.shape.expert_width * self.shape.hidden_size
        if role is Role.EXPERT_DOWN:
            return down, expert * matrix
        return gate_up, (2 * expert + (role is Role.EXPERT_UP)) * matrix

    def _read(self, name: str) -> torch.Tensor:
        return self._file_of(name).read(name)

    def _file_of(self, name: str) -> WeightFile:
        return self._opened[self.headers[name].file]


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
        Role.QUERY_NORM: (shape.query_norm_width,),
        Role.KEY_NORM: (shape.key_norm_width,),
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
