"""Editing by decomposition: experts rewritten as low-rank or shared factors, and multiplied out again."""

from __future__ import annotations

from compressors.shrink.decompose.d2_moe import D2Moe, D2MoeFactors
from compressors.shrink.decompose.factors import Factors, LowRank
from compressors.shrink.decompose.mobe import Mobe, MobeFactors, SharedBases
from compressors.shrink.decompose.svd import ActivationSvd, SvdFactors

__all__ = [
    "ActivationSvd",
    "D2Moe",
    "D2MoeFactors",
    "Factors",
    "LowRank",
    "Mobe",
    "MobeFactors",
    "SharedBases",
    "SvdFactors",
]
