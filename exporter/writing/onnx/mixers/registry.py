"""Finds the file that has a mixer's nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from compressors.model.description.mixers import GatedDelta, GroupedQuery, Latent, Mamba2, Mixer, ShortConvolution
from exporter.writing.onnx.builder import GraphBuilder
from exporter.writing.onnx.mixers.gated_delta import GatedDeltaNodes
from exporter.writing.onnx.mixers.grouped_query import GroupedQueryNodes
from exporter.writing.onnx.mixers.latent import LatentNodes
from exporter.writing.onnx.mixers.mamba2 import Mamba2Nodes
from exporter.writing.onnx.mixers.short_convolution import ShortConvolutionNodes
from exporter.writing.onnx.padding import AttentionMask
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["MixerNodes", "mixer_nodes"]


class MixerNodes(Protocol):
    """The nodes of a layer's mixer, and the inputs and outputs of the graph that are its cache."""

    def add(self, layer: LayerNodes, normed: str, mask: AttentionMask) -> str:
        """Adds the cache's inputs and the nodes.

        Args:
            layer: takes the nodes.
            normed: the layer's normalised input.
            mask: the values about padding and positions.

        Returns:
            The name of the output, to be added to the residual stream.
        """

    def add_cache_outputs(self, graph: GraphBuilder, layer: int) -> None:
        """Declares the outputs of a layer's cache."""


_NODES: Mapping[type, Callable[[Any], MixerNodes]] = {
    GroupedQuery: GroupedQueryNodes,
    Latent: LatentNodes,
    GatedDelta: GatedDeltaNodes,
    Mamba2: Mamba2Nodes,
    ShortConvolution: ShortConvolutionNodes,
}


def mixer_nodes(mixer: Mixer) -> MixerNodes:
    """The nodes of a mixer."""
    return _NODES[type(mixer)](mixer)
