"""How far factors are from the experts that they stand for."""

from __future__ import annotations

from typing import NamedTuple

from compressors.shrink.decompose import Factors
from compressors.shrink.moe_block import MoeBlock


class MatrixErrors(NamedTuple):
    """|W - W'| / |W| of each kind of matrix over the layer, in Frobenius norms."""

    gate: float
    up: float
    down: float


def relative_errors(block: MoeBlock, factors: Factors) -> MatrixErrors:
    gate_up_EFD, down_EDF = factors.materialize()
    rebuilt = (*gate_up_EFD.chunk(2, dim=1), down_EDF)
    stored = (*block.gate_up_EFD.chunk(2, dim=1), block.down_EDF)
    pairs = [(new.double(), old.double()) for new, old in zip(rebuilt, stored, strict=True)]
    return MatrixErrors(*(float((new - old).norm() / old.norm()) for new, old in pairs))
