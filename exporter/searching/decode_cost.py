"""The time that llama.cpp needs per weight of each type while it decodes, on one core of a CPU with AVX2.

The times were measured by ``python -m benchmarks.decode`` on the shape of OLMoE's layers, and include everything that a
token needs (``benchmarks/results/decode.md``). Other machines are faster or slower as a whole; the search needs only
the proportions.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["seconds_of"]

_NANOSECONDS: Mapping[str, float] = {
    "BF16": 0.212,
    "F16": 0.235,
    "Q8_0": 0.148,
    "Q6_K": 0.125,
    "Q5_K": 0.118,
    "Q5_1": 0.130,
    "Q5_0": 0.127,
    "Q4_K": 0.096,
    "Q4_1": 0.114,
    "Q4_0": 0.108,
    "IQ4_NL": 0.109,
    "MXFP4": 0.113,  # not measured in a model: its dot product takes 1.03 times as long as IQ4_NL's
    "IQ4_XS": 0.104,
    "Q3_K": 0.089,
    "IQ3_S": 0.165,
    "IQ3_XXS": 0.126,
    "Q2_K": 0.068,
    "IQ2_S": 0.102,
    "IQ2_XS": 0.108,
    "IQ2_XXS": 0.096,
    "Q2_0": 0.434,
    "IQ1_M": 0.096,
    "IQ1_S": 0.087,
}


def seconds_of(type_name: str, n_values: float) -> float:
    """Seconds that decoding a token spends on values of a type."""
    return 1e-9 * _NANOSECONDS.get(type_name, 0.2) * n_values
