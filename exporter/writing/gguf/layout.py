"""The tensors of a GGUF file, with their names, types and sizes. No weight is read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from compressors.model.description.gguf_rope import gguf_rope_of
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec, Place
from compressors.model.description.tensors import TensorSpec
from compressors.model.description.transforms import SAME, Transform
from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES
from compressors.model.names import shown
from compressors.quantize import QUANTIZABLE_TYPES, GGMLQuantizationType, fallback_type, row_bytes
from exporter.capabilities.rules import Container
from exporter.capabilities.table import refuse_unless_held
from exporter.writing.gguf.mixes import MixedModel, file_type_of, is_quantized, mix_named, mixed_types

__all__ = ["PlannedTensor", "Quantization", "bits_per_weight", "plan_tensors", "quantization"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file; all experts of a layer are one tensor [E, F, D] or [E, D, F], one without E if dense.

    Attributes:
        name: its name.
        role: the role of the model's tensor that gives its values.
        layer: the layer; None outside of the layers.
        shape: its shape, in torch's order.
        ggml_type: its type.
        described: the model's tensor as the file holds it; None: the values are made from ``config.json``.
        transform: makes its values from those of the model's tensor, or of each expert's tensor.
        part: its number among the parts of the model's tensor.
        n_experts: the number of experts whose matrices it consists of; 0: it is made from one tensor.
        values: its values, if they are made from ``config.json``.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    ggml_type: GGMLQuantizationType
    described: TensorSpec | None
    transform: Transform = SAME
    part: int = 0
    n_experts: int = 0
    values: tuple[float, ...] | None = None

    @property
    def place(self) -> Place:
        """The place of the model's tensor."""
        return self.role, self.layer

    @property
    def row_length(self) -> int:
        """Values of one row, the unit of quantization."""
        return self.shape[-1]

    @property
    def is_matrix(self) -> bool:
        """True if the tensor may be quantized: it is not a router, a norm or another small tensor."""
        return self.described is not None and self.described.is_quantizable and is_quantized(self.name, self.shape)

    @property
    def n_values(self) -> int:
        """The number of values in the tensor."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the data in bytes, without padding."""
        return self.n_bytes_in(self.ggml_type)

    def n_bytes_in(self, ggml_type: GGMLQuantizationType) -> int:
        """Size of the data in another type."""
        return prod(self.shape[:-1]) * row_bytes(ggml_type, self.row_length)


def plan_tensors(spec: ModelSpec, mix: str, types: Mapping[str, str] | None = None) -> tuple[PlannedTensor, ...]:
    """Lists the tensors of the file, in the file's order.

    Args:
        spec: the model.
        mix: the name of one of llama.cpp's mixes (:data:`exporter.writing.gguf.mixes.MIXES`); types whose blocks do not
            divide a row are replaced by llama.cpp's types of smaller blocks.
        types: type names that replace the mix's, by tensor name such as ``blk.0.ffn_down_exps.weight``.

    Raises:
        InputError: there is no such mix, tensor or type, or a tensor cannot be of the type given for it.
        UnsupportedError: llama.cpp cannot represent the model.
    """
    return _with_types(_in_mix(spec, mix), types or {})


@lru_cache(maxsize=4)  # a plan asks for the same again and again
def _in_mix(spec: ModelSpec, mix: str) -> tuple[PlannedTensor, ...]:
    """The tensors in the types of a mix."""
    named = mix_named(mix)
    refuse_unless_held(spec, Container.GGUF)
    written = spec.written
    tensors = [tensor for described in written.tensors for tensor in _parts(described, None, spec)]
    for name, values in gguf_rope_of(spec).factors.items():
        factors = PlannedTensor(name, Role.ROPE_FACTORS, None, (len(values),), _F32, None, values=values)
        tensors.append(factors)
    for index, layer in enumerate(written.blocks):
        tensors += [tensor for described in layer.tensors for tensor in _parts(described, index, spec)]
    chosen = mixed_types(named, {tensor.name: tensor.shape for tensor in tensors}, MixedModel.of(spec))
    return tuple(replace(tensor, ggml_type=chosen[tensor.name]) if tensor.is_matrix else tensor for tensor in tensors)


