"""Expert replacing: rarely needed experts become a base that they share and a small low-rank part of their own.

What plans ask needs no torch; the method is in ``light_moe``, and the choice of layers in ``selection``.
"""

from __future__ import annotations

from compressors.shrink.replace.counts import (
    FEWEST_ON_A_BASE,
    Replacement,
    adapter_values,
    bases_by_layer,
    default_rank,
    placed,
    replacement_for,
    spread,
)

__all__ = [
    "FEWEST_ON_A_BASE",
    "Replacement",
    "adapter_values",
    "bases_by_layer",
    "default_rank",
    "placed",
    "replacement_for",
    "spread",
]
