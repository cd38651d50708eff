"""Tests whether the rows of a file are as near to the original's as their type allows.

Values stored in float must be the original, or its rounding to 16 bits, to the last bit. Quantized values are compared
with the error of the same type on the same rows: ggml's kernel, or the search for ONNX Runtime's blocks, quantizes a
sample of them, and every row that is further off than usual, without an importance matrix. Margins were
measured on both trained models over all types of ggml, for its kernels with importance matrices and for codes that
error feedback (GPTQ) chose, which raises a matrix's own error by up to 1.5 and a single row's by up to 2.1 times
(``benchmarks/results/damage.md``).

A row that is scaled as a whole has a small error; its coefficient <found, original> / <original, original> shows it.
Quantizers that minimise the error leave coefficients between the kernel's and 1.

Letters: R rows, N values of a row.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

from compressors.model.files.gguf.ggml import dequantize_rows, ggml_library_for, row_bytes
from compressors.model.files.gguf.ggml_types import GGMLQuantizationType
from compressors.model.files.integer_blocks import BlockType, search_blocks
from compressors.model.sources.weights import StoredType

__all__ = ["MatrixError", "quantized"]

_FLOAT_TYPES = frozenset(
    {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64}
)
_MATRIX, _ROW = 1.8, 3.0  # times the kernel's error; measured: up to 1.49 and 2.1
_SCREEN = 1.6  # times the type's usual error: rows above are quantized again
_COEFFICIENT = 0.01  # allowed deviation, beyond the type's own:
_MATRIX_COEFFICIENT = 0.1  # for each unit of relative error of a matrix,
_ROW_COEFFICIENT = 3.0  # of a row, times the root of its values' fourth powers over their squares (1.7 / root of N)
_SHRINKING = 3.5  # times as much downwards: weighing quantizers make values of little weight too small
_SAMPLE, _SUSPECTS = 32, 256  # rows of a matrix (of a piece of one) that are quantized again
_FEWEST_ROWS = 8  # the fewest rows of a matrix that is judged as a whole
_USUAL_ROWS = 64  # rows of random values that give a type's usual error

_Sums = npt.NDArray[np.float64]


def quantized(
    values_RN: torch.Tensor, ggml_type: GGMLQuantizationType, importance_N: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.uint8]:
    """Quantizes float32 rows with ggml's kernel: uint8 [R, Y]; with None all input features weigh the same."""
    n_rows, length = values_RN.shape
    source = values_RN.float().contiguous()
    stored_RY = np.empty((n_rows, row_bytes(ggml_type, length)), np.uint8)
    library = ggml_library_for(ggml_type)
    if importance_N is None and library.ggml_quantize_requires_imatrix(int(ggml_type)):
        importance_N = np.ones(length, np.float32)  # types of about 2 bits refuse to work without
    importance = None if importance_N is None else importance_N.ctypes.data
    library.ggml_quantize_chunk(int(ggml_type), source.data_ptr(), stored_RY.ctypes.data, 0, n_rows, length, importance)
    return stored_RY


def requantized(values_RN: torch.Tensor, stored_type: StoredType) -> torch.Tensor:
    """Quantizes rows without an importance matrix, and returns them as a runtime sees them: float32 [R, N]."""
    if isinstance(stored_type, BlockType):
        blocks = search_blocks(values_RN.float().numpy(), stored_type.bits, stored_type.block_size)
        return torch.from_numpy(blocks.values())
    return torch.from_numpy(dequantize_rows(quantized(values_RN, stored_type), stored_type, values_RN.shape[1]))


