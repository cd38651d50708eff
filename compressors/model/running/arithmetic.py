"""The arithmetic of a pass: float32, the reference, or bfloat16 where the processor multiplies it faster.

Measured with oneDNN on 2 cores, products of 512 rows with a 2048 x 2048 matrix: with matrix units (AMX) bfloat16 is
3 to 4 times as fast as float32; with AVX-512 bfloat16 instructions it is slower, with AVX2 8 times slower.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressors.model.description.spec import ModelSpec
from compressors.model.files.storage_type import StorageType

if TYPE_CHECKING:
    import torch

__all__ = ["Arithmetic", "dtype_of", "fastest_arithmetic", "value_bytes"]

Arithmetic = Literal["float32", "bfloat16"]

_CPU_FLAGS = Path("/proc/cpuinfo")
_WORTHWHILE_HIDDEN_SIZE = 1024  # smaller products gain nothing


def fastest_arithmetic(spec: ModelSpec, stored: StorageType, device: str) -> Arithmetic:
    """Returns the arithmetic of calibration and recovery on this machine's ``device``, for weights of this type."""
    worthwhile = stored is StorageType.BF16 and spec.hidden_size >= _WORTHWHILE_HIDDEN_SIZE
    return "bfloat16" if worthwhile and (device == "cuda" or _has_matrix_units()) else "float32"


def value_bytes(arithmetic: Arithmetic) -> int:
    """Returns the bytes of a value in it."""
    return {"float32": 4, "bfloat16": 2}[arithmetic]


def dtype_of(arithmetic: Arithmetic) -> torch.dtype:
    """Returns torch's dtype for it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[arithmetic]


def _has_matrix_units() -> bool:
    # oneDNN's own switch: setting it to less than AMX shows how another processor would do
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if "AMX" not in allowed and allowed not in ("DEFAULT", "ALL"):
        return False
    if _CPU_FLAGS.is_file():  # Linux: torch, which finds out the same, takes a second to import
        return "amx_bf16" in _CPU_FLAGS.read_text(encoding="utf-8").split()
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
