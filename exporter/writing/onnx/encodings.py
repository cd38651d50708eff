"""The encodings of weights in ONNX files, the presets, and the units whose encoding can be chosen.

A unit consists of weights that must be encoded alike for an operator: QMoE takes one width and one block size for both
matrices of a layer's experts; a tied head is the embedding. Everything that is not in a unit (norms and routers) is
float32.

What ONNX Runtime 1.31 runs on the CPU, and how fast, was measured operator by operator. MatMulNBits has kernels of 2,
4 and 8 bits (3, 5 and 6 are refused). QMoE's products with one scale per row are left out: at 8 bits they take four
times as long as at 4 bits in blocks, at 2 bits seventeen times. So are blocks of 16 at 2 bits, for which both operators
widen whole matrices at every call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import TensorSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType, ProductInputs
from compressors.model.sources.onnx_weights import OnnxWeight, factors_of_layer, row_lengths, written_shape

__all__ = ["ENCODINGS", "FLOAT32", "PRESETS", "Encoding", "Preset", "Unit", "adapter_encoding", "check_row_length"]
__all__ += ["encoding_named", "onnx_units", "preset_named", "unit_encodings"]

_BYTE_BITS, _FLOAT_BYTES, _SCALE_BYTES = 8, 4, 2
_FLOAT32_PRODUCT_BITS = 4  # the only width with a product of float32 inputs that does not widen whole matrices


@dataclass(frozen=True)
class Encoding:
    """A way of storing a weight's values: float32, or integer codes with a float16 scale for each block of a row."""

    name: str
    blocks: BlockType | None = None  # None: float32
    ggml_type: GGMLQuantizationType | None = None  # the type whose kernel makes the codes; None: our own search
    inputs: ProductInputs = "int8"  # wanted for products; only those of 4 bits have a choice

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return _BYTE_BITS * _FLOAT_BYTES if self.blocks is None else self.blocks.bits

    @property
    def has_int8_inputs(self) -> bool:
        """True if products quantize their inputs to int8, in the weights' blocks."""
        if self.blocks is None:
            return False
        return self.inputs == "int8" or self.blocks.bits != _FLOAT32_PRODUCT_BITS

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes and scales of a weight of this shape, without padding in the file."""
        return math.prod(shape) * self.bits // _BYTE_BITS + self.scale_bytes(shape)

    def scale_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the scales alone."""
        return 0 if self.blocks is None else math.prod(shape) // self.blocks.block_size * _SCALE_BYTES


def _of_blocks(bits: int, block_size: int) -> Encoding:
    blocks = BlockType(bits, block_size)
    return Encoding(blocks.name, blocks)


FLOAT32 = Encoding("F32", ggml_type=GGMLQuantizationType.F32)
_Q4_0 = Encoding("Q4_0", BlockType(4, 32), GGMLQuantizationType.Q4_0)
_Q8_0_BLOCK = 32
_Q8_0 = Encoding("Q8_0", BlockType(8, _Q8_0_BLOCK), GGMLQuantizationType.Q8_0)
_BLOCK_SIZES = {2: (32, 64, 128), 4: (16, 32, 64, 128), 8: (16, 32, 64, 128)}

ENCODINGS: Mapping[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        FLOAT32,
        *(_of_blocks(bits, size) for bits, sizes in _BLOCK_SIZES.items() for size in sizes),
        _Q4_0,
        _Q8_0,
    )
}
"""``4@128`` stands for codes of 4 bits in blocks of 128; Q4_0 and Q8_0 hold the numbers of ggml's types."""


def adapter_encoding(of_experts: Encoding) -> Encoding:
    """The encoding of the adapters of experts that stand on bases: 8 bits in blocks of the same size, or float32."""
    if of_experts.blocks is None:
        return FLOAT32
    block_size = of_experts.blocks.block_size
    return _Q8_0 if block_size == _Q8_0_BLOCK else _of_blocks(_BYTE_BITS, block_size)


@dataclass(frozen=True)
class Preset:
    """The encoding of each kind of unit."""

    name: str
    linears: Encoding  # attention projections
    experts: Encoding
    embedding: Encoding  # token embedding and output head

    def encoding(self, role: Role) -> Encoding:
        """The encoding of a role's weights."""
        if role.is_expert:
            return self.experts
        if role in (Role.TOKEN_EMBEDDING, Role.HEAD):
            return self.embedding
        return self.linears


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("F32", linears=FLOAT32, experts=FLOAT32, embedding=FLOAT32),
        Preset("Q4_0", linears=_Q4_0, experts=_Q4_0, embedding=_Q8_0),
    )
}


@dataclass(frozen=True)
class Unit:
    """Weights that have one encoding.

    Attributes:
        name: its name in recipes: ``layers.0.experts``, ``layers.0.q_proj``, ``layers.0.shared_expert.up_proj``,
            ``embedding``, ``head``.
        layer: None for embedding and head.
        weights: shape by role: [rows, columns], or [E, rows, columns] for experts.
        row_lengths: the lengths of rows by role, of all parts that the file holds a tensor in.
        factors: the bases of experts, which have the encoding, and the adapters, whose encoding depends on it
            (:func:`adapter_encoding`).
    """

    name: str
    layer: int | None
    weights: Mapping[Role, tuple[int, ...]]
    row_lengths: Mapping[Role, tuple[int, ...]]
    factors: tuple[OnnxWeight, ...] = ()

    @property
    def encodings(self) -> Mapping[str, int]:
        """Bytes of the unit by the name of each encoding that fits its rows; exact but for alignment in the file."""
        return {
            encoding.name: self._n_bytes(encoding)
            for encoding in ENCODINGS.values()
            if all(_fits(encoding, length) for lengths in self.row_lengths.values() for length in lengths)
        }

    def _n_bytes(self, encoding: Encoding) -> int:
        whole = sum(encoding.n_bytes(shape) for shape in self.weights.values())
        return whole + sum(
            (adapter_encoding(encoding) if factor.form.is_adapter else encoding).n_bytes(factor.shape)
            for factor in self.factors
        )


