"""A short convolution between two gates; its cache is the convolution's last inputs."""

from __future__ import annotations

from compressors.model.description.mixers import ShortConvolution
from compressors.model.description.roles import Role
from exporter.writing.onnx.builder import GraphBuilder
from exporter.writing.onnx.mixers.convolution import convolved
from exporter.writing.onnx.mixers.states import add_past_states, add_state_outputs
from exporter.writing.onnx.padding import AttentionMask
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["ShortConvolutionNodes"]

_NAME = "short"


class ShortConvolutionNodes:
    """Implements :class:`~exporter.writing.onnx.mixers.registry.MixerNodes`."""

    def __init__(self, mixer: ShortConvolution) -> None:
        self._mixer = mixer

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds the projection, the convolution of values times first gates, and the product with the second gates."""
        tokens, graph, prefix = mask.recurrent, layer.graph, f"{layer.prefix}{_NAME}"
        assert tokens is not None
        (past,) = add_past_states(layer, self._mixer)
        kept = graph.node("Mul", [normed, tokens.kept], f"{prefix}.input")
        projected = layer.linear(Role.MIXER_INPUT, kept, f"{prefix}.projected")
        first, second, values = layer.split(projected, [self._mixer.channels] * 3, "parts")
        inputs = graph.node("Mul", [first, values], f"{prefix}.inputs")
        outputs = convolved(layer, inputs, past, tokens, name=_NAME, kernel=self._mixer.kernel, activation="none")
        gated = graph.node("Mul", [second, outputs], f"{prefix}.gated")
        return layer.linear(Role.MIXER_OUTPUT, gated, prefix)

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the convolution's last inputs."""
        add_state_outputs(graph, layer, self._mixer)
