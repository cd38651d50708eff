"""The number formats of stored weights, described without torch, which takes a second to import."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["StorageType"]


class StorageType(Enum):
    """A format that can be read. Members have safetensors' names."""

    F64 = ("float64", 8)
    F32 = ("float32", 4)
    F16 = ("float16", 2)
    BF16 = ("bfloat16", 2)
    F8_E4M3 = ("float8_e4m3fn", 1)
    F8_E8M0 = ("float8_e8m0fnu", 1)
    I64 = ("int64", 8)
    I32 = ("int32", 4)
    U8 = ("uint8", 1)

    @property
    def torch_name(self) -> str:
        """torch's name, which ``config.json`` uses too."""
        return self.value[0]

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.value[1]

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype, for those who compute with the values: torch is imported now."""
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype
