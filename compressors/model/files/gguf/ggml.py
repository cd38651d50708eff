"""ggml's own kernels, which compute the values that a runtime sees in the rows of a file.

They lie in ``libggml-base``, which ships inside the llama-cpp-python wheel; ctypes releases the interpreter lock while
they run. A row is a whole number of blocks (``ggml/src/ggml-common.h``).

Letters: R rows, N values of a row, Y bytes of a stored row.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressors.model.errors import InputError
from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType

if TYPE_CHECKING:
    import torch

__all__ = ["can_dequantize", "dequantize_into", "dequantize_rows", "ggml_library_for", "quantize_into", "row_bytes"]


def row_bytes(ggml_type: GGMLQuantizationType, row_length: int) -> int:
    """Bytes of one stored row; the row length must be a multiple of the type's block size."""
    block_length, block_bytes = BLOCK_SIZES[ggml_type]
    assert row_length % block_length == 0, f"{row_length} values in {ggml_type.name} blocks of {block_length}"
    return row_length // block_length * block_bytes


def can_dequantize(ggml_type: GGMLQuantizationType) -> bool:
    """True if ggml can turn the type into float32."""
    return ggml_type is GGMLQuantizationType.F32 or bool(_traits(ggml_type).to_float)


def dequantize_rows(
    quantized_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, row_length: int
) -> npt.NDArray[np.float32]:
    """The values that a runtime sees: float32 [R, N]."""
    n_rows = quantized_RY.shape[0]
    assert quantized_RY.shape == (n_rows, row_bytes(ggml_type, row_length)), quantized_RY.shape
    values_RN = np.empty((n_rows, row_length), dtype=np.float32)
    _dequantize(np.ascontiguousarray(quantized_RY), ggml_type, values_RN.ctypes.data, values_RN.size)
    return values_RN


def dequantize_into(quantized: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, out: torch.Tensor) -> None:
    """Fills ``out``, float32 and contiguous, with the values of whole stored rows, one after another; each is exact."""
    assert str(out.dtype) == "torch.float32" and out.is_contiguous(), out.dtype
    _dequantize(quantized, ggml_type, out.data_ptr(), out.numel())


def _dequantize(quantized: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, address: int, n_values: int) -> None:
    """Fills memory with the values, float32."""
    assert quantized.flags.c_contiguous
    assert quantized.nbytes == row_bytes(ggml_type, n_values), (quantized.nbytes, ggml_type.name, n_values)
    if ggml_type is GGMLQuantizationType.F32:
        ctypes.memmove(address, quantized.ctypes.data, quantized.nbytes)
    else:
        _traits(ggml_type).to_float(quantized.ctypes.data, address, n_values)


def quantize_into(
    out_RY: npt.NDArray[np.uint8],
    values_RN: npt.NDArray[np.float32],
    ggml_type: GGMLQuantizationType,
    importance_N: npt.NDArray[np.float32] | None = None,
) -> None:
    """Fills rows with quantized values; all arrays are contiguous."""
    n_rows, row_length = values_RN.shape
    written = ggml_library_for(ggml_type).ggml_quantize_chunk(
        int(ggml_type),
        values_RN.ctypes.data,
        out_RY.ctypes.data,
        0,
        n_rows,
        row_length,
        None if importance_N is None else importance_N.ctypes.data,
    )
    assert written == out_RY.nbytes, f"ggml wrote {written} bytes, not {out_RY.nbytes}"


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ``ggml/include/ggml.h``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_length", ctypes.c_int64),
        ("block_length_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_reference", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise InputError("llama-cpp-python is not installed; install it with: pip install llama-cpp-python")
    folder = Path(package.origin).parent / "lib"
    candidates = sorted(folder.glob("*ggml-base.*"))
    if not candidates:
        raise InputError(f"{folder} holds no ggml-base library; reinstall llama-cpp-python")
    library = ctypes.CDLL(str(candidates[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


@functools.cache
def ggml_library_for(ggml_type: GGMLQuantizationType) -> ctypes.CDLL:
    """Returns the library with the tables that quantizing to the type needs; some kernels do not check for them.

    The tables of the IQ types take seconds; reading such types needs no tables.
    """
    library = _library()
    library.ggml_quantize_init(ctypes.c_int(int(ggml_type)))
    return library


def _traits(ggml_type: GGMLQuantizationType) -> _TypeTraits:
    traits: _TypeTraits = _library().ggml_get_type_traits(int(ggml_type)).contents
    return traits
