"""Merges experts: every group of experts becomes one, so the checkpoint shrinks and nothing is aliased.

Each method is a :class:`~compressors.shrink.moe_block.Method`.
"""

from __future__ import annotations

from compressors.shrink.merge.average import merge_groups
from compressors.shrink.merge.hc_smoe import HCSMoE
from compressors.shrink.merge.m_smoe import MSMoE
from compressors.shrink.merge.ream import REAM
from compressors.shrink.merge.statistics import merged_statistics

__all__ = ["REAM", "HCSMoE", "MSMoE", "merge_groups", "merged_statistics"]