class MatrixError:
    """Compares rows of one matrix with the original's, given a piece at a time.

    Attributes:
        damaged: indices of rows that differ more from the original's than their type explains.

    Args:
        stored_type: the type in which the file stores them.
    """

    def __init__(self, stored_type: StoredType) -> None:
        self._type = stored_type
        self._n_rows = 0
        self._squares = self._found_squares = self._error_squares = self._products = 0.0
        self._sampled_error = self._usual_error = self._sampled_squares = self._excess = 0.0
        self.damaged: list[int] = []

    @property
    def is_float(self) -> bool:
        """True if the type is float: the values must be the original's, or rounded to 16 bits, to the last bit."""
        return self._type in _FLOAT_TYPES

    @property
    def type_name(self) -> str:
        """The name of the type, such as ``Q4_K`` or ``4@128``."""
        return self._type.name

    @property
    def relative_error(self) -> float:
        """|found - original| / |original|."""
        if not self._squares:
            return float(self._found_squares > 0)
        return float((self._error_squares / self._squares) ** 0.5)

    @property
    def usual_error(self) -> float:
        """The relative error of the type."""
        return float((self._usual_error / self._sampled_squares) ** 0.5) if self._sampled_squares else 0.0

    @property
    def is_zero(self) -> bool:
        """True if the values are all zero and the original's are not."""
        return self._squares > 0 and self._found_squares == 0

    @property
    def scale(self) -> float:
        """The coefficient of the whole; 1 if it has the original's size."""
        return self._products / self._squares if self._squares else 1.0

    @property
    def is_mostly_damaged(self) -> bool:
        """True if more than half of the rows are damaged."""
        return 2 * len(self.damaged) > self._n_rows

    @property
    def is_too_far(self) -> bool:
        """True if the matrix as a whole is further off than its type explains."""
        return self._is_judged_as_whole and not self._sampled_error <= _MATRIX**2 * self._usual_error

    @property
    def _is_judged_as_whole(self) -> bool:
        return not self.is_float and self._n_rows >= _FEWEST_ROWS

    @property
    def is_scaled(self) -> bool:
        """True if the matrix as a whole is larger or smaller than its type explains."""
        if not self._is_judged_as_whole or not self._sampled_squares:
            return False
        excess = _upwards(self._excess / self._sampled_squares)
        return not excess <= _COEFFICIENT + _MATRIX_COEFFICIENT * self.usual_error

    def add(self, original_RN: torch.Tensor, found_RN: torch.Tensor) -> list[int]:
        """Takes the next rows, float32; returns the indices of damaged ones within the piece."""
        sums = _RowSums(original_RN, found_RN)
        self._squares += float(sums.squares_R.sum())
        self._found_squares += float(sums.found_R.sum())
        self._error_squares += float(sums.error_R.sum())
        self._products += float(sums.product_R.sum())
        bad_R = _unequal(original_RN, found_RN) if self.is_float else self._unusual(original_RN, sums)
        rows: list[int] = np.flatnonzero(bad_R).tolist()
        self.damaged += [self._n_rows + row for row in rows]
        self._n_rows += len(original_RN)
        return rows

    def _unusual(self, original_RN: torch.Tensor, sums: _RowSums) -> npt.NDArray[np.bool_]:
        """Rows that are further off, or of another size, than the type explains."""
        n_rows, length = original_RN.shape
        usual, usual_coefficient = _usual(self._type, length)
        yard_R = usual**2 * sums.squares_R
        own_R = np.full(n_rows, usual_coefficient)
        off_R = _outside(sums.coefficient_R, own_R)
        suspect_R = ~(sums.error_R <= _SCREEN**2 * yard_R) | ~(off_R <= _COEFFICIENT)
        spread_R = np.full(n_rows, 3**0.5 / length**0.5)
        sample = np.unique(np.linspace(0, n_rows - 1, min(n_rows, _SAMPLE)).astype(int))
        again = np.union1d(sample, _spread(np.flatnonzero(suspect_R), _SUSPECTS))
        rows_RN = original_RN[torch.from_numpy(again)]
        known = _RowSums(rows_RN, requantized(rows_RN, self._type))
        yard_R[again] = np.maximum(yard_R[again], known.error_R)
        own_R[again] = known.coefficient_R
        spread_R[again] = _spread_of_values(rows_RN)
        self._take_sample(sample, sums, yard_R, own_R)
        relative_R = np.sqrt(yard_R / np.maximum(sums.squares_R, np.finfo(np.float64).tiny))
        allowed_R = _COEFFICIENT + _ROW_COEFFICIENT * relative_R * spread_R
        off_R = _outside(sums.coefficient_R, own_R)
        is_lost_R = (sums.found_R == 0) & (sums.squares_R > 0) & (own_R > 0)
        bad_R: npt.NDArray[np.bool_] = ~(sums.error_R <= _ROW**2 * yard_R) | ~(off_R <= allowed_R) | is_lost_R
        return bad_R

    def _take_sample(self, sample: npt.NDArray[np.int64], sums: _RowSums, yard_R: _Sums, own_R: _Sums) -> None:
        self._sampled_error += float(sums.error_R[sample].sum())
        self._usual_error += float(yard_R[sample].sum())
        squares = float(sums.squares_R[sample].sum())
        self._sampled_squares += squares
        if squares:
            found = float(sums.product_R[sample].sum()) / squares
            kernel = float((own_R[sample] * sums.squares_R[sample]).sum()) / squares
            low, high = min(kernel, 1.0), max(kernel, 1.0)
            self._excess += squares * (found - min(max(found, low), high))


