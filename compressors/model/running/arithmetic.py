"""The arithmetic of a pass: float32, the reference, or bfloat16 where the processor multiplies it faster.

Measured with oneDNN on Intel's Sapphire Rapids, products of 512 rows with a 2048 x 2048 matrix: with matrix units (AMX)
bfloat16 is 3 to 4 times as fast as float32; with AVX-512 bfloat16 instructions alone it is slower, with AVX2 8 times
slower. On AMD's Zen 4, which has those instructions and halves AVX-512 in float32, it is 2.5 times as fast, with 64
rows and with 4,096.
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

_CPU_DESCRIPTION = Path("/proc/cpuinfo")
_WORTHWHILE_HIDDEN_SIZE = 1024  # smaller products gain nothing
_WITH_PRODUCTS = ("BF16", "FP16", "AMX")  # of oneDNN's levels, those that have AVX-512's bfloat16 products


def fastest_arithmetic(spec: ModelSpec, stored: StorageType, device: str) -> Arithmetic:
    """Returns the arithmetic of calibration and recovery on this machine's ``device``, for weights of this type."""
    worthwhile = stored is StorageType.BF16 and spec.hidden_size >= _WORTHWHILE_HIDDEN_SIZE
    return "bfloat16" if worthwhile and (device == "cuda" or _multiplies_bfloat16_faster()) else "float32"


def value_bytes(arithmetic: Arithmetic) -> int:
    """Returns the bytes of a value in it."""
    return {"float32": 4, "bfloat16": 2}[arithmetic]


def dtype_of(arithmetic: Arithmetic) -> torch.dtype:
    """Returns torch's dtype for it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[arithmetic]


def _multiplies_bfloat16_faster() -> bool:
    flags, is_amd = _processor()
    # oneDNN's own switch: setting it to less than the processor has shows how another one would do
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper().replace("DEFAULT", "ALL")
    if "amx_bf16" in flags and ("AMX" in allowed or allowed == "ALL"):
        return True
    return is_amd and "avx512_bf16" in flags and (allowed == "ALL" or any(name in allowed for name in _WITH_PRODUCTS))


def _processor() -> tuple[set[str], bool]:
    """The names of its instruction sets, and whether AMD made it."""
    if _CPU_DESCRIPTION.is_file():  # Linux: torch, which finds out the same, takes a second to import
        words = set(_CPU_DESCRIPTION.read_text(encoding="utf-8").split())
        return words, "AuthenticAMD" in words
    import torch

    found = torch.cpu.get_capabilities()
    return {name for name, has_it in found.items() if has_it is True}, str(found.get("cpu_name", "")).startswith("AMD")
