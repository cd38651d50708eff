"""The description of one tensor: its kind, its shape in letters, and its names on disk, in a module and in GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.description.transforms import SAME, Transform

if TYPE_CHECKING:
    import torch

__all__ = ["Fused", "GgufTensor", "Kind", "NormKind", "TensorSpec"]


class Kind(Enum):
    """The kind of a tensor, which decides how it may be stored and who may train it."""

    MATRIX = "matrix"  # weights of a linear layer; may be quantized
    TABLE = "table"  # embedding and head; may be quantized
    ROUTER = "router"  # float32 in every file, while it is trained and while it runs
    SELECTION = "selection"  # takes part in the choice, no gradient reaches it; float32 in every file and while it runs
    NORM = "norm"  # the scales of a norm; float32 in every file
    VECTOR = "vector"  # a bias or the like; float32 in every file
    CONVOLUTION = "convolution"  # over some neighbouring tokens, by channel; float32 in every file


class NormKind(Enum):
    """The scales that a norm multiplies by."""

    PLAIN = "w"  # the tensor's values
    ONE_PLUS = "1 + w"  # one more than the tensor's values


@dataclass(frozen=True)
class Fused:
    """All experts of a layer in one tensor: [E, n_parts * rows, columns]; one part of each expert's rows is the role's.

    Attributes:
        name: the template of the name, with ``{layer}``.
        part: the index of the part; gate rows come before up rows.
        n_parts: 2 where gate and up lie in one tensor.
        is_only_form: no checkpoint holds each expert by itself, so the name of an expert's own tensor is in no file.
        is_interleaved: the parts' rows alternate: the first row of each part, then the second of each.
        is_transposed: the tensor is [E, columns, n_parts * rows].
        may_be_mxfp4: some checkpoints hold it as MXFP4 (:mod:`compressors.model.files.gguf.mxfp4`), not transposed.
    """

    name: str
    part: int = 0
    n_parts: int = 1
    is_only_form: bool = False
    is_interleaved: bool = False
    is_transposed: bool = False
    may_be_mxfp4: bool = False

    def of_expert(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the shape of one expert's values in the tensor; its matrix of this role is [rows, columns]."""
        stored = (self.n_parts * rows, columns)
        return (stored[1], stored[0]) if self.is_transposed else stored

    def matrix(self, of_expert: torch.Tensor) -> torch.Tensor:
        """The role's matrix in one expert's values: a view of them, [rows, columns]."""
        all_rows = of_expert.T if self.is_transposed else of_expert
        return self.rows(all_rows)

    def rows(self, all_rows: torch.Tensor) -> torch.Tensor:
        """The role's rows among those of all parts, as a view."""
        return all_rows[self.part :: self.n_parts] if self.is_interleaved else all_rows.chunk(self.n_parts)[self.part]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, in which all experts of a layer are together: one checkpoint tensor, or a part of it.

    Attributes:
        name: the template of its name, with ``{layer}``.
        transform: makes its values from those of the checkpoint tensor, or of each expert's tensor.
    """

    name: str
    transform: Transform = SAME


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint.

    Attributes:
        role: its purpose.
        name: the template of its name on the hub, with ``{layer}`` and, if each expert has one, ``{expert}``.
        shape: its sizes in letters, output features first; of one expert, if each has one.
        gguf: its place in a GGUF file; where the file holds it in several parts, the first one, whose name its tunable
            values go by.
        gguf_rest: the places of the other parts.
        kind: see :class:`Kind`.
        module: its name inside transformers' decoder layer, where that is not the name on the hub.
        fused: how checkpoints that fuse all experts into one tensor hold it; None: they do not.
        shares_input_of: the role of another matrix that the same values are multiplied with; None: its own.
        norm: how a norm's scales are made from the tensor.
        experts_axis: the axis that has an entry for each expert; None: there is none. (A tensor that each expert has
            for itself has no such axis.)
        alternates: along its last axis values of gate and up alternate; where layers run, all gates come first
            (:mod:`compressors.model.description.gate_order`).
    """

    role: Role
    name: str
    shape: tuple[str, ...]
    gguf: GgufTensor
    kind: Kind = Kind.MATRIX
    module: str | None = None
    fused: Fused | None = None
    shares_input_of: Role | None = None
    norm: NormKind = NormKind.PLAIN
    experts_axis: int | None = None
    gguf_rest: tuple[GgufTensor, ...] = ()
    alternates: bool = False

    @property
    def gguf_parts(self) -> tuple[GgufTensor, ...]:
        """All its places in a GGUF file."""
        return (self.gguf, *self.gguf_rest)

    @property
    def is_per_expert(self) -> bool:
        """True if every routed expert of a layer has such a tensor."""
        return "{expert}" in self.name

    def scales(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the scales that a norm multiplies by, in float32."""
        return values.float() if self.norm is NormKind.PLAIN else 1 + values.float()

    @property
    def runs_in_float32(self) -> bool:
        """True if it stays float32 whatever the arithmetic of a pass."""
        return self.kind in (Kind.ROUTER, Kind.SELECTION)

    @property
    def is_quantizable(self) -> bool:
        """True if files may hold it in another type than float32."""
        return self.kind in (Kind.MATRIX, Kind.TABLE)

    @property
    def onnx_name(self) -> str:
        """The template of its name in ONNX graphs, where all experts of a layer are one weight."""
        return self.name if self.fused is None else self.fused.name

    @property
    def in_layer(self) -> str:
        """Its name inside transformers' decoder layer."""
        return self.name.rpartition(_LAYERS)[2] if self.module is None else self.module

    @property
    def submodule(self) -> str:
        """The module inside transformers' decoder layer that holds it."""
        return self.in_layer.rpartition(".")[0]

    @property
    def input_role(self) -> Role:
        """The role of the matrix whose module shows the values that this one is multiplied with."""
        return self.role if self.shares_input_of is None else self.shares_input_of


_LAYERS = ".layers.{layer}."
