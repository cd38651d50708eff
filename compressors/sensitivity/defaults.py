"""Predicts the damage of types before a weight is read, from the sensitivities of a usual model.

The figures are means over the two trained models (6 layers of 32 and of 8 experts). For all of their matrices, the
error of a type is the same multiple of Q8_0's within 7 %. Each kind of matrix has much the same part in a layer's
damage, except that the first layer's experts have more. A deeper model's layers share the same total. A matrix of
another kind counts as the kind that it is most like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.sensitivity.divergence import SecondOrder
from compressors.sensitivity.table import Candidate, Option, TypeTable, Unit, UnitPlan

__all__ = ["default_table"]

_LAYERS_AT_Q8_0 = 8.4e-6
"""The second-order divergence, in nats, of all layers in Q8_0."""

_EMBEDDING = 2.1
"""The divergence of a tied embedding in Q8_0, relative to that of all layers."""

_LOOKUP = 0.17
"""The part of this that an untied embedding causes."""

_PARTS: Mapping[Role, tuple[float, float, float]] = {
    Role.QUERY: (0.013, 0.065, 0.069),
    Role.KEY: (0.008, 0.106, 0.086),
    Role.VALUE: (0.098, 0.138, 0.080),
    Role.ATTENTION_OUTPUT: (0.136, 0.114, 0.085),
    Role.EXPERT_GATE: (0.438, 0.102, 0.178),
    Role.EXPERT_UP: (0.382, 0.073, 0.122),
    Role.EXPERT_DOWN: (1.172, 0.136, 0.190),
}
"""Relative damage of each kind of matrix in the first layer, in one between, and in the last."""

_ERRORS: Mapping[str, float] = {
    "F32": 0.0,
    "F16": 0.0,
    "BF16": 0.0,
    "Q8_0": 1.0,
    "Q6_K": 10.3,
    "Q5_K": 43.1,
    "Q5_1": 38.9,
    "Q5_0": 56.1,
    "Q4_K": 172.0,
    "Q4_1": 166.0,
    "IQ4_NL": 194.0,
    "Q4_0": 228.0,
    "MXFP4": 477.0,
    "IQ4_XS": 198.0,
    "Q3_K": 720.0,
    "IQ3_S": 641.0,
    "IQ3_XXS": 1120.0,
    "Q2_K": 2450.0,
    "IQ2_S": 2130.0,
    "IQ2_XS": 3070.0,
    "IQ2_XXS": 4050.0,
    "Q2_0": 5000.0,  # with searched scales; ggml's own kernel: 18,000
    "TQ2_0": 23000.0,
    "TQ1_0": 23000.0,
    "IQ1_M": 6930.0,
    "IQ1_S": 8160.0,
    "8@16": 0.8,
    "8@32": 1.0,
    "8@64": 1.15,
    "8@128": 1.3,
    "4@16": 165.0,
    "4@32": 205.0,
    "4@64": 260.0,
    "4@128": 300.0,
    "2@32": 4300.0,
    "2@64": 4900.0,
    "2@128": 5500.0,
}
"""Squared output error of a type, relative to Q8_0's."""


def default_table(spec: ModelSpec, plans: Sequence[UnitPlan]) -> TypeTable:
    """Makes the table of a model from its description alone; no weight is read.

    Args:
        spec: the model in the file.
        plans: units with their types; one that is neither exact nor in the table of defaults is left out.
    """
    units = []
    for plan in plans:
        at_q8_0 = [(role, _at_q8_0(spec, role, layer)) for role, layer in plan.matrices]
        options = [
            Option(
                candidate.choice,
                candidate.n_bytes,
                sum((order * _error(candidate, role) for role, order in at_q8_0), SecondOrder(0.0, 0.0)),
                candidate.seconds,
            )
            for candidate in plan.candidates
            if candidate.quantize is None or candidate.choice in _ERRORS
        ]
        units.append(Unit(plan.name, plan.tensors, tuple(options)))
    return TypeTable(tuple(units))


def _error(candidate: Candidate, role: Role) -> float:
    """The squared output error of a type, relative to Q8_0's."""
    return 0.0 if candidate.quantize is None else _ERRORS[candidate.choice] * candidate.factor(role)


def _at_q8_0(spec: ModelSpec, role: Role, layer: int | None) -> SecondOrder:
    """The second-order divergence of a tensor in Q8_0."""
    if layer is None:
        vocabulary = _LAYERS_AT_Q8_0 * _EMBEDDING
        lookup, head = vocabulary * _LOOKUP, vocabulary * (1 - _LOOKUP)
        if spec.tied_embeddings:
            return SecondOrder(lookup + head, lookup)
        return SecondOrder(lookup, lookup) if role is Role.TOKEN_EMBEDDING else SecondOrder(head, 0.0)
    order = _LAYERS_AT_Q8_0 * _part(_measured(spec, role, layer), layer, spec.n_layers) / _all_parts(spec.n_layers)
    return SecondOrder(order, order)


def _measured(spec: ModelSpec, role: Role, layer: int) -> Role:
    """The measured role that a matrix is most like, judging by its place."""
    if role in _PARTS:
        return role
    tensor = spec.tensor(role, layer)
    writes_states = tensor.shape[0] == "D"
    if role.is_feed_forward:
        return Role.EXPERT_DOWN if writes_states else Role.EXPERT_UP
    return Role.ATTENTION_OUTPUT if writes_states else Role.VALUE


@cache
def _all_parts(n_layers: int) -> float:
    return sum(_part(role, layer, n_layers) for role in _PARTS for layer in range(n_layers))


def _part(role: Role, layer: int, n_layers: int) -> float:
    first, between, last = _PARTS[role]
    return first if layer == 0 else last if layer == n_layers - 1 else between
