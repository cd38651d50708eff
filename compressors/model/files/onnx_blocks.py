"""Integer codes as ONNX Runtime's operators store them, and ggml's blocks of 4 and 8 bits as such codes.

ONNX Runtime keeps codes and scales in tensors of their own and packs the codes of neighbours into a byte, the first in
the lowest bits; the zero point is 2^(bits - 1) (``docs/ContribOperators.md``: MatMulNBits, QMoE,
GatherBlockQuantized). ggml stores a row as blocks of 32 values, each a float16 scale followed by the codes
(``ggml-common.h``). Both compute (code - zero point) * scale, so the same numbers go from one to the other.

Letters: R rows, N values of a row, K blocks of a row, B values of a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compressors.model.files.integer_blocks import IntegerBlocks

__all__ = ["from_q4_0", "from_q8_0", "pack", "unpack"]

_GGML_BLOCK = 32
_SCALE_BYTES = 2
_BYTE_BITS = 8

_Bytes = npt.NDArray[np.uint8]


def pack(codes_RN: _Bytes, bits: int) -> _Bytes:
    """Packs codes of 2, 4 or 8 bits, one a byte, into uint8 [R, N * bits / 8]."""
    per_byte = _BYTE_BITS // bits
    packed = codes_RN[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes_RN[:, place::per_byte] << np.uint8(bits * place)
    return packed


def unpack(packed: _Bytes, bits: int) -> _Bytes:
    """The codes that :func:`pack` packed, one a byte: uint8 [R, N]."""
    per_byte = _BYTE_BITS // bits
    codes_RN = np.empty((len(packed), packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes_RN[:, place::per_byte] = (packed >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1)
    return codes_RN


def from_q4_0(rows: _Bytes) -> IntegerBlocks:
    """Converts ggml Q4_0 rows, uint8 [R, K * 18].

    ggml's byte j holds element j (low nibble) and element j + 16 (high). Codes are unsigned with zero point 8 in both
    formats, and scales may be negative in both.
    """
    scales_RK, bytes_RKB = _split(rows, _SCALE_BYTES + _GGML_BLOCK // 2)
    codes_RKB = np.concatenate([bytes_RKB & np.uint8(0x0F), bytes_RKB >> np.uint8(4)], axis=-1)
    return IntegerBlocks(codes_RKB.reshape(len(rows), -1), scales_RK, bits=4)


def from_q8_0(rows: _Bytes) -> IntegerBlocks:
    """Converts ggml Q8_0 rows, uint8 [R, K * 34]: signed codes become unsigned with zero point 128."""
    scales_RK, bytes_RKB = _split(rows, _SCALE_BYTES + _GGML_BLOCK)
    return IntegerBlocks((bytes_RKB ^ np.uint8(0x80)).reshape(len(rows), -1), scales_RK, bits=8)


def _split(rows: _Bytes, block_bytes: int) -> tuple[npt.NDArray[np.float32], _Bytes]:
    """Scales [R, K] and code bytes [R, K, block bytes - 2]."""
    blocks_RKB = rows.reshape(len(rows), -1, block_bytes)
    scales_RK = np.ascontiguousarray(blocks_RKB[..., :_SCALE_BYTES]).view(np.float16)[..., 0]
    return scales_RK.astype(np.float32), blocks_RKB[..., _SCALE_BYTES:]
