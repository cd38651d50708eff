"""The decoder as an ONNX graph: in every layer a mixer and, unless the layer has lost it, a feed-forward.

Inputs and outputs have the names that onnxruntime-genai and optimum expect. The graph serves prompts and single
steps, any batch size, and padding on either side. What follows the last mixer is computed at the positions whose logits
are wanted: without the optional input ``num_logits_to_keep`` at the last one.
"""

from __future__ import annotations

import numpy as np
import onnx

from compressors.model.description.mixers import NoMixer
from compressors.model.description.onnx_cache import Attention, cache_heads
from compressors.model.description.roles import Role
from compressors.model.files.onnx_names import (
    EMBEDDING_FACTOR,
    HEAD_FACTOR,
    LOGIT_CAP,
    NUM_LOGITS_TO_KEEP,
    RESIDUAL_FACTOR,
)
from exporter.writing.onnx.blocks.registry import add_feed_forward
from exporter.writing.onnx.builder import MICROSOFT, GraphBuilder
from exporter.writing.onnx.layout import TensorLayout
from exporter.writing.onnx.mixers.registry import mixer_nodes
from exporter.writing.onnx.padding import AttentionMask, add_attention_mask
from exporter.writing.onnx.positions import WantedPositions, add_wanted_positions
from exporter.writing.onnx.weights import LayerNodes, WeightNodes

__all__ = ["build_model"]

_AFTER_MIXER, _AFTER_FEED_FORWARD = Role.ATTENTION_OUTPUT_NORM, Role.MOE_OUTPUT_NORM
_WANTED_LOGITS = 1  # of a prompt, unless a client asks for more
_FLOAT, _INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def build_model(layout: TensorLayout) -> onnx.ModelProto:
    """The whole graph; its weights are references into the data file that ``layout`` describes."""
    return _Decoder(layout).build()


