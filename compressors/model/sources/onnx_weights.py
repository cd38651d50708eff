"""The weights of our ONNX graphs, as the description tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import TYPE_CHECKING

from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.description.transforms import HeadMatrices

if TYPE_CHECKING:
    import torch

__all__ = ["Form", "OnnxWeight", "Part", "factors_of_layer", "joins_bases", "row_lengths", "weights_of"]
__all__ += ["written_shape"]

_JOINED_VALUES = 1 << 19
"""Values of the gates and ups of a layer's bases up to which one product computes all: to find the tokens of each base
would take longer."""


@dataclass(frozen=True)
class Part:
    """Rows of a tensor that are a weight by themselves.

    Attributes:
        first: the first of them.
        n_rows: their number.
        is_transposed: the weight is their transpose.
    """

    first: int
    n_rows: int
    is_transposed: bool

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + self.n_rows)

    def turned(self, values: torch.Tensor) -> torch.Tensor:
        """The weight's values as the tensor has them, or the tensor's as the weight has them: a view."""
        return values.T if self.is_transposed else values


class Form(Enum):
    """The part of matrices that a weight holds; the values stand in its name in place of an expert's number.

    A matrix [O, I] of an expert that stands on a base (:mod:`compressors.model.description.shared_bases`) is the base's
    plus B A. Both factors have long rows, so that blocks divide them as they divide the rows of whole matrices. The
    rows of gate and of up do not alternate here: those of gate come first.
    """

    WHOLE = "whole"
    BASE = "bases"  # [bases, P O, I] for P matrices: gate and up, or one
    JOINED_BASES = "joined_bases"  # down of all bases side by side: [O, bases I]
    INPUTS = "adapter_a"  # A of each expert that stands on a base: [experts, P, R, I]
    OUTPUTS = "adapter_b"  # B of each, transposed: [experts, P, R, O]

    @property
    def is_adapter(self) -> bool:
        """True for the factors of adapters."""
        return self in (Form.INPUTS, Form.OUTPUTS)


@dataclass(frozen=True)
class OnnxWeight:
    """A weight of the graph, as the description tells.

    Attributes:
        name: its name; of codes and scales the beginning of theirs.
        roles: the tensors that it consists of; of several, rows alternate.
        layer: the decoder layer; None outside of the layers.
        shape: [D], [rows, columns], or [E, rows, columns] of all experts.
        part: the part of the tensor that it is; None: it is whole.
        n_copies: the number of times that each row stands there, one after the other.
        form: the part of the matrices that it holds.
        numbers: the experts, or the bases, whose matrices it holds.
    """

    name: str
    roles: tuple[Role, ...]
    layer: int | None
    shape: tuple[int, ...]
    part: Part | None = None
    n_copies: int = 1
    form: Form = Form.WHOLE
    numbers: tuple[int, ...] = ()


def weights_of(spec: ModelSpec) -> Iterator[OnnxWeight]:
    """Lists the weights of a model's graph, in the order of the data file."""
    outside = [
        OnnxWeight(tensor.onnx_name, (tensor.role,), None, spec.dimensions(tensor.role))
        for tensor in spec.written.tensors
    ]
    yield from (weight for weight in outside if Role.TOKEN_EMBEDDING in weight.roles)
    for index, layer in enumerate(spec.written.layers):
        yield from _weights_of_layer(layer, index)
    yield from (weight for weight in outside if Role.TOKEN_EMBEDDING not in weight.roles)


def _weights_of_layer(layer: LayerSpec, index: int) -> Iterator[OnnxWeight]:
    for name, together in groupby(layer.tensors, key=lambda tensor: tensor.onnx_name):
        tensors = tuple(together)
        if matrices := _head_matrices(tensors[0]):
            yield from _weights_of_heads(matrices, tensors[0], layer, index)
            continue
        rows, *columns = layer.dimensions(tensors[0])
        experts = _own_experts(layer) if tensors[0].is_per_expert else ()
        n_copies = _copies(tensors, layer)
        shape = (len(tensors) * n_copies * rows, *columns)
        roles = tuple(tensor.role for tensor in tensors)
        if experts or not tensors[0].is_per_expert:
            whole = (len(experts), *shape) if experts else shape
            yield OnnxWeight(name.format(layer=index), roles, index, whole, n_copies=n_copies, numbers=experts)
        if layer.bases is not None and tensors[0].is_per_expert:
            yield from _factors(tensors, layer, layer.bases, index)


