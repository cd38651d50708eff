"""Checkpoints in float8, in the forms that the hub has, beside the same numbers dequantized at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from compressors.model.description.roles import Role
from compressors.model.sources.hugging_face.checkpoint import Checkpoint

__all__ = ["SCHEMES", "Scheme", "all_tensors", "blocks", "compressed_tensors", "is_projection", "write_float8"]

_KEPT = ("embed", "lm_head", "norm", "router", "gate.weight", "conv", "sinks", "bias")
"""Parts of the names of tensors that the hub's float8 files hold in bfloat16 or float32."""


@dataclass(frozen=True)
class Scheme:
    """A form of float8.

    Attributes:
        settings: the ``quantization_config``.
        block: the rows and columns that share a scale; None: all.
        suffix: the end of the names of scales.
        scale_dtype: the dtype of the scales; uint8: exponents of 2.
        is_flat: True if the scales' axes of size 1 at the end are left out.
        of_activations: the ends of the names of other scales, which a module has beside its weight.
    """

    settings: Mapping[str, Any]
    block: tuple[int | None, int | None]
    suffix: str = "_scale"
    scale_dtype: torch.dtype = torch.float32
    is_flat: bool = False
    of_activations: tuple[str, ...] = ()

    def quantized(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float8 values of a tensor [..., rows, columns], and the scale of each block."""
        n_rows, n_columns = tensor.shape[-2:]
        height, width = self.block[0] or n_rows, self.block[1] or n_columns
        whole = functional.pad(tensor, (0, -n_columns % width, 0, -n_rows % height))
        largest = whole.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).abs().amax(dim=(-3, -1))
        scales = self._rounded(largest / 448)
        return (tensor / self._by_value(scales, tensor.shape)).to(torch.float8_e4m3fn), scales

    def stored(self, scales: torch.Tensor) -> torch.Tensor:
        """The scales as the file has them."""
        while self.is_flat and scales.ndim and scales.shape[-1] == 1:
            scales = scales[..., 0]
        if self.scale_dtype == torch.uint8:
            return (scales.log2() + 127).to(torch.uint8)
        return scales.to(self.scale_dtype)

    def dequantized(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights: all values at once, times all scales, which are repeated."""
        by_value = self._by_value(scales, values.shape)
        if self.settings["quant_method"] == "compressed-tensors" and self.scale_dtype.itemsize > 1:
            return (values.to(self.scale_dtype) * by_value.to(self.scale_dtype)).to(dtype)
        return (values.float() * by_value).to(dtype)

    def _by_value(self, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The scale of each value of a tensor."""
        n_rows, n_columns = shape[-2:]
        by_row = scales.repeat_interleave(self.block[0] or n_rows, dim=-2)[..., :n_rows, :]
        return by_row.repeat_interleave(self.block[1] or n_columns, dim=-1)[..., :n_columns]

    def _rounded(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale as the file can hold it, in float32."""
        if self.scale_dtype.itemsize == 1:
            return scale.log2().ceil().exp2()
        return scale.to(self.scale_dtype).float()


def blocks(block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.float32, **settings: object) -> Scheme:
    """The form of DeepSeek's, Qwen's and MiniMax's repositories."""
    named = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return Scheme({**named, "modules_to_not_convert": ["lm_head"], **settings}, block, "_scale_inv", scale_dtype)


def compressed_tensors(
    strategy: str,
    block: tuple[int | None, int | None],
    scale_dtype: torch.dtype = torch.bfloat16,
    *,
    file_format: str = "float-quantized",
    **weights: object,
) -> Scheme:
    """The form that llm-compressor writes."""
    named = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    named |= {"block_structure": None, "group_size": None, **weights}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": named, "input_activations": activations, "output_activations": None}
    settings = {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
    return Scheme(settings, block, "_scale", scale_dtype)


_STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
_MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]}

SCHEMES: Mapping[str, Scheme] = {
    "DeepSeek": blocks(),
    "Qwen": blocks(scale_dtype=torch.bfloat16),
    "MiniMax": blocks(fmt="float8_e4m3fn"),
    "uneven blocks": blocks((96, 80)),
    "low blocks": blocks((1, 256), torch.bfloat16),
    "large blocks": blocks((1000, 1000)),
    "ue8m0": blocks((96, 80), torch.float8_e8m0fnu, scale_fmt="ue8m0"),
    "ue8m0 in bytes": blocks((1, 32), torch.uint8, scale_fmt="ue8m0"),
    "AutoFP8": Scheme(_STATIC, (None, None), is_flat=True, of_activations=(".input_scale",)),
    "vLLM, rows": Scheme({**_STATIC, "activation_scheme": "dynamic"}, (1, None), is_flat=True),
    "transformers, matrices": Scheme(
        {**_STATIC, "weight_block_size": None}, (None, None), "_scale_inv", torch.bfloat16, True, (".activation_scale",)
    ),
    "modelopt": Scheme(_MODELOPT, (None, None), is_flat=True, of_activations=(".input_scale", ".k_scale")),
    "compressed-tensors, rows": compressed_tensors("channel", (1, None)),
    "compressed-tensors, rows in float32": compressed_tensors("channel", (1, None), torch.float32),
    "compressed-tensors, rows in float16": compressed_tensors("channel", (1, None), torch.float16),
    "compressed-tensors, matrices": compressed_tensors("tensor", (None, None), file_format="naive-quantized"),
    "compressed-tensors, blocks": compressed_tensors("block", (96, 80), block_structure=[96, 80]),
    "compressed-tensors, groups": compressed_tensors("group", (1, 64), group_size=64),
    "compressed-tensors, MXFP8": compressed_tensors(
        "group", (1, 32), torch.uint8, file_format="mxfp8-quantized", group_size=32
    ),
}
"""The forms that are read, by a name for each."""


def all_tensors(checkpoint: Checkpoint) -> dict[tuple[Role, int | None, int | None], torch.Tensor]:
    """All tensors of a model by role, layer and expert."""
    tensors: dict[tuple[Role, int | None, int | None], torch.Tensor] = {}
    for described, layer in checkpoint.spec.places:
        role = described.role
        if described.is_per_expert and layer is not None:
            n_experts = checkpoint.spec.layers[layer].n_experts
            tensors |= {(role, layer, e): checkpoint.expert(role, layer, e) for e in range(n_experts)}
        else:
            tensors[role, layer, None] = checkpoint.tensor(role, layer)
    return tensors


def is_projection(name: str, tensor: torch.Tensor) -> bool:
    """True if a tensor is float8 in the hub's files."""
    return tensor.ndim >= 2 and not any(part in name for part in _KEPT)


def write_float8(
    folder: Path,
    new: Path,
    dequantized: Path | None = None,
    scheme: Scheme = SCHEMES["DeepSeek"],
    others: Mapping[str, Scheme] | None = None,
) -> Path:
    """Makes a checkpoint's projections float8.

    Args:
        folder: a checkpoint of one file of weights.
        new: the new folder.
        dequantized: gets the same model in the dtype that its ``config.json`` names.
        scheme: the form.
        others: forms of the tensors whose names have a word in them.

    Returns:
        ``new``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inside = config.get("text_config", config)
    dtype = getattr(torch, inside.get("dtype") or inside["torch_dtype"])
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if is_projection(name, tensor):
            own = next((other for word, other in (others or {}).items() if word in name), scheme)
            stored[name], scales = own.quantized(tensor.float())
            stored[name + own.suffix] = own.stored(scales)
            plain[name] = own.dequantized(stored[name], scales, dtype)
            stored |= {name.removesuffix(".weight") + end: torch.tensor(0.5) for end in own.of_activations}
        else:
            stored[name] = plain[name] = tensor
    for target, tensors in ((new, stored), (dequantized, plain)):
        if target is not None:
            shutil.copytree(folder, target)
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = scheme.settings
    (new / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return new
