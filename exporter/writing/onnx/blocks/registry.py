"""Finds the file that has a feed-forward's nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compressors.model.description.feed_forward import Dense, FeedForward, Routed
from exporter.writing.onnx.blocks.dense import add_dense
from exporter.writing.onnx.blocks.routed import add_routed
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_feed_forward"]

_ADD: Mapping[type, Callable[[LayerNodes, Any, str, str], str]] = {Routed: add_routed, Dense: add_dense}


def add_feed_forward(layer: LayerNodes, feed_forward: FeedForward, normed: str, residual: str) -> str:
    """Adds the nodes of a layer's feed-forward; returns its output, to be added to the residual stream.

    Args:
        layer: takes the nodes.
        feed_forward: the feed-forward.
        normed: its input.
        residual: the residual stream, which parts with norms of their own read.
    """
    return _ADD[type(feed_forward)](layer, feed_forward, normed, residual)