_OUTSIDE = {Role.TOKEN_EMBEDDING: "embedding", Role.HEAD: "head"}
_EXPERTS = "experts"


@lru_cache(maxsize=4)  # a plan asks for the same again and again
def onnx_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """Lists the units of a model, each with the encodings that it can have."""
    outside = [
        Unit(_OUTSIDE[tensor.role], None, {tensor.role: shape}, {tensor.role: shape[-1:]})
        for tensor in spec.written.tensors
        if tensor.is_quantizable
        for shape in (spec.dimensions(tensor.role),)
    ]
    of_layers = [unit for index, layer in enumerate(spec.layers) for unit in _layer_units(layer, index)]
    embedding = [unit for unit in outside if Role.TOKEN_EMBEDDING in unit.weights]
    return (*embedding, *of_layers, *(unit for unit in outside if unit not in embedding))


def _layer_units(layer: LayerSpec, index: int) -> Iterator[Unit]:
    for tensor in layer.shared_tensors:
        if tensor.is_quantizable:
            name, lengths = f"layers.{index}.{_matrix_name(tensor)}", row_lengths(tensor, layer)
            yield Unit(name, index, {tensor.role: layer.dimensions(tensor)}, {tensor.role: lengths})
    experts = {tensor.role: written_shape(tensor, layer) for tensor in layer.expert_tensors if tensor.is_quantizable}
    if experts:
        lengths_of_experts = {role: shape[-1:] for role, shape in experts.items()}
        factors = factors_of_layer(layer, index)
        yield Unit(f"layers.{index}.{_EXPERTS}", index, experts, lengths_of_experts, factors)


def _matrix_name(tensor: TensorSpec) -> str:
    """The last part of its module's name; in feed-forwards the last two, because there are several of a kind."""
    *_, parent, name = tensor.submodule.split(".")
    return f"{parent}.{name}" if tensor.role.is_feed_forward else name


def preset_named(name: str) -> Preset:
    """Looks a preset up.

    Raises:
        InputError: there is none of that name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise InputError(f"{name!r} is not an ONNX preset; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def encoding_named(name: str) -> Encoding:
    """Looks an encoding up.

    Raises:
        InputError: there is none of that name; the message lists the known ones.
    """
    if name not in ENCODINGS:
        raise InputError(f"{name!r} is not an encoding of ONNX weights; the encodings are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def unit_encodings(
    spec: ModelSpec, preset: Preset, encodings: Mapping[str, str], inputs: ProductInputs = "int8"
) -> dict[tuple[Role, int | None], Encoding]:
    """The encoding of every weight of a unit, by role and layer.

    Args:
        spec: the model.
        preset: gives the encoding of units that ``encodings`` does not name.
        encodings: names of encodings by names of units.
        inputs: those of the products of 4 bits.

    Raises:
        InputError: there is no such unit or encoding.
        UnsupportedError: an encoding does not fit the length of a unit's rows.
    """
    units = {unit.name: unit for unit in onnx_units(spec)}
    unknown = next((name for name in encodings if name not in units), None)
    if unknown is not None:
        raise InputError(
            f"{unknown!r} is no unit of this model's ONNX file; the units are embedding, {_unit_names(spec)}"
        )
    chosen = {}
    for unit in units.values():
        for role, lengths in unit.row_lengths.items():
            named = encodings.get(unit.name)
            encoding = preset.encoding(role) if named is None else encoding_named(named)
            for length in lengths:
                check_row_length(f"{unit.name} ({role})", encoding, length)
            chosen[role, unit.layer] = replace(encoding, inputs=inputs)
    return chosen


def _unit_names(spec: ModelSpec) -> str:
    names = (unit.name.split(".", 2)[2] for unit in onnx_units(spec) if unit.layer is not None)
    *others, last = dict.fromkeys(names)
    head = "" if spec.tied_embeddings else ", and head"
    return f"and of layers.0 to layers.{spec.n_layers - 1} {', '.join(others)} and {last}{head}"


def _fits(encoding: Encoding, row_length: int) -> bool:
    return encoding.blocks is None or row_length % encoding.blocks.block_size == 0


def check_row_length(name: str, encoding: Encoding, row_length: int) -> None:
    """Refuses rows that do not divide into blocks.

    Raises:
        UnsupportedError: the rows do not divide; the message calls the weight ``name`` and lists possible encodings.
    """
    if not _fits(encoding, row_length):
        fitting = ", ".join(other.name for other in ENCODINGS.values() if _fits(other, row_length))
        raise UnsupportedError(
            f"{name} has rows of {row_length} values, which do not divide into the blocks of {encoding.name}; "
            f"these encodings fit: {fitting}"
        )
