"""Matrices in float8 (e4m3) beside their scales, as weights: each value times the scale that it shares with others.

``NAME_scale_inv`` holds the scales in DeepSeek's and Qwen's FP8 repositories and in MiniMax-M2, one for each block of
128 x 128 values. ``NAME_scale`` holds those of compressed-tensors, ModelOpt and vLLM: one per block, row or matrix.
The last blocks of a row or column may be smaller. Fused experts have the scales of each expert, one after the other.

A weight is value times scale in float32, rounded to the dtype that ``config.json`` names: the numbers of transformers'
own ``dequantize=True`` (``transformers/integrations/finegrained_fp8.py``), where sizes are multiples of the block.
compressed-tensors multiplies in the dtype of the scales (``_dequantize`` in
``compressed_tensors/quantization/lifecycle/forward_helpers.py``), so the product is rounded to that dtype first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.safetensors_header import TensorHeader
from compressors.model.files.storage_type import StorageType
from compressors.model.files.weight_file import WeightFile
from compressors.model.names import shown

if TYPE_CHECKING:
    import torch

__all__ = ["FLOAT8", "GIVE_THE_ORIGINAL", "SCALE_SUFFIXES", "Float8", "Grain", "scales_of"]

FLOAT8 = "F8_E4M3"
"""safetensors' name for the format of the values."""

GIVE_THE_ORIGINAL = (
    "give the original in bfloat16 instead, usually the base_model of its model card or the repository of the same "
    "name without the suffix"
)

SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""The ends of the names of tensors with scales. Both hold factors, whatever the first one is called."""

_EXPONENTS = "U8"
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_ROWS_AT_ONCE = 128


def scales_of(name: str, names: Collection[str]) -> str | None:
    """Returns the name of the scales that belong to a tensor; None if there are none.

    Args:
        name: the tensor.
        names: the names of all tensors of the checkpoint.
    """
    for suffix in SCALE_SUFFIXES:  # a plan asks for 20,000 tensors
        if name + suffix in names:
            return name + suffix
    return None


@dataclass(frozen=True)
class Grain:
    """The rows and columns of a matrix that share a scale; None: all of them."""

    rows: int | None = None
    columns: int | None = None

    def __str__(self) -> str:
        if self.rows is None:
            return "a scale per matrix"
        return "a scale per row" if self.columns is None else f"block {self.rows}x{self.columns}"

    def n_blocks(self, rows: int, columns: int) -> tuple[int, int]:
        """The number of scales along the rows and the columns of a matrix."""
        return _n_parts(rows, self.rows), _n_parts(columns, self.columns)

    def fits(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
        """True if a tensor [..., rows, columns] has such scales. Their axes of size 1 at the end may be missing."""
        *matrices, rows, columns = shape
        return _without_ones(scales) == _without_ones((*matrices, *self.n_blocks(rows, columns)))


@dataclass(frozen=True)
class Float8:
    """The way in which float8 matrices of a checkpoint become weights.

    Attributes:
        grains: the ways in which values share scales; the shape of a tensor's scales says which one it is.
        storage_type: the type of the weights.
        rounds_to_scales: True if a product is rounded to the scales' dtype first.
        has_exponents: True if scales in U8 are exponents of 2, with a bias of 127.
    """

    grains: tuple[Grain, ...]
    storage_type: StorageType
    rounds_to_scales: bool = False
    has_exponents: bool = False

    def describe(self, headers: Mapping[str, TensorHeader]) -> str | None:
        """Says how the float8 tensors of a checkpoint share scales; None if there are none.

        Args:
            headers: all tensors of the checkpoint.
        """
        used = set()
        for name, header in headers.items():
            scales = scales_of(name, headers) if header.format == FLOAT8 else None
            if scales is not None:
                used.update(self._grains_of(header, headers[scales])[:1])
        return f"FP8, {' and '.join(str(grain) for grain in self.grains if grain in used)}" if used else None

    def check(self, header: TensorHeader, scales: TensorHeader | None) -> None:
        """Checks that a float8 tensor has scales that fit it.

        Raises:
            InputError: the scales are missing, or have another shape.
            UnsupportedError: they are stored in a format that is not read.
        """
        where = f"{header.file}: tensor {shown(header.name)}"
        if scales is None:
            names = " or ".join(shown(header.name + suffix) for suffix in SCALE_SUFFIXES)
            raise InputError(f"{where} is float8, but its scales, {names}, are in none of the weight files")
        if not self._grains_of(header, scales):
            raise InputError(
                f"{where} has shape {list(header.shape)}, and its scales {shown(scales.name)} have "
                f"{list(scales.shape)}: they do not belong together with {' or '.join(map(_in_words, self.grains))}"
            )
        if scales.format not in (*_SCALES, *([_EXPONENTS] if self.has_exponents else [])):
            raise UnsupportedError(
                f"{scales.file}: tensor {shown(scales.name)} holds {scales.format}; only scales in "
                f"{', '.join(_SCALES)} are read: {GIVE_THE_ORIGINAL}"
            )

    def fill(
        self, out: torch.Tensor, first: int, values: tuple[WeightFile, str], scales: tuple[WeightFile, str]
    ) -> None:
        """Fills ``out`` with weights of a tensor [..., rows, columns], some rows of a matrix at a time.

        Args:
            out: contiguous; it holds whole rows.
            first: flat index of the first weight in the tensor.
            values: file and name of the float8 tensor.
            scales: file and name of its scales.

        Raises:
            InputError: a file was changed or cut off since it was opened.
        """
        import torch

        header, of_scales = values[0].tensors[values[1]], scales[0].tensors[scales[1]]
        n_rows, n_columns = header.shape[-2:]
        grain = self._grains_of(header, of_scales)[0]
        rows = out.view(-1, n_columns)
        done = 0
        while done < len(rows):
            matrix, row = divmod(first // n_columns + done, n_rows)
            n_together = min(_rows_together(grain, row), n_rows - row, len(rows) - done)
            value = torch.empty(n_together, n_columns, dtype=torch.float8_e4m3fn)
            values[0].read_into(values[1], value, first + done * n_columns)
            codes = value.view(torch.uint8).view(-1).int()
            weights = _float8_values().index_select(0, codes).view_as(value)
            weights.mul_(self._factors(scales, grain, (n_rows, n_columns), matrix, range(row, row + n_together)))
            if self.rounds_to_scales and of_scales.format in ("BF16", "F16"):
                weights = weights.to(of_scales.storage_type.dtype)
            rows[done : done + n_together] = weights.to(self.storage_type.dtype)
            done += n_together

    def _factors(
        self, scales: tuple[WeightFile, str], grain: Grain, sizes: tuple[int, int], matrix: int, rows: range
    ) -> torch.Tensor:
        """The scales of some rows of a matrix of these sizes, float32; axes along which they are equal have size 1."""
        import torch

        file, name = scales
        n_row_blocks, n_column_blocks = grain.n_blocks(*sizes)
        height, width = grain.rows or sizes[0], grain.columns or sizes[1]
        first_block, last_block = rows[0] // height, rows[-1] // height
        factors = torch.empty(last_block - first_block + 1, n_column_blocks)
        file.read_into(name, factors, (matrix * n_row_blocks + first_block) * n_column_blocks)
        if file.tensors[name].format == _EXPONENTS:
            factors = (factors - 127).exp2()
        if n_column_blocks > 1:
            factors = factors.repeat_interleave(width, dim=1)[:, : sizes[1]]
        if len(factors) == 1:
            return factors
        return factors.index_select(0, torch.tensor(rows) // height - first_block)

    def _grains_of(self, header: TensorHeader, scales: TensorHeader) -> list[Grain]:
        """The grains that fit a tensor and its scales; if there are several, they are the same for this tensor."""
        if len(header.shape) < 2:
            return []
        return [grain for grain in self.grains if grain.fits(header.shape, scales.shape)]


@cache
def _float8_values() -> torch.Tensor:
    """The values by code: a look-up takes a seventh of the time of torch's conversion."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _rows_together(grain: Grain, row: int) -> int:
    """Rows from this one on that are read at once: few enough for a core's cache, and of one block if it is high."""
    if grain.rows is None or grain.rows < _ROWS_AT_ONCE:
        return _ROWS_AT_ONCE
    return min(_ROWS_AT_ONCE, grain.rows - row % grain.rows)


def _in_words(grain: Grain) -> str:
    return str(grain) if grain.columns is None else f"blocks of {grain.rows} x {grain.columns}"


def _n_parts(size: int, of_part: int | None) -> int:
    return 1 if of_part is None else -(-size // of_part)


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)
