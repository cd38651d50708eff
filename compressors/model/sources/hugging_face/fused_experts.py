"""Reads matrices of experts from tensors that hold those of a whole layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressors.model.description.tensors import Fused
from compressors.model.files.gguf.mxfp4 import BLOCK, blocks_name, dequantize_mxfp4, ggml_mxfp4_rows, scales_name

if TYPE_CHECKING:
    import torch

__all__ = ["FusedExperts", "Mxfp4Experts"]

ReadInto = Callable[[str, "torch.Tensor", int], None]
"""``read(name, out, first)`` fills ``out`` with a tensor's values from the one with flat index ``first`` on."""


@dataclass(frozen=True)
class FusedExperts:
    """A tensor with the matrices of one role, or two, of all experts of a layer.

    Attributes:
        name: the tensor.
        fused: the layout of the tensor.
        rows: the rows of one expert's matrix of this role.
        columns: its columns.
    """

    name: str
    fused: Fused
    rows: int
    columns: int

    def tensors(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors, by name."""
        return {self.name: (n_experts, *self.fused.of_expert(self.rows, self.columns))}

    @property
    def main(self) -> str:
        """The name of the tensor whose format is that of the matrices."""
        return self.name

    def read(self, expert: int, out: torch.Tensor, read: ReadInto) -> None:
        """Fills ``out``, contiguous, with an expert's matrix."""
        n_values = self.rows * self.columns
        if not self.fused.is_interleaved and not self.fused.is_transposed:
            read(self.name, out, (self.fused.n_parts * expert + self.fused.part) * n_values)
            return
        import torch

        of_expert = torch.empty(self.fused.of_expert(self.rows, self.columns), dtype=out.dtype)
        read(self.name, of_expert, expert * of_expert.numel())
        out.copy_(self.fused.matrix(of_expert))


@dataclass(frozen=True)
class Mxfp4Experts:
    """The same in MXFP4: a tensor of codes and one of scales, whose rows are those of the matrices.

    Attributes:
        name: the beginning of the two tensors' names.
        fused: the layout of the tensors; they are never transposed.
        rows: the rows of one expert's matrix of this role.
        columns: its columns.
    """

    name: str
    fused: Fused
    rows: int
    columns: int

    def tensors(self, n_experts: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the file's tensors, by name."""
        scales = (n_experts, self.fused.n_parts * self.rows, self.columns // BLOCK)
        return {blocks_name(self.name): (*scales, BLOCK // 2), scales_name(self.name): scales}

    @property
    def main(self) -> str:
        """The name of the tensor whose format is that of the matrices."""
        return blocks_name(self.name)

    def read(self, expert: int, out: torch.Tensor, read: ReadInto) -> None:
        """Fills ``out`` with an expert's matrix, a few rows at a time."""
        blocks, scales = self._codes(expert, read)
        for first in range(0, self.rows, _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            dequantize_mxfp4(blocks[rows], scales[rows], out[rows])

    def ggml_rows(self, expert: int, read: ReadInto) -> torch.Tensor:
        """An expert's matrix in ggml's type MXFP4: uint8 [rows, bytes of a row]."""
        return ggml_mxfp4_rows(*self._codes(expert, read))

    def _codes(self, expert: int, read: ReadInto) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        found = []
        for name, (_, *shape) in self.tensors(1).items():
            of_expert = torch.empty(shape, dtype=torch.uint8)
            read(name, of_expert, expert * math.prod(shape))
            found.append(self.fused.rows(of_expert))
        return found[0], found[1]


_ROWS_AT_ONCE = 64  # their values stay in a core's cache
