"""The float16 scales in ggml's blocks, which can be replaced in a finished file while its codes stay.

Every value of a block is proportional to them: d, and with it dmin (or m) where a block has a minimum too. Types whose
scale is no float16 of its own are left out: MXFP4 and NVFP4 (8 bits), IQ1_M (spread over its codes' bytes). Places are
those of the structures in ``ggml/src/ggml-common.h``.

Letters: R rows, Y bytes of a stored row, K blocks of a row, S scales of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from compressors.model.files.gguf.ggml_types import BLOCK_SIZES, GGMLQuantizationType

if TYPE_CHECKING:
    import torch

__all__ = ["block_length", "put_scales", "rescaled", "scales_of"]

_T = GGMLQuantizationType

_PLACES: Mapping[GGMLQuantizationType, tuple[int, int]] = {
    _T.Q4_0: (0, 1),
    _T.Q4_1: (0, 2),
    _T.Q5_0: (0, 1),
    _T.Q5_1: (0, 2),
    _T.Q8_0: (0, 1),
    _T.IQ4_NL: (0, 1),
    _T.Q1_0: (0, 1),
    _T.Q2_0: (0, 1),
    _T.Q2_K: (80, 2),
    _T.Q3_K: (108, 1),
    _T.Q4_K: (0, 2),
    _T.Q5_K: (0, 2),
    _T.Q6_K: (208, 1),
    _T.IQ1_S: (0, 1),
    _T.IQ2_XXS: (0, 1),
    _T.IQ2_XS: (0, 1),
    _T.IQ2_S: (0, 1),
    _T.IQ3_XXS: (0, 1),
    _T.IQ3_S: (0, 1),
    _T.IQ4_XS: (0, 1),
    _T.TQ1_0: (52, 1),
    _T.TQ2_0: (64, 1),
}
"""The place of the first scale in a block, and the number of scales that stand there one after the other."""


def block_length(ggml_type: GGMLQuantizationType) -> int | None:
    """The number of values that share their scales; None if the type has no such scales."""
    return BLOCK_SIZES[ggml_type][0] if ggml_type in _PLACES else None


def scales_of(stored_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> torch.Tensor:
    """The scales of stored rows: float16 [R, K, S]."""
    import torch

    return torch.from_numpy(_place(stored_RY, ggml_type).copy()).view(torch.float16)


def put_scales(stored_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType, scales_RKS: torch.Tensor) -> None:
    """Puts other scales, float16 [R, K, S], into stored rows."""
    import torch

    _place(stored_RY, ggml_type)[:] = scales_RKS.contiguous().view(torch.uint8).numpy()


def rescaled(scales_RKS: torch.Tensor, factors_RK: torch.Tensor) -> torch.Tensor:
    """The scales times each block's factor, rounded to what a file can hold: of the scales' dtype, and finite."""
    import torch

    largest = torch.finfo(scales_RKS.dtype).max
    return (scales_RKS.float() * factors_RK[..., None]).clamp(-largest, largest).to(scales_RKS.dtype)


def _place(stored_RY: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """The bytes of the scales, a view: [R, K, 2 S]."""
    first, n_scales = _PLACES[ggml_type]
    blocks_RKY = stored_RY.reshape(len(stored_RY), -1, BLOCK_SIZES[ggml_type][1])
    return blocks_RKY[:, :, first : first + 2 * n_scales]
