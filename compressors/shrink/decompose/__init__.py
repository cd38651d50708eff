"""Editing by decomposition: experts rewritten as low-rank or shared factors, and what each container gains from it."""

from __future__ import annotations

from compressors.shrink.decompose.accounting import (
    Container,
    ExpertShape,
    FactorSize,
    d2_moe_size,
    mobe_size,
    rank_for_share,
    rank_that_saves,
    saved_bytes,
    svd_size,
)
from compressors.shrink.decompose.d2_moe import D2Moe, D2MoeFactors
from compressors.shrink.decompose.factors import Decomposition, Factors, LowRank, MatrixErrors, relative_errors
from compressors.shrink.decompose.mobe import Mobe, MobeFactors, SharedBases
from compressors.shrink.decompose.svd import ActivationSvd, SvdFactors

__all__ = [
    "ActivationSvd",
    "Container",
    "D2Moe",
    "D2MoeFactors",
    "Decomposition",
    "ExpertShape",
    "FactorSize",
    "Factors",
    "LowRank",
    "MatrixErrors",
    "Mobe",
    "MobeFactors",
    "SharedBases",
    "SvdFactors",
    "d2_moe_size",
    "mobe_size",
    "rank_for_share",
    "rank_that_saves",
    "relative_errors",
    "saved_bytes",
    "svd_size",
]
