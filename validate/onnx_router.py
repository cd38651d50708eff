"""Cuts one router out of an ONNX graph, to run it on inputs of our own."""

from __future__ import annotations

import onnx

__all__ = ["router_graph"]


def router_graph(model: onnx.ModelProto, states: str, logits: str) -> onnx.ModelProto | None:
    """The part of a graph that makes router logits of hidden states.

    Args:
        model: the whole graph; weights in a data file may stay there.
        states: name of the value that goes in, float32 [batch, sequence, hidden size].
        logits: name of the value that comes out, float32 [tokens, experts].

    Returns:
        A graph over the same weights, or None if the logits depend on anything else that a node makes.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []  # the last first
    needed: dict[str, onnx.TensorProto] = {}
    wanted, seen = [logits], {states, ""}  # an input that is left out has an empty name
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in weights:
            needed[name] = weights[name]
        elif name in makers:
            nodes.append(makers[name])
            wanted.extend(makers[name].input)
        else:
            return None  # an input of the whole graph
    order = {node.output[0]: position for position, node in enumerate(model.graph.node)}
    graph = onnx.helper.make_graph(
        sorted(nodes, key=lambda node: order[node.output[0]]),
        "router",
        [onnx.helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT, None)],
        list(needed.values()),
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