class _RowSums:
    """Sums over the values of each row, float64 [R]."""

    def __init__(self, original_RN: torch.Tensor, found_RN: torch.Tensor) -> None:
        original, found = original_RN.numpy(), found_RN.numpy()
        error = found - original
        self.squares_R = _products(original, original)
        self.found_R = _products(found, found)
        self.error_R = _products(error, error)
        self.product_R = _products(found, original)

    @property
    def coefficient_R(self) -> _Sums:
        """The coefficient of each row; 1 for rows of zeros."""
        is_zero_R = self.squares_R == 0
        return np.where(is_zero_R, 1.0, self.product_R / np.where(is_zero_R, 1.0, self.squares_R))


def _products(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> _Sums:
    sums: npt.NDArray[np.float32] = np.einsum("rn,rn->r", one, other)  # ten times as fast as products that are stored
    return sums.astype(np.float64)


def _outside(coefficient_R: _Sums, kernel_R: _Sums) -> _Sums:
    """The distance of coefficients from the range between the kernel's and 1; see :func:`_upwards`."""
    low_R, high_R = np.minimum(kernel_R, 1.0), np.maximum(kernel_R, 1.0)
    return np.maximum((low_R - coefficient_R) / _SHRINKING, np.maximum(coefficient_R - high_R, 0.0))


def _upwards(excess: float) -> float:
    """A coefficient's distance from the usual one, turned into one upwards."""
    return max(-excess / _SHRINKING, excess) if excess == excess else excess


def _spread_of_values(rows_RN: torch.Tensor) -> _Sums:
    """The root of the sum of fourth powers over the sum of squares: the weight of a few large values in a row."""
    squares = np.square(rows_RN.numpy())
    sums = squares.sum(1, dtype=np.float64)
    roots: _Sums = np.sqrt(_products(squares, squares)) / np.maximum(sums, np.finfo(np.float64).tiny)
    return roots


def _spread(places: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Chooses at most ``most`` of the places, evenly spaced."""
    return places if len(places) <= most else places[np.linspace(0, len(places) - 1, most).astype(int)]


def _unequal(original_RN: torch.Tensor, found_RN: torch.Tensor) -> npt.NDArray[np.bool_]:
    """Rows that are neither the original's nor, all alike, their rounding to 16 bits."""
    if torch.equal(found_RN, original_RN):
        return np.zeros(len(found_RN), np.bool_)
    candidates = (original_RN, original_RN.bfloat16().float(), original_RN.half().float())
    unequal = [(found_RN != candidate).any(1).numpy() for candidate in candidates]
    fewest: npt.NDArray[np.bool_] = min(unequal, key=lambda rows_R: int(rows_R.sum()))
    return fewest


@functools.cache
def _usual(stored_type: StoredType, length: int) -> tuple[float, float]:
    """Relative error and coefficient of a type on normal values, the kindest that weights have."""
    generator = torch.Generator().manual_seed(0)
    values_RN = torch.randn(_USUAL_ROWS, length, generator=generator)
    sums = _RowSums(values_RN, requantized(values_RN, stored_type))
    squares = sums.squares_R.sum()
    return float((sums.error_R.sum() / squares) ** 0.5), float(sums.product_R.sum() / squares)
