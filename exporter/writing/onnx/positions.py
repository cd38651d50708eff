"""The positions whose logits are made: each row's last ones, as many as the client asks for, or all of them.

A client reads a prompt for its next token alone, and a head of 152,000 rows, at every position of a prompt, can take
more time than all layers. So what follows the last mixer is computed at the wanted positions only.

Padding behind a row's tokens, as onnxruntime-genai puts it into batches, does not count: the last position is that of
the row's last token.
"""

from __future__ import annotations

from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["WantedPositions", "add_wanted_positions"]


class WantedPositions:
    """Takes the wanted positions out of values of all."""

    def __init__(self, graph: GraphBuilder, places: str) -> None:
        self._graph = graph
        self._places = places

    def of(self, values: str, name: str) -> str:
        """Adds the node that takes [batch, wanted, D] from values [batch, sequence, D], and returns their name."""
        return self._graph.node("GatherND", [values, self._places], f"wanted.{name}", batch_dims=1)


def add_wanted_positions(graph: GraphBuilder, number: str, end_of_tokens: str) -> WantedPositions:
    """Adds the nodes that count the positions; in a row with fewer tokens the first position takes the place of others.

    Args:
        graph: where they go; it has the value ``sequence.length``.
        number: int64 scalar: how many are wanted; 0: all, in their order, padding included.
        end_of_tokens: int64 [batch, 1]: the number of each row's last token, counted from 1.
    """
    zero, one, axis_2 = graph.constant("zero", 0), graph.constant("one", 1), graph.constant("axis.2", [2])
    length = "sequence.length"
    is_all = graph.node("Equal", [number, zero], "wanted.is_all")
    at_most = graph.node("Min", [number, length], "wanted.at_most")
    counts = graph.node("Where", [is_all, length, at_most], "wanted.counts")
    ends = graph.node("Where", [is_all, length, end_of_tokens], "wanted.ends")
    first = graph.node("Sub", [ends, counts], "wanted.first")
    count = graph.node("Squeeze", [counts, graph.constant("axis.0", [0])], "wanted.count")
    numbers = graph.node("Range", [zero, count, one], "wanted.numbers")
    columns = graph.node("Add", [first, numbers], "wanted.columns")
    positions = graph.node("Max", [columns, zero], "wanted.positions")
    return WantedPositions(graph, graph.node("Unsqueeze", [positions, axis_2], "wanted.places"))
