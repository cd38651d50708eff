"""The part of a kernel's output error that error feedback leaves, by kind of matrix and type.

Measured on layer 2 of the two trained models with second moments of their calibration text: codes chosen again column
by column in the order of falling second moments, then three sweeps (:mod:`compressors.quantize`). Means of both models.
"""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.description.roles import Role

__all__ = ["feedback_factor"]

_DOWN, _WIDE, _ATTENTION, _OUTPUT, _VOCABULARY = "down", "gate and up", "query, key and value", "output", "vocabulary"

_KINDS: Mapping[Role, str] = {
    Role.EXPERT_DOWN: _DOWN,
    Role.EXPERT_GATE: _WIDE,
    Role.EXPERT_UP: _WIDE,
    Role.SHARED_DOWN: _DOWN,
    Role.SHARED_GATE: _WIDE,
    Role.SHARED_GATE_UP: _WIDE,
    Role.SHARED_UP: _WIDE,
    Role.QUERY: _ATTENTION,
    Role.KEY: _ATTENTION,
    Role.VALUE: _ATTENTION,
    Role.ATTENTION_GATE: _ATTENTION,
    Role.ATTENTION_OUTPUT: _OUTPUT,
    Role.TOKEN_EMBEDDING: _VOCABULARY,
    Role.HEAD: _VOCABULARY,
}

_USUAL = {_DOWN: 0.52, _WIDE: 0.32, _ATTENTION: 0.45, _OUTPUT: 0.35, _VOCABULARY: 0.75}

_MEASURED: Mapping[str, tuple[float, float, float, float]] = {  # down, gate and up, query, output
    "Q8_0": (0.41, 0.24, 0.40, 0.24),
    "Q6_K": (0.43, 0.31, 0.45, 0.30),
    "Q5_K": (0.43, 0.31, 0.46, 0.30),
    "Q4_K": (0.45, 0.32, 0.49, 0.31),
    "Q4_0": (0.46, 0.28, 0.43, 0.28),
    "IQ4_NL": (0.46, 0.29, 0.43, 0.28),
    "IQ4_XS": (0.40, 0.28, 0.42, 0.28),
    "Q3_K": (0.43, 0.29, 0.45, 0.30),
    "Q2_K": (0.48, 0.34, 0.49, 0.35),
    "Q2_0": (0.46, 0.25, 0.35, 0.28),
    "IQ3_S": (0.42, 0.27, 0.37, 0.30),
    "IQ3_XXS": (0.47, 0.31, 0.45, 0.34),
    "IQ2_S": (0.48, 0.33, 0.46, 0.35),
    "IQ2_XS": (0.49, 0.33, 0.48, 0.35),
    "IQ2_XXS": (0.47, 0.34, 0.46, 0.35),
}
_COLUMNS = (_DOWN, _WIDE, _ATTENTION, _OUTPUT)

_LEFT_ALONE = frozenset({"F32", "F16", "BF16", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"})
_FINE = frozenset({"Q8_0", "Q6_K", "Q5_K"})  # with these, an embedding gains nothing


def feedback_factor(role: Role, type_name: str) -> float:
    """The error with feedback, relative to the kernel's with the same importance matrix: 1 where there is no feedback.

    A type that was not measured has its kind's usual factor.
    """
    kind = _KINDS.get(role)
    if kind is None or type_name in _LEFT_ALONE:
        return 1.0
    if kind is _VOCABULARY:
        return 1.0 if type_name in _FINE else _USUAL[kind]
    if type_name in _MEASURED:
        return _MEASURED[type_name][_COLUMNS.index(kind)]
    return _USUAL[kind]
