"""The nodes that use weights: embedding, linear layers, experts, in whichever encoding the layout gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from compressors.model.description.roles import Role
from compressors.model.sources.onnx import MATRIX
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.layout import TensorLayout, WeightPlan

__all__ = ["WeightNodes"]

# MatMulNBits' accuracy levels. At level 1 activations stay float32. At level 4 they are quantized to int8 in the
# weights' blocks, as llama.cpp does for every quantized product. Products of 2 and 8 bits need it: their float32 form
# widens the whole matrix at every call (measured 50 times slower at one token). QMoE decides by itself, and alike:
# float32 at 4 bits, int8 at 2 and 8 bits in blocks.
_FLOAT32_ACTIVATIONS = 1
_INT8_ACTIVATIONS = 4

_ROUTER_WEIGHTS_INPUT = 14  # of QMoE


class WeightNodes:
    """Adds nodes that apply the weights of a layout."""

    def __init__(self, graph: GraphBuilder, layout: TensorLayout) -> None:
        self._graph = graph
        self._layout = layout
        self._float32_scales: dict[str, str] = {}
        self._rotary: tuple[str, str] | None = None

    def norm(self, role: Role, layer: int | None) -> str:
        """A norm's scale vector."""
        return self._graph.external(self._layout.weight(role, layer).codes)

    def rotary_caches(self, total_length: str) -> tuple[str, str]:
        """Cosine and sine, each [context, head_dim / 2]; where short texts are turned otherwise, the rows in use.

        ``total_length`` is int32, and decides as transformers does: by the text so far, the cached part included.
        """
        tables = self._graph.external(self._layout.rotary_cosine), self._graph.external(self._layout.rotary_sine)
        spec = self._layout.spec
        shorter, *longer = spec.rope.table_lengths(spec.context_length)
        if not longer:
            return tables
        if self._rotary is None:
            self._rotary = self._chosen_rows(tables, total_length, shorter)
        return self._rotary

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
        """Looks rows of the embedding up."""
        weight = self._layout.weight(Role.TOKEN_EMBEDDING)
        codes = self._graph.external(weight.codes)
        blocks = weight.encoding.blocks
        if blocks is None:
            return self._graph.node("Gather", [codes, token_ids], output)
        return self._graph.node(
            "GatherBlockQuantized",
            [codes, token_ids, self._scales(weight)],
            output,
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def linear(self, role: Role, layer: int | None, values: str, output: str) -> str:
        """values @ weight.T; weights keep torch's orientation [rows, columns] in every encoding."""
        weight = self._layout.weight(role, layer)
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
            [values, codes, self._scales(weight)],
            output,
            domain=MICROSOFT,
            bits=blocks.bits,
            block_size=blocks.block_size,
            N=rows,
            K=columns,
            accuracy_level=_INT8_ACTIVATIONS if weight.encoding.has_int8_inputs else _FLOAT32_ACTIVATIONS,
        )

    def experts(self, layer: int, values: str, router_logits: str, output: str) -> str:
        """The routed experts: softmax over all router logits, top-k, and SwiGLU as silu(gate) * up."""
        shape = self._layout.spec.layer(layer)
        gate_up = self._layout.weight(Role.EXPERT_GATE, layer)
        down = self._layout.weight(Role.EXPERT_DOWN, layer)
        attributes: dict[str, Any] = {"k": shape.top_k, "normalize_routing_weights": int(shape.normalize_top_k)}
        attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        if gate_up.encoding.blocks is None:
            return self._float32_experts(gate_up, down, values, router_logits, output, attributes)
        return self._quantized_experts(gate_up, down, values, router_logits, output, attributes)

    def _float32_experts(
        self,
        gate_up: WeightPlan,
        down: WeightPlan,
        values: str,
        router_logits: str,
        output: str,
        attributes: Mapping[str, Any],
    ) -> str:
        graph = self._graph
        inputs = [values, router_logits, graph.external(gate_up.codes), "", graph.external(down.codes)]
        if self._layout.spec.normalize_top_k:
            return graph.node("MoE", inputs, output, domain=MICROSOFT, **attributes)
        # ONNX Runtime 1.31's CPU kernel may write its output over its input. It copies the input first only when it
        # normalises, and else clears what it is about to read (moe_cpu.cc), so the block would add nothing. A later
        # node that takes the input too keeps it; this one always selects the experts' output.
        routed = graph.node("MoE", inputs, f"{output}.routed", domain=MICROSOFT, **attributes)
        return graph.node("Where", [graph.constant("true", True, np.bool_), routed, values], output)

    def _quantized_experts(
        self,
        gate_up: WeightPlan,
        down: WeightPlan,
        values: str,
        router_logits: str,
        output: str,
        attributes: Mapping[str, Any],
    ) -> str:
        graph, blocks = self._graph, gate_up.encoding.blocks
        assert blocks is not None and blocks == down.encoding.blocks, "the operator has one width and one block size"
        gate_up_codes, down_codes = graph.external(gate_up.codes), graph.external(down.codes)
        inputs = [values, router_logits, gate_up_codes, self._scales(gate_up), "", down_codes, self._scales(down)]
        if not self._layout.spec.normalize_top_k:
            # ONNX Runtime 1.31's CPU kernel normalises the chosen gates whatever the attribute says, unless it is given
            # the gates of all experts (moe_quantization_cpu.cc).
            gates = graph.node("Softmax", [router_logits], f"{output}.gates", axis=-1)
            inputs += [""] * (_ROUTER_WEIGHTS_INPUT - len(inputs)) + [gates]
        return graph.node(
            "QMoE",
            inputs,
            output,
            domain=MICROSOFT,
            expert_weight_bits=blocks.bits,
            block_size=blocks.block_size,
            weights_prepacked=0,  # the codes are plain, not in the order of one GPU's kernels
            **attributes,
        )

    def _scales(self, weight: WeightPlan) -> str:
        """Scales as float32, the type of the activations; the file keeps float16, which codes were chosen for."""
        assert weight.scales is not None
        stored = self._graph.external(weight.scales)
        if stored not in self._float32_scales:  # a tied head shares the embedding's
            cast = self._graph.node("Cast", [stored], f"{stored}.float32", to=onnx.TensorProto.FLOAT)
            self._float32_scales[stored] = cast
        return self._float32_scales[stored]
