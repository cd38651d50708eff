"""The routers of an ONNX graph: finds their inputs, and cuts one out to run it on other inputs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from compressors.model.files.onnx_names import (
    CHOSEN_LOGITS,
    CHOSEN_WEIGHTS,
    EXPERTS_INPUT,
    EXPERTS_SUM,
    OWN_EXPERTS,
    RESIDUAL_FACTOR,
    WEIGHTS_OF_ALL,
)
from compressors.model.predictions.routing_record import selection_margins

__all__ = ["MoeNode", "TokenRouting", "moe_nodes", "router_graph"]

_MOE_OPERATORS = ("MoE", "QMoE")
_ATTENDING_OPERATORS = ("GroupQueryAttention", "MultiHeadAttention", "Attention")
_STATE_OPERATORS = ("LinearAttention", "GatedDeltaNet")  # a layer with one may have a convolution too
_CONVOLUTION = "CausalConvWithState"
_PRODUCTS = ("FusedMatMul", "MatMul", "Gemm", "MatMulNBits")  # of a router
_ROUTER_INPUT = 1  # position of the router logits among the operators' inputs
_MIXING_INPUT = 14  # QMoE's input with the gate weights of all experts, if it does not compute them itself


@dataclass(frozen=True)
class MoeNode:
    """The inputs and attributes of one MoE operator, and how nodes before and behind it change its routing.

    Attributes:
        layer: the decoder layer.
        n_mixers: the number of operators before it that attend or carry a state.
        states: name of the value that the router reads too: [batch, sequence, hidden size].
        router_logits: name of the value that the operator takes, [tokens, experts].
        selection_scores: name of the value whose largest entries decide which experts get logits above the lowest,
            [batch, sequence, experts]; if no node chooses beforehand, the name of the logits.
        factor: name of the value that the operator's output is multiplied with, by token; None: there is none.
        constant_factor: a number that the output is multiplied with.
        top_k: experts of each token.
        normalizes: True if their weights are divided by their sum.
        weights: name of the value with their weights, by falling logit, where nodes compute the experts and no operator
            weighs them; None: an operator does.
    """

    layer: int
    n_mixers: int
    states: str
    router_logits: str
    selection_scores: str
    factor: str | None
    constant_factor: float
    top_k: int
    normalizes: bool
    weights: str | None = None

    @property
    def shown(self) -> tuple[str, ...]:
        """Names of the values that :meth:`routing` takes, each once."""
        names = (self.router_logits, self.selection_scores, self.factor, self.weights)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def routing(self, values: Mapping[str, npt.NDArray[Any]], n_tokens: int) -> TokenRouting:
        """Chooses and weighs as the operator does.

        Args:
            values: the values of :attr:`shown`.
            n_tokens: the number of their tokens.
        """
        of_tokens = {name: values[name].reshape(n_tokens, -1).astype(np.float32) for name in self.shown}
        logits_TE = of_tokens[self.router_logits]
        margins_T = selection_margins(of_tokens[self.selection_scores], self.top_k)
        experts_TK = np.argsort(-logits_TE, axis=1, kind="stable")[:, : self.top_k]
        if self.weights is not None:
            return TokenRouting(experts_TK.astype(np.int32), of_tokens[self.weights], margins_T)
        shifted = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        probabilities_TE = shifted / shifted.sum(axis=1, keepdims=True)
        weights_TK = np.take_along_axis(probabilities_TE, experts_TK, axis=1)
        if self.normalizes:
            weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True)
        if self.constant_factor != 1.0:
            weights_TK = weights_TK * np.float32(self.constant_factor)
        if self.factor is not None:
            weights_TK = weights_TK * of_tokens[self.factor]
        return TokenRouting(experts_TK.astype(np.int32), weights_TK, margins_T)


@dataclass(frozen=True)
class TokenRouting:
    """The routing of one layer."""

    experts_TK: npt.NDArray[np.int32]  # by falling gate weight
    weights_TK: npt.NDArray[np.float32]  # as they are applied
    margins_T: npt.NDArray[np.float32]


def moe_nodes(graph: onnx.GraphProto) -> Iterator[MoeNode]:
    """The MoE operators of a graph, and the experts of our graphs that nodes compute, all or some.

    Nodes are in the order in which they run: a layer's experts come after its attention, its state or its convolution.
    In our own graphs names tell the layer, which may have none of these.
    """
    layer, links, mixing = -1, _Links(graph), _mixing_operators(graph)
    for node in graph.node:
        if node.op_type in mixing:
            layer += 1
        elif node.output[0].endswith(f".{CHOSEN_LOGITS}"):
            yield links.choice_of(node, layer)
        elif node.output[0].endswith(f".{WEIGHTS_OF_ALL}"):
            yield links.choice_of_all(node, layer)
        elif node.op_type in _MOE_OPERATORS and f".{OWN_EXPERTS}" not in node.output[0]:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if attributes.get("use_sparse_mixer", 0) or not links.mixes_by_softmax(node):
                continue  # routed by another, unknown rule
            # absent attributes have the operators' defaults
            normalizes = bool(attributes.get("normalize_routing_weights", 0))
            states, logits = links.states_of(node.input[0]), node.input[_ROUTER_INPUT]
            factor, number = links.factor_of(node.output[0])
            scores = links.scores_behind(logits)
            index, top_k = _layer_of(node, layer), attributes.get("k", 1)
            yield MoeNode(index, layer + 1, states, logits, scores, factor, number, top_k, normalizes)


_OUR_LAYER = re.compile(r"layers\.(\d{1,4})\.")


def _layer_of(node: onnx.NodeProto, last_mixer: int) -> int:
    """The layer that a node of our own graphs names; in others, that of the last mixer."""
    named = _OUR_LAYER.match(node.output[0])
    return last_mixer if named is None else int(named[1])


def _mixing_operators(graph: onnx.GraphProto) -> tuple[str, ...]:
    """The operators of which each layer has one."""
    has_states = any(node.op_type in _STATE_OPERATORS for node in graph.node)
    return (*_ATTENDING_OPERATORS, *(_STATE_OPERATORS if has_states else (_CONVOLUTION,)))


class _Links:
    """The nodes that make a graph's values, and those that take them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._makers = {output: node for node in graph.node for output in node.output}
        self._takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._takers[name].append(node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}

    def mixes_by_softmax(self, node: onnx.NodeProto) -> bool:
        """True if gate weights are the softmax of the router logits, by the operator or by a node before it."""
        mixing = next(iter(node.input[_MIXING_INPUT:]), "")
        if not mixing:
            return True
        maker = self._makers.get(mixing)
        return maker is not None and maker.op_type == "Softmax" and maker.input[0] == node.input[_ROUTER_INPUT]

    def choice_of(self, node: onnx.NodeProto, last_mixer: int) -> MoeNode:
        """The experts of a layer that nodes compute; ``node`` chooses them by their logits."""
        logits, count = node.input
        router = self._makers[logits]
        while router.op_type == "Add":  # of a bias
            router = self._makers[next(name for name in router.input if name in self._makers)]
        top_k = int(onnx.numpy_helper.to_array(self._constants[count])[0])
        weights = node.output[0].removesuffix(CHOSEN_LOGITS) + CHOSEN_WEIGHTS
        layer = _layer_of(node, last_mixer)
        return MoeNode(layer, last_mixer + 1, router.input[0], logits, logits, None, 1.0, top_k, True, weights)

    def choice_of_all(self, node: onnx.NodeProto, last_mixer: int) -> MoeNode:
        """The experts of a layer in which some stand on bases; ``node`` makes the weights of all experts."""
        logits, layer = node.input[0], _layer_of(node, last_mixer)
        chooser = self._chooser_behind(logits)
        top_k = 1 if chooser is None else int(onnx.numpy_helper.to_array(self._constants[chooser.input[1]])[0])
        scores = self.scores_behind(logits)
        factor, number = self.factor_of(node.output[0].removesuffix(WEIGHTS_OF_ALL) + EXPERTS_SUM)
        states = self._states_behind(scores)
        return MoeNode(layer, last_mixer + 1, states, logits, scores, factor, number, top_k, normalizes=True)

    def _states_behind(self, scores: str) -> str:
        """The values that a router multiplied by its matrix to make scores."""
        maker = self._makers[scores]
        while maker.op_type not in _PRODUCTS:
            maker = self._makers[next(name for name in maker.input if name in self._makers)]
        return str(maker.input[0])

    def states_of(self, inputs: str) -> str:
        """The values that the router reads: the experts' inputs, or those that a matrix makes them of."""
        return self._makers[inputs].input[0] if inputs.endswith(f".{EXPERTS_INPUT}") else inputs

    def scores_behind(self, logits: str) -> str:
        """The values by which TopK chose experts, if only the chosen ones' logits are scattered over the lowest."""
        chooser = self._chooser_behind(logits)
        return logits if chooser is None else str(chooser.input[0])

    def _chooser_behind(self, logits: str) -> onnx.NodeProto | None:
        """The TopK node that chose the experts whose logits alone are scattered; None: no node did."""
        maker = self._makers.get(logits)
        if maker is not None and maker.op_type == "Reshape":
            maker = self._makers.get(maker.input[0])
        if maker is None or maker.op_type != "ScatterElements":
            return None
        chooser = self._makers.get(maker.input[1])
        return chooser if chooser is not None and chooser.op_type == "TopK" else None

    def factor_of(self, output: str) -> tuple[str | None, float]:
        """The factors of the experts' output, a value by token and a number, if it is only multiplied.

        A Where that selects the output always, as our graphs have it behind an operator, changes nothing. Our graphs'
        factor of what a whole block adds is none of the experts'.
        """
        takers = self._takers[output]
        if len(takers) == 1 and takers[0].op_type == "Where" and takers[0].input[1] == output:
            return self.factor_of(takers[0].output[0])
        if len(takers) != 1 or takers[0].op_type != "Mul":
            return None, 1.0
        (factor,) = (name for name in takers[0].input if name != output) if len(set(takers[0].input)) == 2 else ("",)
        if factor.startswith(RESIDUAL_FACTOR):
            return None, 1.0
        if factor not in self._constants:
            return (factor or None), 1.0
        constant = self._constants[factor]
        if constant.external_data or prod(constant.dims) != 1:
            return None, 1.0
        return None, float(onnx.numpy_helper.to_array(constant).reshape(()))


def router_graph(model: onnx.ModelProto, states: str, outputs: Sequence[str]) -> onnx.ModelProto | None:
    """Cuts out the part of a graph that turns hidden states into router logits and values beside them.

    Args:
        model: the whole graph; weights in a data file may stay there.
        states: name of the value that goes in, float32 [batch, sequence, hidden size].
        outputs: names of the values that come out, float32.

    Returns:
        A graph over the same weights, or None if the outputs depend on anything else that a node makes.
    """
    makers = {output: node for node in model.graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: dict[str, onnx.NodeProto] = {}  # by the first output; several outputs of one may be needed
    needed: dict[str, onnx.TensorProto] = {}
    wanted, seen = list(outputs), {states, ""}  # an input that is left out has an empty name
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in weights:
            needed[name] = weights[name]
        elif name in makers:
            nodes[makers[name].output[0]] = makers[name]
            wanted.extend(makers[name].input)
        else:
            return None  # an input of the whole graph
    order = {node.output[0]: position for position, node in enumerate(model.graph.node)}
    graph = onnx.helper.make_graph(
        sorted(nodes.values(), key=lambda node: order[node.output[0]]),
        "router",
        [onnx.helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        list(needed.values()),
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
