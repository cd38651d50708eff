"""Turns router logits into inputs of the MoE operators, for every rule that a model can have.

The operators have one rule: a softmax over all experts, top-k and, as an option, weights that are divided by their sum.
Nodes compute any other rule. They give the operator the logarithms of the chosen experts' weights, and for the other
experts a number so low that softmax makes it 0: so the operator computes the weights divided by their sum. If the
weights do not add up to 1, its output is multiplied by their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from compressors.model.description.feed_forward import Routed
from compressors.model.description.routing import Routing, Score
from compressors.model.files.onnx_names import NOT_CHOSEN, ROUTING
from exporter.writing.onnx.builder import GraphBuilder

__all__ = ["OperatorRouting", "add_masked_routing", "add_routing"]

_ONLY_A_GUARD = 1e-12  # an epsilon up to this only avoids 0 / 0, which does not occur after a softmax


@dataclass(frozen=True)
class OperatorRouting:
    """The routing of an operator.

    Attributes:
        logits: the operator's input of its softmax: [tokens, E].
        normalizes: True if it divides the chosen weights by their sum.
        factor: the value that its output must be multiplied by; None: none.
        gates: the weights of all experts, [tokens, E], if the operator shall not compute them.
    """

    logits: str
    normalizes: bool
    factor: str | None
    gates: str | None = None


def add_routing(graph: GraphBuilder, routed: Routed, logits: str, bias: str | None, prefix: str) -> OperatorRouting:
    """Adds the nodes of a layer's routing.

    Args:
        graph: takes the nodes.
        routed: the layer's experts.
        logits: the router's logits, [batch, sequence, E].
        bias: the selection bias [E], where the rule has one.
        prefix: the beginning of the names of values.
    """
    if _is_the_operators(routed.routing):
        rows = _rows(graph, routed, logits, prefix)
        return OperatorRouting(rows, _sums_to_one(routed.routing), _constant_factor(graph, routed.routing))
    return add_masked_routing(graph, routed, logits, bias, prefix)


def add_masked_routing(
    graph: GraphBuilder, routed: Routed, logits: str, bias: str | None, prefix: str
) -> OperatorRouting:
    """Adds the same, with all other experts' logits so low that a softmax over all makes their weights 0.

    The arguments are those of :func:`add_routing`.
    """
    return _Masked(graph, routed, prefix).add(logits, bias)


def _is_the_operators(routing: Routing) -> bool:
    if routing.has_selection_bias or routing.n_groups > 1 or routing.score is Score.SIGMOID:
        return False
    return not _has_a_sum_of_its_own(routing)


def _sums_to_one(routing: Routing) -> bool:
    """True if the weights, without the factor ``scale``, are divided by their sum."""
    return routing.normalizes or routing.score is Score.LOGITS


def _has_a_sum_of_its_own(routing: Routing) -> bool:
    """True if weights are divided by something else than their sum."""
    divides = routing.normalizes and routing.score is not Score.LOGITS
    return divides and max(routing.epsilon, routing.least_sum) > _ONLY_A_GUARD


def _constant_factor(graph: GraphBuilder, routing: Routing) -> str | None:
    return None if routing.scale == 1.0 else graph.constant("routing.scale", routing.scale, np.float32)


def _rows(graph: GraphBuilder, routed: Routed, logits: str, prefix: str) -> str:
    """Joins batch and sequence into one axis."""
    shape = graph.constant(f"shape.router_of_{routed.n_experts}", [-1, routed.n_experts])
    return graph.node("Reshape", [logits, shape], f"{prefix}router_logits")


class _Masked:
    """Adds the nodes of a rule that the operators do not have."""

    def __init__(self, graph: GraphBuilder, routed: Routed, prefix: str) -> None:
        self._graph = graph
        self._routed = routed
        self._routing = routed.routing
        self._prefix = prefix
        self._name = prefix + ROUTING

    def add(self, logits: str, bias: str | None) -> OperatorRouting:
        graph, name = self._graph, self._name
        scores, experts = self._chosen(self._selection_scores(logits, bias), self._routed.top_k, "experts")
        of_chosen = scores
        if bias is not None or not self._chosen_by_weight:
            of_chosen = graph.node(
                "GatherElements", [self._log_scores(logits), experts], f"{name}.log_weights", axis=-1
            )
        not_chosen = graph.constant("routing.not_chosen", NOT_CHOSEN, np.float32)
        others = graph.node("Min", [logits, not_chosen], f"{name}.not_chosen")
        masked = graph.node("ScatterElements", [others, experts, of_chosen], f"{name}.masked", axis=-1)
        rows = _rows(graph, self._routed, masked, self._prefix)
        return OperatorRouting(rows, normalizes=True, factor=self._factor(of_chosen))

    @property
    def _chosen_by_weight(self) -> bool:
        """True if logits are the logarithms of the weights but for a sum, which does not matter."""
        routing = self._routing
        divides = _sums_to_one(routing) and not _has_a_sum_of_its_own(routing)
        return divides and routing.n_groups == 1 and routing.score is not Score.SIGMOID

    def _log_scores(self, logits: str) -> str:
        """Logarithms of the scores that stay finite and keep their digits where a score is nearly 0."""
        graph, name = self._graph, self._name
        if self._routing.score is Score.SOFTMAX:
            return graph.node("LogSoftmax", [logits], f"{name}.log_scores", axis=-1)
        if self._routing.score is Score.LOGITS:
            return logits
        negative = graph.node("Neg", [logits], f"{name}.negative_logits")
        return graph.node("Neg", [graph.node("Softplus", [negative], f"{name}.softplus")], f"{name}.log_scores")

    def _selection_scores(self, logits: str, bias: str | None) -> str:
        """The values by which experts are chosen: logits where they give the same order as scores."""
        graph, name = self._graph, self._name
        if bias is None and self._routing.n_groups == 1:
            return logits
        scores = logits
        if self._routing.score is Score.SOFTMAX:
            scores = graph.node("Softmax", [logits], f"{name}.scores", axis=-1)
        elif self._routing.score is Score.SIGMOID:
            scores = graph.node("Sigmoid", [logits], f"{name}.scores")
        if bias is not None:
            scores = graph.node("Add", [scores, bias], f"{name}.biased_scores")
        return scores if self._routing.n_groups == 1 else self._of_best_groups(scores)

    def _of_best_groups(self, scores: str) -> str:
        """The scores, with minus infinity for experts outside of the best groups."""
        graph, name, routing = self._graph, self._name, self._routing
        members = self._routed.n_experts // routing.n_groups
        shape = graph.constant("shape.groups", [0, 0, routing.n_groups, members])
        grouped = graph.node("Reshape", [scores, shape], f"{name}.grouped")
        of_each = self._group_scores(grouped, members)
        _, groups = self._chosen(of_each, routing.n_chosen_groups, "groups")
        shut, opened = self._filled(of_each, -np.inf, f"{name}.shut"), self._filled(groups, 0.0, f"{name}.open")
        lowered = graph.node("ScatterElements", [shut, groups, opened], f"{name}.lowered", axis=-1)
        column = graph.node("Unsqueeze", [lowered, graph.constant("axis.last", [-1])], f"{name}.lowered_column")
        of_groups = graph.node("Add", [grouped, column], f"{name}.of_best_groups")
        joined = graph.constant(f"shape.of_{self._routed.n_experts}_experts", [0, 0, -1])
        return graph.node("Reshape", [of_groups, joined], f"{name}.selection")

    def _group_scores(self, grouped: str, members: int) -> str:
        """The scores of the groups: [batch, sequence, groups]."""
        graph, name = self._graph, self._name
        n_best = min(members, self._routing.group_score.n_best)
        best, number = f"{name}.best_of_groups", graph.constant(f"best_{n_best}", [n_best])
        graph.node("TopK", [grouped, number], [best, f"{best}.experts"], axis=-1)
        last = graph.constant("axis.last", [-1])
        return graph.node("ReduceSum", [best, last], f"{name}.group_scores", keepdims=0)

    def _chosen(self, scores: str, number: int, what: str) -> tuple[str, str]:
        """The largest scores and their indices; of equal ones the lower index comes first."""
        count = self._graph.constant(f"best_{number}", [number])
        outputs = [f"{self._name}.{what}.scores", f"{self._name}.{what}"]
        self._graph.node("TopK", [scores, count], outputs, axis=-1)
        return outputs[0], outputs[1]

    def _filled(self, like: str, value: float, output: str) -> str:
        """Fills the shape of another value with a number."""
        shape = self._graph.node("Shape", [like], f"{output}_shape")
        filler = onnx.numpy_helper.from_array(np.asarray([value], dtype=np.float32))
        return self._graph.node("ConstantOfShape", [shape], output, value=filler)

    def _factor(self, log_weights: str) -> str | None:
        """The sum of the weights: [batch, sequence, 1], or one number for all tokens."""
        routing, graph, name = self._routing, self._graph, self._name
        if _sums_to_one(routing) and not _has_a_sum_of_its_own(routing):
            return _constant_factor(graph, routing)
        weights = graph.node("Exp", [log_weights], f"{name}.weights")
        total = graph.node("ReduceSum", [weights, graph.constant("axis.last", [-1])], f"{name}.total", keepdims=1)
        factor = total
        if routing.normalizes:
            epsilon, least = (
                graph.constant(f"routing.{what}", value, np.float32)
                for what, value in (("epsilon", routing.epsilon), ("least_sum", routing.least_sum))
            )
            divisor = graph.node("Max", [graph.node("Add", [total, epsilon], f"{name}.sum"), least], f"{name}.divisor")
            factor = graph.node("Div", [total, divisor], f"{name}.share")
        scale = _constant_factor(graph, routing)
        return factor if scale is None else graph.node("Mul", [factor, scale], f"{name}.factor")
