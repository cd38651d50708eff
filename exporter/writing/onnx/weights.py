"""The nodes that use weights: embedding, norms and linear layers, in the encodings that the layout gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from compressors.model.description.roles import Role
from compressors.model.description.rope import Rope
from compressors.model.description.spec import LayerSpec
from compressors.model.description.tensors import NormKind
from compressors.model.files.onnx_names import IN_FLOAT32, MATRIX, NORM_SCALES, expert_matrix
from compressors.model.sources.onnx_weights import Form
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.layout import TensorLayout, TensorPlan, WeightPlan

__all__ = ["LayerNodes", "WeightNodes", "accuracy_level"]

_FLOAT32_INPUTS, _INT8_INPUTS = 1, 4


class WeightNodes:
    """Adds nodes that apply the weights of a layout."""

    def __init__(self, graph: GraphBuilder, layout: TensorLayout) -> None:
        self._graph = graph
        self._layout = layout
        self._float32_scales: dict[str, str] = {}
        self._rotary: dict[Rope, tuple[str, str]] = {}

    def plan(self, role: Role, layer: int | None = None) -> WeightPlan | None:
        """The weight that holds a role; None if the model has none there."""
        return self._layout.weight(role, layer) if self._layout.has(role, layer) else None

    def vector(self, role: Role, layer: int | None) -> str:
        """The values of a bias, or of another vector or a convolution, as the model has them."""
        return self._graph.external(self._layout.weight(role, layer).codes)

    @property
    def rms_norm_eps(self) -> float:
        """Epsilon of the norms."""
        return self._layout.spec.rms_norm_eps

    def norm_scales(self, role: Role, layer: int | None) -> str:
        """The scales that a norm multiplies by; the file keeps the model's values."""
        values = self.vector(role, layer)
        if self._layout.spec.tensor(role, layer).norm is NormKind.PLAIN:
            return values
        one = self._graph.constant("norm.one", 1.0, np.float32)
        return self._graph.node("Add", [values, one], f"{values}{NORM_SCALES}")

    def rms_norm(self, role: Role, layer: int | None, values: str, output: str, epsilon: float | None = None) -> str:
        """Normalises the last axis; ``epsilon`` is the model's unless it is given."""
        inputs = [values, self.norm_scales(role, layer)]
        epsilon = self._layout.spec.rms_norm_eps if epsilon is None else epsilon
        return self._graph.node("RMSNormalization", inputs, output, axis=-1, epsilon=epsilon)

    def unit_rms(self, values: str, units: str, output: str) -> str:
        """Normalises the last axis to a mean square of 1; ``units`` is a constant of so many ones."""
        epsilon = self._layout.spec.rms_norm_eps
        return self._graph.node("RMSNormalization", [values, units], output, axis=-1, epsilon=epsilon)

    def gated_rms_norm(self, role: Role, layer: int, values: str, gate: str, output: str) -> str:
        """Normalises each head, and multiplies by the gate after its SiLU; scales are those of one head."""
        return self._graph.node(
            "GatedRMSNorm",
            [values, self.norm_scales(role, layer), gate],
            output,
            domain=MICROSOFT,
            activation="silu",
            epsilon=self._layout.spec.rms_norm_eps,
        )

    def rotary_caches(self, rope: Rope, total_length: str) -> tuple[str, str]:
        """Cosine and sine, each [context, width / 2]; if short texts are turned differently, the rows in use.

        ``total_length``, int32, decides as in transformers: by the length of the text so far, the cached part included.
        """
        cosine, sine = self._layout.rotaries[rope]
        tables = self._graph.external(cosine), self._graph.external(sine)
        shorter, *longer = rope.table_lengths(self._layout.spec.context_length)
        if not longer:
            return tables
        if rope not in self._rotary:
            self._rotary[rope] = self._chosen_rows(tables, total_length, shorter)
        return self._rotary[rope]

    def _chosen_rows(self, tables: tuple[str, str], total_length: str, shorter: int) -> tuple[str, str]:
        graph = self._graph
        is_long = graph.node(
            "Greater", [total_length, graph.constant("rotary.shorter", shorter, np.int32)], "rotary.is_long"
        )
        rows = graph.constant("rotary.first_long", [shorter]), graph.constant("rotary.first_short", [0])
        start = graph.node("Where", [is_long, *rows], "rotary.start")
        length = graph.node("Cast", [total_length], "rotary.length", to=onnx.TensorProto.INT64)
        end = graph.node("Add", [start, length], "rotary.end")
        axis = graph.constant("rotary.axis", [0])
        cosine, sine = (graph.node("Slice", [table, start, end, axis], f"{table}.in_use") for table in tables)
        return cosine, sine

    def embedding(self, token_ids: str, output: str) -> str:
        """Looks up rows of the embedding."""
        return self._gathered(self._layout.weight(Role.TOKEN_EMBEDDING), token_ids, output)

    def products_of_experts(self, role: Role, layer: int, values: Sequence[str], output: str) -> list[str]:
        """The rows of each expert @ its matrix.T; the matrices are parts of the tensors of all experts."""
        whole = self._layout.weight(role, layer)
        return [
            self._product(_of_expert(whole, expert), rows, f"{output}.{expert}") for expert, rows in enumerate(values)
        ]

    def product_of_base(self, role: Role, layer: int, base: int, values: str, output: str) -> str:
        """The values @ a base's matrix.T; it is a part of the tensor of all bases of the layer."""
        return self._product(_of_expert(self._layout.factor(role, layer, Form.BASE), base), values, output)

    def product_of_joined_bases(self, role: Role, layer: int, values: str, output: str) -> str:
        """The values times the matrices of all bases of a layer whose bases are joined.

        Gate and up give the products of all bases side by side, [T, bases P F]. Down takes neurons of all bases side by
        side, [T, bases F], and gives the sum of the bases' outputs.
        """
        if role is Role.EXPERT_DOWN:
            return self._product(self._layout.factor(role, layer, Form.JOINED_BASES), values, output)
        weight = self._layout.factor(role, layer, Form.BASE)
        if weight.encoding.blocks is not None:
            return self._product(_rows_joined(weight), values, output)
        graph, shape = self._graph, self._graph.constant("bases.rows", [-1, weight.shape[-1]])
        matrix = graph.node("Reshape", [graph.external(weight.codes), shape], f"{output}.matrix")  # once, on loading
        return graph.node("FusedMatMul", [values, matrix], output, domain=MICROSOFT, transB=1)

    def use_factors(self, role: Role, layer: int) -> None:
        """Widens the scales of a role's adapters; :meth:`factor` may then be called inside of a loop."""
        for form in (Form.INPUTS, Form.OUTPUTS):
            weight = self._layout.factor(role, layer, form)
            if weight.scales is not None:
                self.scales(weight)

    def factor(self, role: Role, layer: int, form: Form, number: str, output: str) -> str:
        """Factors of the adapters of experts: float32 [..., P, R, columns], see :class:`Form`.

        Args:
            role: the role of a matrix.
            layer: its layer.
            form: which of the factors.
            number: the name of the experts' places among those with adapters: a scalar or [N].
            output: the result's name.
        """
        return self._gathered(self._layout.factor(role, layer, form), number, output)

    def _gathered(self, weight: WeightPlan, places: str, output: str) -> str:
        """Parts of a weight at places of its first axis: float32."""
        codes, blocks = self._graph.external(weight.codes), weight.encoding.blocks
        if blocks is None:
            return self._graph.node("Gather", [codes, places], output)
        return self._graph.node(
            "GatherBlockQuantized",
            [codes, places, self.scales(weight)],
            output,
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block_size,
            gather_axis=0,
            quantize_axis=len(weight.shape) - 1,
        )

    def linear(self, role: Role, layer: int | None, values: str, output: str, bias: Role | None = None) -> str:
        """Adds values @ weight.T, plus the bias of that role where the model has one.

        Weights keep torch's orientation [rows, columns] in every encoding.
        """
        if bias is None or not self._layout.has(bias, layer):
            return self._product(self._layout.weight(role, layer), values, output)
        product = self._product(self._layout.weight(role, layer), values, f"{output}.product")
        return self._graph.node("Add", [product, self.vector(bias, layer)], output)

    def products(self, role: Role, layer: int, part: int, values: Sequence[str], output: str) -> list[str]:
        """The values of each head @ its matrix.T; ``part`` says which of a head's matrices in the tensor."""
        matrices = self._layout.parts(role, layer)[part * len(values) :]
        return [
            self._product(matrix, of_head, f"{output}.{head}")
            for head, (of_head, matrix) in enumerate(zip(values, matrices, strict=False))
        ]

    def _product(self, weight: WeightPlan, values: str, output: str) -> str:
        blocks = weight.encoding.blocks
        if blocks is None:
            matrix = self._graph.external(weight.codes)
            return self._graph.node("FusedMatMul", [values, matrix], output, domain=MICROSOFT, transB=1)
        rows, columns = weight.shape
        block_bytes = blocks.block_size * blocks.bits // 8
        in_blocks = (rows, columns // blocks.block_size, block_bytes)
        codes = self._graph.external(weight.codes, shape=in_blocks, name=weight.codes.name + MATRIX)
        return self._graph.node(
            "MatMulNBits",
            [values, codes, self.scales(weight)],
            output,
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block_size,
            N=rows,
            K=columns,
            accuracy_level=accuracy_level(weight),
        )

    def scales(self, weight: WeightPlan) -> str:
        """Scales in float32, the type of the activations; the file keeps float16, for which codes were chosen."""
        assert weight.scales is not None
        stored = self._graph.external(weight.scales)
        if stored not in self._float32_scales:  # a tied head shares the embedding's
            cast = self._graph.node("Cast", [stored], stored + IN_FLOAT32, to=onnx.TensorProto.FLOAT)
            self._float32_scales[stored] = cast
        return self._float32_scales[stored]


def accuracy_level(weight: WeightPlan) -> int:
    """The attribute of that name, of MatMulNBits and QMoE: level 1 keeps inputs in float32, level 4 makes them int8.

    llama.cpp makes the inputs of every quantized product int8 too. Products of 2 and 8 bits need it: MatMulNBits'
    float32 form of them widens the whole matrix at every call (measured 50 times slower at one token), and QMoE has
    none (``moe_quantization_cpu.cc``).
    """
    return _INT8_INPUTS if weight.encoding.has_int8_inputs else _FLOAT32_INPUTS


def _of_expert(weight: WeightPlan, expert: int) -> WeightPlan:
    """One expert's part of a weight, in the same bytes of the file."""

    def part(tensor: TensorPlan) -> TensorPlan:
        n_bytes = tensor.n_bytes // tensor.shape[0]
        name, offset = expert_matrix(tensor.name, expert), tensor.offset + expert * n_bytes
        return replace(tensor, name=name, shape=tensor.shape[1:], offset=offset)

    scales = None if weight.scales is None else part(weight.scales)
    return replace(weight, shape=weight.shape[1:], codes=part(weight.codes), scales=scales)


def _rows_joined(weight: WeightPlan) -> WeightPlan:
    """Quantized matrices that follow each other, as a matrix of all their rows."""
    assert weight.scales is not None
    n_matrices, n_rows, n_columns = weight.shape
    rows = n_matrices * n_rows
    scales = replace(weight.scales, shape=(rows, weight.scales.shape[-1]))
    return replace(weight, shape=(rows, n_columns), scales=scales)


@dataclass(frozen=True)
class LayerNodes:
    """Adds nodes that apply the weights of one decoder layer.

    Attributes:
        graph: takes the nodes.
        weights: the weights of the whole model.
        spec: the layer as it is written.
        index: its index.
        context_length: the number of tokens that the graph is written for.
        caches_differ: not all layers that attend have caches of the same sizes.
    """

    graph: GraphBuilder
    weights: WeightNodes
    spec: LayerSpec
    index: int
    context_length: int
    caches_differ: bool = False

    @property
    def prefix(self) -> str:
        """The beginning of the names of its values."""
        return f"layers.{self.index}."

    def weight(self, role: Role) -> WeightPlan:
        """The weight that holds a role, which the layer has."""
        found = self.weights.plan(role, self.index)
        assert found is not None, f"layer {self.index} has no {role}"
        return found

    def vector(self, role: Role) -> str | None:
        """A bias, or another vector; None if the layer has none of that role."""
        return None if self.weights.plan(role, self.index) is None else self.weights.vector(role, self.index)

    def linear(self, role: Role, values: str, output: str, bias: Role | None = None) -> str:
        """Adds values @ weight.T, plus the bias of that role where the layer has one."""
        return self.weights.linear(role, self.index, values, output, bias)

    def rms_norm(self, role: Role, values: str, output: str, epsilon: float | None = None) -> str:
        """Normalises the last axis; ``epsilon`` is the model's unless it is given."""
        return self.weights.rms_norm(role, self.index, values, output, epsilon)

    def unit_rms(self, values: str, units: str, output: str) -> str:
        """Normalises the last axis to a mean square of 1; ``units`` is a constant of so many ones."""
        return self.weights.unit_rms(values, units, output)

    def gated_rms_norm(self, role: Role, values: str, gate: str, output: str) -> str:
        """Normalises each head, and multiplies by the gate after its SiLU; scales are those of one head."""
        return self.weights.gated_rms_norm(role, self.index, values, gate, output)

    def products(self, role: Role, part: int, values: Sequence[str], output: str) -> list[str]:
        """The values of each head @ its matrix.T; ``part`` says which of a head's matrices in the tensor."""
        return self.weights.products(role, self.index, part, values, output)

    def products_of_experts(self, role: Role, values: Sequence[str], output: str) -> list[str]:
        """The rows of each expert @ its matrix.T."""
        return self.weights.products_of_experts(role, self.index, values, output)

    def head_norm(self, values: str, width: int, output: str) -> str:
        """Normalises the last axis, of so many values, without scales."""
        scales = self.graph.constant(f"norm.ones_{width}", np.ones(width), np.float32)
        epsilon = self.weights.rms_norm_eps
        return self.graph.node("RMSNormalization", [values, scales], output, axis=-1, epsilon=epsilon)

    def split(self, values: str, lengths: Sequence[int], name: str) -> list[str]:
        """Cuts the last axis; ``name`` ends those of the pieces and of their lengths."""
        outputs = [f"{values}.{name}.{number}" for number in range(len(lengths))]
        sizes = self.graph.constant(f"split.{values.removeprefix(self.prefix)}.{name}", lengths)
        self.graph.node("Split", [values, sizes], outputs, axis=-1)
        return outputs

    def joined(self, values: Sequence[str], output: str) -> str:
        """The values side by side on the last axis."""
        return self.graph.node("Concat", values, output, axis=-1)
