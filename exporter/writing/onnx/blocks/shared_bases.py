"""Routed experts of which some stand on shared bases: each is a base plus a low-rank adapter of its own.

No expert is multiplied out. A base multiplies the tokens that chose any of its experts, once each; small bases multiply
all tokens, joined in one product (:mod:`exporter.writing.onnx.blocks.uses`). The experts add their adapters' products
(:mod:`exporter.writing.onnx.blocks.adapted_experts`). What leaves their neurons is added up by weight, because the last
product is linear: the base multiplies the sum, once a token. Experts with matrices of their own go through ONNX
Runtime's operator as usual; QMoE skips those whose weight is 0 (``moe_quantization_cpu.cc`` in 1.31). So the cost
depends on bases and chosen experts, never on the number of experts.

Letters: G groups of experts with a base in common, U uses: pairs of a group and a token that chose any of its experts.
"""

from __future__ import annotations

import numpy as np
import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.roles import Role
from compressors.model.description.shared_bases import SharedBases
from compressors.model.files.onnx_names import EXPERTS_SUM, OWN_EXPERTS, WEIGHTS_OF_ALL
from compressors.model.sources.onnx_weights import joins_bases
from exporter.writing.onnx.blocks.adapted_experts import add_adapted_experts
from exporter.writing.onnx.blocks.operators import add_experts
from exporter.writing.onnx.blocks.uses import Group, JoinedUses, SeparateUses, add_zeros, cut_by_group, membership_of
from exporter.writing.onnx.routing import OperatorRouting, add_masked_routing
from exporter.writing.onnx.weights import LayerNodes

__all__ = ["add_experts_on_bases"]


def add_experts_on_bases(layer: LayerNodes, routed: Routed, logits: str, normed: str, output: str) -> str:
    """Adds the choice of experts and the sum of their outputs by weight, and returns its name.

    Args:
        layer: takes the nodes.
        routed: the experts.
        logits: the router's, [batch, sequence, E].
        normed: the experts' input, [batch, sequence, D].
        output: the result's name, if the weights do not add up to 1 or are scaled; else it has one of its own.
    """
    graph, prefix, bases = layer.graph, layer.prefix, layer.spec.bases
    assert bases is not None, f"layer {layer.index} has no bases"
    bias = layer.vector(Role.SELECTION_BIAS) if routed.routing.has_selection_bias else None
    routing = add_masked_routing(graph, routed, logits, bias, prefix)
    weights = graph.node("Softmax", [routing.logits], f"{prefix}{WEIGHTS_OF_ALL}", axis=-1)
    shape = graph.constant(f"shape.rows_of_{layer.spec.expert_size}", [-1, layer.spec.expert_size])
    states = graph.node("Reshape", [normed, shape], f"{prefix}experts.inputs")
    own = _add_own(layer, routed, bases, routing.logits, weights, states)
    total = _OnBases(layer, routed, bases).add(states, weights, own)
    shape = graph.node("Shape", [normed], f"{prefix}experts.shape")
    summed = graph.node("Reshape", [total, shape], f"{prefix}{EXPERTS_SUM}")
    return summed if routing.factor is None else graph.node("Mul", [summed, routing.factor], output)


def _add_own(layer: LayerNodes, routed: Routed, bases: SharedBases, logits: str, weights: str, states: str) -> str:
    """Adds the experts with matrices of their own: [T, D]; zeros if there are none."""
    graph, name = layer.graph, f"{layer.prefix}{OWN_EXPERTS}"
    if not bases.own:
        return graph.node("Mul", [states, graph.constant("bases.nothing", 0, np.float32)], name)
    chosen = graph.constant("bases.own", bases.own)
    gates = graph.node("Gather", [weights, chosen], f"{name}.gates", axis=1)
    whole = routed.resized(len(bases.own), routed.width)
    if layer.weight(Role.EXPERT_DOWN).encoding.blocks is not None:
        # The largest weights are those of the experts that a token chose.
        routing = OperatorRouting(gates, normalizes=False, factor=None, gates=gates)
        return add_experts(layer, whole, routing, states, name)
    # MoE has no input for weights: it makes them add up to 1.
    own = graph.node("Gather", [logits, chosen], f"{name}.logits", axis=1)
    found = add_experts(layer, whole, OperatorRouting(own, normalizes=True, factor=None), states, f"{name}.mean")
    share = graph.node("ReduceSum", [gates, graph.constant("axis.last", [-1])], f"{name}.share", keepdims=1)
    return graph.node("Mul", [found, share], name)