def factors_of_layer(layer: LayerSpec, index: int) -> tuple[OnnxWeight, ...]:
    """The bases of a layer and the adapters of the experts that stand on them; none if there are no such experts."""
    return tuple(weight for weight in _weights_of_layer(layer, index) if weight.form is not Form.WHOLE)


def joins_bases(layer: LayerSpec) -> bool:
    """True if every token is multiplied by all bases of the layer at once."""
    n_bases = 0 if layer.bases is None else layer.bases.n_bases
    return n_bases * layer.expert_input_rows * layer.expert_size <= _JOINED_VALUES


def _own_experts(layer: LayerSpec) -> tuple[int, ...]:
    """The experts whose matrices the file holds whole."""
    return tuple(range(layer.n_experts)) if layer.bases is None else layer.bases.own


def _factors(tensors: Sequence[TensorSpec], layer: LayerSpec, bases: SharedBases, index: int) -> Iterator[OnnxWeight]:
    """The bases of some of an expert's matrices, and the adapters of all experts that stand on them.

    Like adapters in an overlay they are named after the first matrix.
    """
    rows, columns = layer.dimensions(tensors[0])
    roles = tuple(tensor.role for tensor in tensors)
    joins = Role.EXPERT_DOWN in roles and joins_bases(layer)
    base_shape = (rows, bases.n_bases * columns) if joins else (bases.n_bases, len(tensors) * rows, columns)
    of_replaced = (len(bases.replaced), len(tensors), bases.rank)
    forms: Iterable[tuple[Form, tuple[int, ...], tuple[int, ...]]] = (
        (Form.JOINED_BASES if joins else Form.BASE, tuple(range(bases.n_bases)), base_shape),
        (Form.INPUTS, bases.replaced, (*of_replaced, columns)),
        (Form.OUTPUTS, bases.replaced, (*of_replaced, rows)),
    )
    for form, numbers, shape in forms:
        if numbers:
            name = tensors[0].name.format(layer=index, expert=form.value)
            yield OnnxWeight(name, roles, index, shape, form=form, numbers=numbers)


def _copies(tensors: Sequence[TensorSpec], layer: LayerSpec) -> int:
    """2 for the up rows of experts without a gate: the operators take each of them for the gate's row too."""
    routed = layer.routed
    is_input = routed is not None and tensors[0].is_per_expert and tensors[0].role in routed.input_roles
    return 2 if routed is not None and is_input and not routed.glu.is_gated else 1


def written_shape(tensor: TensorSpec, layer: LayerSpec) -> tuple[int, ...]:
    """The shape of a tensor of all whole experts as the file holds it, its copies included: [E, rows, columns]."""
    rows, columns = layer.dimensions(tensor)
    return (len(_own_experts(layer)), _copies((tensor,), layer) * rows, columns)


def row_lengths(tensor: TensorSpec, layer: LayerSpec) -> tuple[int, ...]:
    """The lengths of the rows of the weights that hold a layer's tensor: of each kind of a head's matrices, or one."""
    matrices = _head_matrices(tensor)
    shapes = [matrix.shape(layer.dimensions(tensor), layer.sizes) for matrix in matrices] or [layer.dimensions(tensor)]
    return tuple(shape[-1] for shape in shapes)


def _head_matrices(tensor: TensorSpec) -> list[HeadMatrices]:
    """The matrices of each head, where a tensor consists of such."""
    return [part.transform for part in tensor.gguf_parts if isinstance(part.transform, HeadMatrices)]


def _weights_of_heads(
    matrices: Iterable[HeadMatrices], tensor: TensorSpec, layer: LayerSpec, index: int
) -> Iterator[OnnxWeight]:
    """One after the other, first the heads' matrices of one kind."""
    name = tensor.onnx_name.format(layer=index)
    for matrix in matrices:
        n_heads, *shape = matrix.shape(layer.dimensions(tensor), layer.sizes)
        for head in range(n_heads):
            rows = matrix.rows_of(head, layer.sizes)
            part = Part(rows.start, rows.stop - rows.start, matrix.is_transposed)
            yield OnnxWeight(f"{name}.{matrix.taken}.head{head}", (tensor.role,), index, tuple(shape), part)
