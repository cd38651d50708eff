"""MXFP4: blocks of 32 values of 4 bits with a power of two as scale, in two tensors of a checkpoint or ggml's form.

The format is that of the OCP Microscaling specification 1.0: a value is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 or its
negative (bit 3 is the sign) times 2^(scale - 127). In a checkpoint, ``NAME_blocks`` holds [..., blocks of a row, 16]
bytes and ``NAME_scales`` [..., blocks of a row]; byte j of a block has value 2j in its low half and 2j + 1 in its high
one. ggml puts the scale in front, and byte j has values j and j + 16 (``block_mxfp4`` in ``ggml/src/ggml-common.h``).
So either form can be made from the other without loss.

Letters: R rows, K blocks of a row.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK", "MXFP4_SUFFIXES", "blocks_name", "dequantize_mxfp4", "ggml_mxfp4_rows", "scales_name"]

BLOCK = 32
"""Values of a block."""

MXFP4_SUFFIXES = _BLOCKS, _SCALES = "_blocks", "_scales"
"""The ends of the names of the two tensors."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def blocks_name(name: str) -> str:
    """The name of the tensor with the codes of a matrix."""
    return name + _BLOCKS


def scales_name(name: str) -> str:
    """The name of the tensor with its scales."""
    return name + _SCALES


def dequantize_mxfp4(blocks_RK16: torch.Tensor, scales_RK: torch.Tensor, out: torch.Tensor) -> None:
    """Fills ``out`` [R, 32 K] with the values; they are exact in float32 and bfloat16 alike.

    Args:
        blocks_RK16: uint8.
        scales_RK: uint8.
        out: a tensor with any strides.
    """
    import torch

    pairs = _values_by_byte().index_select(0, blocks_RK16.flatten().int())
    values = pairs.view(torch.float32).view(*scales_RK.shape, BLOCK)
    factors_RK = _factors_by_scale().index_select(0, scales_RK.flatten().int()).view(scales_RK.shape)
    out.copy_(values.mul_(factors_RK[..., None]).flatten(-2))


def ggml_mxfp4_rows(blocks_RK16: torch.Tensor, scales_RK: torch.Tensor) -> torch.Tensor:
    """The same rows in ggml's type MXFP4: uint8 [R, 17 K]."""
    import torch

    codes_RK32 = torch.stack([blocks_RK16 & 15, blocks_RK16 >> 4], dim=-1).flatten(-2)
    first, second = codes_RK32.split(BLOCK // 2, dim=-1)
    return torch.cat([scales_RK[..., None], first | (second << 4)], dim=-1).flatten(-2)


@cache
def _factors_by_scale() -> torch.Tensor:
    import torch

    return torch.tensor([2.0 ** (scale - 127) for scale in range(256)])


@cache
def _values_by_byte() -> torch.Tensor:
    """The two values of each byte as one number, which takes half of the time to look up."""
    import torch

    by_code = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
    bytes_ = torch.arange(256)
    return torch.stack([by_code[bytes_ & 15], by_code[bytes_ >> 4]], dim=1).view(torch.int64).flatten()
