"""Checkpoints whose weights are quantized already: float8 with a scale per block and MXFP4 are read, others refused.

DeepSeek's and Qwen's FP8 repositories hold a matrix as float8 (e4m3) beside ``NAME_scale_inv``, one scale for each
block of 128 x 128 values; the last blocks of a row or column may be smaller. A weight is value times scale in float32,
rounded to the dtype that ``config.json`` names: the numbers of transformers' own ``dequantize=True``
(``transformers/integrations/finegrained_fp8.py``), where sizes are multiples of the block.

MXFP4 (:mod:`compressors.model.files.gguf.mxfp4`) is read where the family's experts are known to be stored so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.json_file import read_json
from compressors.model.files.safetensors_header import TensorHeader
from compressors.model.files.weight_file import WeightFile
from compressors.model.names import shown

__all__ = ["FLOAT8", "GIVE_THE_ORIGINAL", "BlockScaled", "read_block_scaled", "read_mxfp4_dtype"]

FLOAT8 = "F8_E4M3"
"""safetensors' name for the format of the values."""

GIVE_THE_ORIGINAL = (
    "give the original in bfloat16 instead, usually the base_model of its model card or the repository of the same "
    "name without the suffix"
)

_FLOAT8_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""The values by code: a look-up takes a seventh of the time of torch's conversion."""

_KEYS = ("quantization_config", "compression_config")  # the second: older compressed-tensors
_SCALES = ("F32", "BF16", "F16")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BlockScaled:
    """The block size and dtype with which float8 matrices of a checkpoint become weights."""

    block: tuple[int, int]  # rows and columns that share a scale
    dtype: torch.dtype  # the weights' dtype

    def __str__(self) -> str:
        return f"FP8, block {self.block[0]}x{self.block[1]}"

    @staticmethod
    def scales_of(name: str) -> str:
        """The name of the scales that belong to a tensor."""
        return f"{name}_scale_inv"

    def check(self, header: TensorHeader, scales: TensorHeader | None) -> None:
        """Checks that a float8 tensor has scales that fit it.

        Raises:
            InputError: the scales are missing, or have another shape or dtype.
        """
        where, name = f"{header.file}: tensor {shown(header.name)}", shown(self.scales_of(header.name))
        if scales is None:
            raise InputError(f"{where} is float8, but its scales {name} are in none of the weight files")
        if len(header.shape) < 2 or scales.shape != self._shape_of_scales(header.shape):
            raise InputError(
                f"{where} has shape {list(header.shape)}, and its scales {name} have {list(scales.shape)}: they do not "
                f"belong together with blocks of {self.block[0]} x {self.block[1]}"
            )
        if scales.format not in _SCALES:
            raise UnsupportedError(
                f"{scales.file}: tensor {name} holds {scales.format}; only scales in {', '.join(_SCALES)} are read: "
                f"{GIVE_THE_ORIGINAL}"
            )

    def fill(
        self, out: torch.Tensor, first: int, values: tuple[WeightFile, str], scales: tuple[WeightFile, str]
    ) -> None:
        """Fills ``out`` with weights of a tensor [..., rows, columns], a row of blocks at a time.

        Args:
            out: contiguous; it holds whole rows.
            first: flat index of the first weight in the tensor.
            values: file and name of the float8 tensor.
            scales: file and name of its scales.

        Raises:
            InputError: a file was changed or cut off since it was opened.
        """
        n_rows, n_columns = values[0].tensors[values[1]].shape[-2:]
        n_row_blocks, n_column_blocks = scales[0].tensors[scales[1]].shape[-2:]
        rows = out.view(-1, n_columns)
        done = 0
        while done < len(rows):
            matrix, row = divmod(first // n_columns + done, n_rows)
            n_together = min(self.block[0] - row % self.block[0], n_rows - row, len(rows) - done)
            value = torch.empty(n_together, n_columns, dtype=torch.float8_e4m3fn)
            values[0].read_into(values[1], value, first + done * n_columns)
            scale = torch.empty(n_column_blocks, dtype=torch.float32)
            scales[0].read_into(scales[1], scale, (matrix * n_row_blocks + row // self.block[0]) * n_column_blocks)
            factors = scale.repeat_interleave(min(self.block[1], n_columns))[:n_columns]
            codes = value.view(torch.uint8).view(-1).int()
            weights = _FLOAT8_VALUES.index_select(0, codes).view_as(value).mul_(factors)
            rows[done : done + n_together] = weights.to(self.dtype)
            done += n_together

    def _shape_of_scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        *matrices, rows, columns = shape
        return (*matrices, ceil(rows / self.block[0]), ceil(columns / self.block[1]))


def read_block_scaled(folder: Path) -> BlockScaled | None:
    """Reads the block size and dtype of float8 weights from ``config.json``; None without such weights or such a file.

    Raises:
        InputError: the file cannot be read.
        UnsupportedError: the weights are quantized in a way that cannot be read.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    config = read_json(path)
    settings = _quantization(config)
    if settings is None or (_method(settings) == _MXFP4 and "text_config" not in config):
        return None
    problem = _why_not_read(settings) if _method(settings) == "fp8" else ""
    if problem is not None:
        raise _not_read(path, settings, problem)
    rows, columns = settings.get("weight_block_size", (128, 128))
    return BlockScaled((rows, columns), _dtype(config))


def read_mxfp4_dtype(folder: Path, spec: ModelSpec) -> torch.dtype | None:
    """Reads from ``config.json`` the dtype that experts in MXFP4 are read as; None if they are not stored so.

    Raises:
        UnsupportedError: it names MXFP4 for a family whose MXFP4 tensors are not known.
    """
    path = folder / "config.json"
    config = read_json(path)
    settings = _quantization(config)
    if settings is None or _method(settings) != _MXFP4:
        return None
    fused = (tensor.fused for layer in spec.layers for tensor in layer.expert_tensors)
    if not any(layout is not None and layout.may_be_mxfp4 for layout in fused):
        raise _not_read(path, settings, "")
    return _dtype(config)


_MXFP4 = "mxfp4"


def _method(settings: Any) -> Any:
    return settings.get("quant_method") if isinstance(settings, dict) else None


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    dtype = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(dtype).removeprefix("torch."), torch.bfloat16)


def _not_read(path: Path, settings: Any, problem: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: quantization_config says that the weights are quantized already ({_described(settings)}"
        f"{problem and ', '}{problem}), which is not read; {GIVE_THE_ORIGINAL}"
    )


def _quantization(config: Mapping[str, Any]) -> Any:
    text_config = config.get("text_config")
    for settings in (config, text_config if isinstance(text_config, dict) else {}):
        for key in _KEYS:
            if settings.get(key) is not None:
                return settings[key]
    return None


def _described(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"quantization_config is {shown(settings)}"
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return f"quant_method {shown(method)}" if method is not None else "it names no quant_method"


def _why_not_read(settings: Mapping[str, Any]) -> str | None:
    """Says why a checkpoint of quant_method fp8 cannot be read; None if it can."""
    block = settings.get("weight_block_size", [128, 128])
    if block is None:
        return "with one scale per tensor: weight_block_size is null"
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        return f"with weight_block_size {shown(block)}"
    if settings.get("activation_scheme") not in (None, "dynamic"):
        return f"with activation_scheme {shown(settings['activation_scheme'])}"
    if settings.get("fmt") not in (None, "e4m3"):
        return f"with fmt {shown(settings['fmt'])}"
    return None