class _Decoder:
    def __init__(self, layout: TensorLayout) -> None:
        self._spec = layout.spec.written
        self._graph = GraphBuilder()
        self._weights = WeightNodes(self._graph, layout)

    def build(self) -> onnx.ModelProto:
        graph, spec = self._graph, self._spec
        input_ids = graph.add_input("input_ids", _INT64, ["batch", "sequence"])
        mask = graph.add_input("attention_mask", _INT64, ["batch", "total_sequence"])
        # Connected to nothing: rotary positions count up from the cache. Clients that feed them expect the name.
        graph.add_input("position_ids", _INT64, ["batch", "sequence"])
        number = graph.add_input_with_default(NUM_LOGITS_TO_KEEP, _WANTED_LOGITS)
        attention_mask = add_attention_mask(graph, input_ids, mask, [layer.mixer for layer in spec.layers])
        wanted = add_wanted_positions(graph, number, attention_mask.end_of_tokens)
        residual, branch = self._layers(input_ids, attention_mask, wanted)
        normed, _ = self._norm(Role.FINAL_NORM, None, residual, branch)
        normed = self._times(1 / spec.logit_divisor, HEAD_FACTOR, normed)  # there are fewer of these than of logits
        self._head(normed)
        # Clients bind memory of this size; by the 1 onnxruntime-genai knows that a prompt has logits of one position.
        graph.add_output("logits", _FLOAT, ["batch", _WANTED_LOGITS, spec.vocab_size])
        for index, layer in enumerate(spec.layers):
            if not isinstance(layer.mixer, NoMixer):
                mixer_nodes(layer.mixer).add_cache_outputs(graph, index)
        return graph.model(spec.model_type)

    def _layers(self, input_ids: str, attention_mask: AttentionMask, wanted: WantedPositions) -> tuple[str, str | None]:
        """Adds embedding and layers; returns the residual stream and what the last block adds to it, if anything.

        Behind the last mixer, both have the wanted positions alone.
        """
        graph, spec = self._graph, self._spec
        embedded = self._weights.embedding(input_ids, "embedding")
        residual = self._times(spec.embedding_scale, EMBEDDING_FACTOR, embedded)
        caches = {cache_heads(layer.mixer) for layer in spec.layers if isinstance(layer.mixer, Attention)}
        caches_differ = len(caches) > 1
        last_mixer = max(index for index, layer in enumerate(spec.layers) if not isinstance(layer.mixer, NoMixer))
        branch: str | None = None  # what the last block made, not yet added to the residual stream
        for index, layer in enumerate(spec.layers):
            nodes = LayerNodes(graph, self._weights, layer, index, spec.context_length, caches_differ)
            if not isinstance(layer.mixer, NoMixer):
                normed, residual = self._norm(Role.ATTENTION_NORM, index, residual, branch)
                branch = mixer_nodes(layer.mixer).add(nodes, normed, attention_mask)
                branch = self._times(layer.residual_scale, RESIDUAL_FACTOR, self._normed(nodes, branch, _AFTER_MIXER))
            if index == last_mixer and branch is not None:
                residual, branch = wanted.of(residual, "residual"), wanted.of(branch, "branch")
            if layer.feed_forward is not None:
                normed, residual = self._norm(Role.MOE_NORM, index, residual, branch)
                branch = add_feed_forward(nodes, layer.feed_forward, normed, residual)
                branch = self._normed(nodes, branch, _AFTER_FEED_FORWARD)
                branch = self._times(layer.residual_scale, RESIDUAL_FACTOR, branch)
            scale = nodes.vector(Role.LAYER_SCALE)
            if scale is not None:
                residual, branch = self._scaled(nodes, residual, branch, scale), None
        return residual, branch

    def _scaled(self, layer: LayerNodes, residual: str, branch: str | None, scale: str) -> str:
        """Adds the last block, if there is one, and multiplies what leaves the layer."""
        left = residual if branch is None else self._graph.node("Add", [residual, branch], f"{layer.prefix}output")
        return self._graph.node("Mul", [left, scale], f"{layer.prefix}output.scaled")

    def _head(self, normed: str) -> None:
        """Makes the logits, limited where the model limits them."""
        cap = self._spec.logit_cap
        if cap is None:
            self._weights.linear(Role.HEAD, None, normed, "logits")
            return
        limit = self._graph.constant(LOGIT_CAP, cap, np.float32)
        product = self._weights.linear(Role.HEAD, None, normed, "logits.unlimited")
        share = self._graph.node("Div", [product, limit], "logits.share")
        limited = self._graph.node("Tanh", [share], "logits.limited")
        self._graph.node("Mul", [limited, limit], "logits")

    def _times(self, factor: float, name: str, values: str) -> str:
        """Multiplies values by a factor of the model, unless it changes nothing; ``name`` is the constant's."""
        if factor == 1.0:
            return values
        constant = self._graph.constant(name, factor, np.float32)
        return self._graph.node("Mul", [values, constant], f"{values}.scaled")

    def _normed(self, layer: LayerNodes, branch: str, role: Role) -> str:
        """Normalises what a block adds to the residual stream, if the layer has a norm there."""
        return layer.rms_norm(role, branch, f"{branch}.normed") if role in layer.spec.roles else branch

    def _norm(self, role: Role, layer: int | None, residual: str, branch: str | None) -> tuple[str, str]:
        """Adds the branch to the residual stream and normalises; returns the normed values and the new residual."""
        name = ("" if layer is None else f"layers.{layer}.") + role.replace(" ", "_")
        if branch is None:
            return self._weights.rms_norm(role, layer, residual, name), residual
        outputs = [name, "", "", f"{name}.residual"]
        inputs = [branch, residual, self._weights.norm_scales(role, layer)]
        normed = self._graph.node(
            "SkipSimplifiedLayerNormalization",
            inputs,
            outputs,
            domain=MICROSOFT,
            epsilon=self._spec.rms_norm_eps,
        )
        return normed, outputs[-1]