_F32 = GGMLQuantizationType.F32
_QUANTIZABLE = {ggml_type.name: ggml_type for ggml_type in sorted(QUANTIZABLE_TYPES)}


def _parts(described: TensorSpec, layer: int | None, spec: ModelSpec) -> Iterator[PlannedTensor]:
    """The tensors of the file that hold one tensor of the model, in F32.

    A dense counterpart's feed-forward is made from the model's only expert.
    """
    dimensions = spec.written.dimensions(described.role, layer)
    sizes = {} if layer is None else spec.written.blocks[layer].sizes
    source = spec.tensor(described.role, layer)
    n_experts = spec.blocks[layer].n_experts if layer is not None and source.is_per_expert else 0
    for number, part in enumerate(described.gguf_parts):
        shape = part.transform.shape(dimensions, sizes)
        shape = (n_experts, *shape) if described.is_per_expert else shape
        name = part.name.format(layer=layer)
        yield PlannedTensor(name, described.role, layer, shape, _F32, described, part.transform, number, n_experts)


def _with_types(tensors: Sequence[PlannedTensor], types: Mapping[str, str]) -> tuple[PlannedTensor, ...]:
    """The tensors, with the mix's types replaced where ``types`` names others."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, type_name in types.items():
        if name not in by_name:
            raise InputError(f"a type is given for {shown(name)}, but the model has no tensor of this name: remove it")
        by_name[name] = replace(by_name[name], ggml_type=_checked_type(by_name[name], type_name))
    return tuple(by_name.values())


def _checked_type(tensor: PlannedTensor, type_name: str) -> GGMLQuantizationType:
    ggml_type = _QUANTIZABLE.get(type_name)
    if ggml_type is None:
        types = ", ".join(_QUANTIZABLE)
        raise InputError(f"{tensor.name}: there is no type {shown(type_name)}; choose one of {types}")
    if not tensor.is_matrix and ggml_type is not GGMLQuantizationType.F32:
        raise InputError(f"{tensor.name} cannot be {type_name}: routers and norms are F32, which costs next to nothing")
    block_length = BLOCK_SIZES[ggml_type][0]
    if tensor.row_length % block_length:
        raise InputError(
            f"{tensor.name} cannot be {type_name}: its rows of {tensor.row_length} values are not a whole number of "
            f"blocks of {block_length}; {fallback_type(ggml_type, tensor.row_length).name} fits"
        )
    return ggml_type


def bits_per_weight(tensors: Sequence[PlannedTensor]) -> float:
    """The mean bits per value of the file, routers and norms included, as llama.cpp counts it."""
    return 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_values for tensor in tensors)


@dataclass(frozen=True)
class Quantization:
    """The label and file type that follow from a file's types."""

    label: str  # its part of the file's name: a mix, or a label such as Q3_MIX
    file_type: int  # general.file_type


def quantization(spec: ModelSpec, mix: str, types: Mapping[str, str] | None = None) -> Quantization:
    """The label and file type of the file of :func:`plan_tensors`.

    A file whose types are not all the mix's has the mean of its bits per weight in its name, rounded down, and the file
    type that llama.cpp has for the type of most weights. (For a file without a file type, llama.cpp takes the type of
    most tensors; as norms are tensors, that is often F32.)
    """
    in_mix = _in_mix(spec, mix)
    tensors = _with_types(in_mix, types or {})
    if tensors == in_mix:
        named = mix_named(mix)
        return Quantization(named.name, named.file_type)
    weights: Counter[GGMLQuantizationType] = Counter()
    for tensor in tensors:
        weights[tensor.ggml_type] += tensor.n_values
    most = max(sorted(weights), key=lambda ggml_type: weights[ggml_type])
    return Quantization(f"Q{int(bits_per_weight(tensors))}_MIX", file_type_of(most))
