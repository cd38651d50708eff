"""ggml's quantized blocks rewritten as ONNX Runtime's block-wise weights: the same numbers in another order.

ggml stores a row as blocks of 32 values, each a float16 scale followed by the codes (``ggml-common.h``). ONNX Runtime
keeps codes and scales in tensors of their own, wants unsigned codes with the zero point at 2^(bits-1), and packs
4-bit codes as neighbours (``docs/ContribOperators.md``: MatMulNBits, QMoE, GatherBlockQuantized).

Letters: R rows, N blocks in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK_SIZE", "Q4_0_BLOCK_BYTES", "Q8_0_BLOCK_BYTES", "BlockWeights", "from_q4_0", "from_q8_0"]

BLOCK_SIZE = 32
_SCALE_BYTES = 2
Q4_0_BLOCK_BYTES = _SCALE_BYTES + BLOCK_SIZE // 2
Q8_0_BLOCK_BYTES = _SCALE_BYTES + BLOCK_SIZE


@dataclass(frozen=True)
class BlockWeights:
    """A matrix in ONNX Runtime's block-wise layout; value = (code - zero point) * scale."""

    codes: npt.NDArray[np.uint8]  # [R, N * 16] for 4 bits, [R, N * 32] for 8
    scales_RN: npt.NDArray[np.float16]

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers, float32 [R, N * 32]: those of ggml's kernels, since a code times a scale is rounded once."""
        n_rows, n_blocks = self.scales_RN.shape
        if self.codes.shape[1] == n_blocks * BLOCK_SIZE:
            zero_point, codes = 128, self.codes
        else:
            zero_point, codes = 8, np.stack([self.codes & np.uint8(0x0F), self.codes >> np.uint8(4)], axis=-1)
        signed = codes.reshape(n_rows, n_blocks, BLOCK_SIZE).astype(np.float32) - np.float32(zero_point)
        values: npt.NDArray[np.float32] = signed * self.scales_RN.astype(np.float32)[..., None]
        return values.reshape(n_rows, -1)


def from_q4_0(rows: npt.NDArray[np.uint8]) -> BlockWeights:
    """Converts ggml Q4_0 rows, uint8 [R, N * 18].

    ggml's byte j holds element j (low nibble) and element j + 16 (high); ONNX Runtime's holds elements 2j and 2j + 1.
    Codes are unsigned with zero point 8 in both, and scales may be negative in both.
    """
    scales_RN, bytes_RNB = _split(rows, Q4_0_BLOCK_BYTES)
    codes_RNE = np.concatenate([bytes_RNB & np.uint8(0x0F), bytes_RNB >> np.uint8(4)], axis=-1)
    packed_RNB = codes_RNE[..., 0::2] | (codes_RNE[..., 1::2] << np.uint8(4))
    return BlockWeights(packed_RNB.reshape(len(rows), -1), scales_RN)


def from_q8_0(rows: npt.NDArray[np.uint8]) -> BlockWeights:
    """Converts ggml Q8_0 rows, uint8 [R, N * 34]: signed codes become unsigned with zero point 128."""
    scales_RN, bytes_RNB = _split(rows, Q8_0_BLOCK_BYTES)
    return BlockWeights((bytes_RNB ^ np.uint8(0x80)).reshape(len(rows), -1), scales_RN)


def _split(rows: npt.NDArray[np.uint8], block_bytes: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """Scales [R, N] and code bytes [R, N, block bytes - 2]."""
    blocks_RNB = rows.reshape(len(rows), -1, block_bytes)
    scales_RN = np.ascontiguousarray(blocks_RNB[..., :_SCALE_BYTES]).view(np.float16)[..., 0]
    return scales_RN, blocks_RNB[..., _SCALE_BYTES:]
