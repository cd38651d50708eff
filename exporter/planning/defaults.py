"""The defaults of flags, for the command line and for :class:`~exporter.planning.job.Flags`; imports nothing heavy."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BUDGET_KIND",
    "CONTEXT",
    "DEVICE",
    "FORMATS",
    "KV_TYPE",
    "METHOD",
    "PLAN_TIME",
    "PREFER",
    "QUANTIZER",
    "RECOVER",
    "RECOVER_TIME",
    "SEED",
    "STUDENT",
]

BUDGET_KIND: Final = "total"
CONTEXT: Final = 8192
DEVICE: Final = "auto"
FORMATS: Final = "gguf,onnx"
KV_TYPE: Final = "f16"
METHOD: Final = "auto"
PLAN_TIME: Final = "10m"
PREFER: Final = "quality"
QUANTIZER: Final = "feedback"
RECOVER: Final = "auto"
RECOVER_TIME: Final = "30m"
SEED: Final = 42
STUDENT: Final = "moe"
