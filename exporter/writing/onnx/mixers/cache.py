"""The cache of attention: keys and values, as inputs and outputs of the graph."""

from __future__ import annotations

import onnx

from compressors.model.description.onnx_cache import CacheHeads
from compressors.model.files.onnx_names import CACHED, cache_input, cache_output
from exporter.writing.onnx.builder import GraphBuilder
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_past", "add_present", "present_names"]

_FLOAT = onnx.TensorProto.FLOAT


def add_past(layer: LayerNodes, heads: CacheHeads) -> list[str]:
    """Adds the caches as they come in.

    Their heads and their width are declared as unknown, because optimum guesses them from ``config.json`` and guesses
    wrong for an empty cache; a Reshape says what they are. Where layers differ in them they are declared, because
    onnxruntime-genai then reads them from the graph, and no client could guess them.
    """
    graph = layer.graph
    shape = graph.constant("shape.past", [0, heads.number, 0, heads.width])
    unknown: tuple[str | int, str | int] = ("past_heads", "past_head_dim")
    number, width = (heads.number, heads.width) if layer.caches_differ else unknown
    found = []
    for kind in CACHED:
        name = cache_input(layer.index, kind)
        graph.add_input(name, _FLOAT, ["batch", number, "past_sequence", width])
        found.append(graph.node("Reshape", [name, shape], f"{name}.shaped"))
    return found


def present_names(layer: int) -> list[str]:
    """The names of the caches as a layer leaves them."""
    return [cache_output(layer, kind) for kind in CACHED]


def add_present(graph: GraphBuilder, layer: int, heads: CacheHeads) -> None:
    """Declares the caches of all tokens so far."""
    dimensions: list[str | int] = ["batch", heads.number, "present_sequence", heads.width]
    for name in present_names(layer):
        graph.add_output(name, _FLOAT, dimensions)
