"""The routers of an ONNX graph: what each is told, and how to cut one out, to run it on inputs of our own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

__all__ = ["MoeNode", "moe_nodes", "router_graph"]

_MOE_OPERATORS = ("MoE", "QMoE")
_ATTENTION_OPERATORS = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_ROUTER_INPUT = 1  # position of the router logits among the operators' inputs
_MIXING_INPUT = 14  # where QMoE takes the gate weights of all experts from, if it does not compute them itself


@dataclass(frozen=True)
class MoeNode:
    """The inputs and attributes of one MoE operator."""

    layer: int
    states: str  # name of the value that the router reads too: [batch, sequence, hidden size]
    router_logits: str  # name of the value [tokens, experts]
    top_k: int
    normalizes: bool

    def routing(self, logits_TE: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Experts [T, K] by falling gate weight, and the weights as they are applied."""
        shifted = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        probabilities_TE = shifted / shifted.sum(axis=1, keepdims=True)
        experts_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : self.top_k]
        weights_TK = np.take_along_axis(probabilities_TE, experts_TK, axis=1)
        if self.normalizes:
            weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True)
        return experts_TK.astype(np.int32), weights_TK


def moe_nodes(graph: onnx.GraphProto) -> Iterator[MoeNode]:
    """The MoE operators of a graph.

    Nodes are in the order in which they run: a layer's experts come after its attention.
    """
    layer = -1
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in _ATTENTION_OPERATORS:
            layer += 1
        elif node.op_type in _MOE_OPERATORS:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if attributes.get("use_sparse_mixer", 0) or not _mixes_by_softmax(node, makers):
                continue  # routed by another rule, which is not told
            # absent attributes have the operators' defaults
            normalizes = bool(attributes.get("normalize_routing_weights", 0))
            states, router_logits = node.input[0], node.input[_ROUTER_INPUT]
            yield MoeNode(layer, states, router_logits, attributes.get("k", 1), normalizes)


def _mixes_by_softmax(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether gate weights are the softmax of the router logits: the operator's own, or that of a node before it."""
    mixing = next(iter(node.input[_MIXING_INPUT:]), "")
    if not mixing:
        return True
    maker = makers.get(mixing)
    return maker is not None and maker.op_type == "Softmax" and maker.input[0] == node.input[_ROUTER_INPUT]


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