class _OnBases:
    """The experts of a layer that stand on bases."""

    def __init__(self, layer: LayerNodes, routed: Routed, bases: SharedBases) -> None:
        self._layer = layer
        self._graph = layer.graph
        self._routed = routed
        self._bases = bases
        numbers = [base for base in (*range(bases.n_bases), SharedBases.ZERO) if bases.members(base)]
        self._groups = [
            Group(base, tuple(bases.replaced.index(expert) for expert in bases.members(base))) for base in numbers
        ]
        self._name = f"{layer.prefix}bases"

    def add(self, states: str, weights: str, own: str) -> str:
        """Adds their outputs by weight to those of the other experts: [T, D].

        Args:
            states: the experts' input, [T, D].
            weights: those of all experts, [T, E].
            own: the outputs of experts with matrices of their own.
        """
        add = self._add_joined if joins_bases(self._layer.spec) else self._add_separate
        return add(states, weights, own)

    def _add_joined(self, states: str, weights: str, own: str) -> str:
        """All bases multiply all tokens."""
        layer, role = self._layer, self._routed.input_roles[0]
        products = None
        if self._bases.n_bases:
            products = layer.weights.product_of_joined_bases(role, layer.index, states, f"{self._name}.inputs")
        uses = JoinedUses(self._graph, self._routed, self._groups, products)
        *neurons, adapted = add_adapted_experts(layer, self._routed, states, weights, uses)
        downs = [
            layer.weights.product_of_joined_bases(Role.EXPERT_DOWN, layer.index, of_all, f"{self._name}.outputs")
            for of_all in neurons
        ]
        return self._graph.node("Sum", [own, adapted, *downs], f"{self._name}.sum")

    def _add_separate(self, states: str, weights: str, own: str) -> str:
        """Each base multiplies the tokens that chose any of its experts."""
        uses = self._separate_uses(states, weights)
        *neurons, adapted = add_adapted_experts(self._layer, self._routed, states, weights, uses)
        total = self._graph.node("Add", [own, adapted], f"{self._name}.sum")
        for group, of_group, places in zip(self._groups, neurons, uses.places, strict=True):
            if group.base != SharedBases.ZERO:
                down = self._product(Role.EXPERT_DOWN, group, of_group, of_group)
                total = self._graph.node("ScatterND", [total, places, down], f"{down}.sum", reduction="add")
        return total

    def _separate_uses(self, states: str, weights: str) -> SeparateUses:
        """Each base's products with the tokens that chose any of its experts."""
        graph, name = self._graph, self._name
        tokens, counts = self._tokens(weights)
        inputs = graph.node("Gather", [states, tokens], f"{name}.inputs", axis=0)
        column = graph.node("Reshape", [tokens, graph.constant("shape.column", [-1, 1])], f"{name}.column")
        by_group = zip(self._groups, cut_by_group(graph, inputs, self._groups, counts), strict=True)
        products = [self._products(group, of_group, of_group) for group, of_group in by_group]
        places = cut_by_group(graph, column, self._groups, counts)
        return SeparateUses(graph, self._routed, self._groups, products, places, counts)

    def _tokens(self, weights: str) -> tuple[str, str]:
        """The tokens of all uses, group by group, [U], and how many each group has, [G]."""
        graph, name = self._graph, self._name
        membership = np.zeros((len(self._bases.base_of), len(self._groups)))
        membership[list(self._bases.replaced)] = membership_of(self._groups)
        in_groups = graph.constant("bases.membership", membership, np.float32)
        of_groups = graph.node("MatMul", [weights, in_groups], f"{name}.of_groups")
        by_group = graph.node("Transpose", [of_groups], f"{name}.by_group", perm=[1, 0])
        uses = graph.node("Greater", [by_group, graph.constant("bases.nothing", 0, np.float32)], f"{name}.uses")
        ones = graph.node("Cast", [uses], f"{name}.ones", to=onnx.TensorProto.INT64)
        counts = graph.node("ReduceSum", [ones, graph.constant("axis.1", [1])], f"{name}.counts", keepdims=0)
        places = graph.node("NonZero", [uses], f"{name}.places")
        return graph.node("Gather", [places, graph.constant("one", 1)], f"{name}.tokens", axis=0), counts

    def _products(self, group: Group, inputs: str, name: str) -> str:
        """The inputs times gate and up of a group's base, side by side, [uses, P F]; zeros without a base."""
        graph, routed = self._graph, self._routed
        if group.base != SharedBases.ZERO:
            return self._product(routed.input_roles[0], group, inputs, name)
        return add_zeros(graph, inputs, routed.input_rows, f"{name}.nothing")

    def _product(self, role: Role, group: Group, values: str, name: str) -> str:
        output = f"{name}.{role.name.lower()}"
        return self._layer.weights.product_of_base(role, self._layer.index, group.base, values, output)
