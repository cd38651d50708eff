"""The places of the bits of codes in the blocks of a format.

Letters: R rows, K blocks of a row, Y bytes of a block, E codes of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType

__all__ = ["Fields", "bit_planes", "copied_blocks", "write_codes"]


@dataclass(frozen=True)
class Fields:
    """A run of ``width`` bits of every code, the lowest of which is the code's bit ``low``."""

    low: int
    width: int
    byte_E: npt.NDArray[np.intp]
    shift_E: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, low: int, width: int, places: Iterable[tuple[int, int]]) -> Fields:
        """Makes the fields from ``places``, the byte and shift of each code in turn."""
        byte_E, shift_E = np.array(list(places)).T
        return cls(low, width, byte_E.astype(np.intp), shift_E.astype(np.uint8))


def bit_planes(low: int, width: int, first_bit_E: Sequence[int]) -> tuple[Fields, ...]:
    """Codes of ``width`` bits at any bit of the block, across bytes: one run for each bit."""
    return tuple(Fields.of(low + bit, 1, [divmod(first + bit, 8) for first in first_bit_E]) for bit in range(width))


def copied_blocks(quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Returns a copy of quantized rows: [R, K, Y]."""
    return quantized_RY.reshape(len(quantized_RY), -1, BLOCK_SIZES[ggml_type][1]).copy()


def write_codes(
    blocks_RKY: npt.NDArray[np.uint8], fields: Sequence[Fields], codes_RKE: npt.NDArray[np.unsignedinteger]
) -> None:
    """Puts codes, [R, K, E] or broadcast to it, into the blocks; no other bit changes."""
    for run in fields:
        mask = np.uint8((1 << run.width) - 1)
        for shift in np.unique(run.shift_E):  # codes with the same shift lie in different bytes
            chosen_E = run.shift_E == shift
            at_E = run.byte_E[chosen_E]
            codes = codes_RKE[..., chosen_E] if codes_RKE.shape[-1] > 1 else codes_RKE
            bits = (codes >> np.uint16(run.low)).astype(np.uint8) & mask
            blocks_RKY[..., at_E] = blocks_RKY[..., at_E] & ~(mask << shift) | bits << shift
