"""Reads from ``config.json`` how the weights of a checkpoint are quantized; other ways than these are refused by name.

- ``fp8``: float8 with a scale per block (DeepSeek, Qwen, MiniMax), row or matrix (AutoFP8, vLLM; transformers with
  ``weight_block_size`` null). The way in which activations were to be quantized does not change a weight.
- ``compressed-tensors`` in the formats ``float-quantized``, ``naive-quantized`` and ``mxfp8-quantized``, with float8.
- ``modelopt`` with ``quant_algo`` FP8: a scale per matrix.
- ``mxfp4`` (:mod:`compressors.model.files.gguf.mxfp4`), where the family's experts are known to be stored so.

Which modules are left out (``ignore``, ``ignored_layers``, ``modules_to_not_convert``) is seen from the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.files.json_file import read_json
from compressors.model.files.storage_type import StorageType
from compressors.model.names import shown
from compressors.model.sources.hugging_face.float8 import GIVE_THE_ORIGINAL, Float8, Grain

__all__ = ["read_float8", "read_mxfp4_type"]

_KEYS = ("quantization_config", "compression_config")  # the second: older compressed-tensors
_TYPES = {stored.torch_name: stored for stored in (StorageType.F32, StorageType.F16, StorageType.BF16)}
_MXFP4 = "mxfp4"
_E4M3 = (None, "e4m3", "e4m3fn", "float8_e4m3fn")  # MiniMax-M2 uses torch's name
_COARSE = (Grain(), Grain(rows=1))
_USUAL_BLOCK = [128, 128]
_MXFP8 = "mxfp8-quantized"
_FLOAT_FORMATS = ("float-quantized", "naive-quantized", _MXFP8)
_OTHER_FORMATS = {
    "pack-quantized": "packed integers",
    "int-quantized": "integers",
    "marlin-24": "packed integers of a sparse matrix",
    "nvfp4-pack-quantized": "packed 4-bit floats",
    "mxfp4-pack-quantized": "packed 4-bit floats",
    "mxfp6-pack-quantized": "packed 6-bit floats",
}


class _NotReadError(Exception):
    """A setting of quantization_config that cannot be read; the message says which."""


def read_float8(folder: Path) -> Float8 | None:
    """Reads from ``config.json`` how float8 weights are stored; None without quantized weights or such a file.

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
    read = _READERS.get(str(_method(settings)))
    if read is None:
        raise _not_read(path, settings)
    try:
        return read(settings, _type_of(config))
    except _NotReadError as problem:
        raise _not_read(path, settings, str(problem)) from None


def read_mxfp4_type(folder: Path, spec: ModelSpec) -> StorageType | None:
    """Reads from ``config.json`` the type that experts in MXFP4 are read as; None if they are not stored so.

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
        raise _not_read(path, settings)
    return _type_of(config)


def _fp8(settings: Mapping[str, Any], stored: StorageType) -> Float8:
    _refuse_others(settings, "activation_scheme", (None, "dynamic", "static"))
    _refuse_others(settings, "fmt", _E4M3)
    _refuse_others(settings, "expert_dtype", (None, "fp8"))
    _refuse_others(settings, "scale_fmt", (None, "float", "ue8m0"))
    has_exponents = settings.get("scale_fmt") == "ue8m0"
    if settings.get("weight_block_size") is not None:
        return Float8((_block(settings, "weight_block_size"),), stored, has_exponents=has_exponents)
    blocks = () if "weight_block_size" in settings else (Grain(*_USUAL_BLOCK),)  # transformers' default
    return Float8((*blocks, *_COARSE), stored, has_exponents=has_exponents)


def _modelopt(settings: Mapping[str, Any], stored: StorageType) -> Float8:
    if settings.get("quant_algo") != "FP8":
        raise _NotReadError(f"with quant_algo {shown(settings.get('quant_algo'))}")
    return Float8((Grain(),), stored)


def _compressed_tensors(settings: Mapping[str, Any], stored: StorageType) -> Float8:
    _refuse_changes_of_other_kinds(settings)
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        raise _NotReadError(f"with config_groups {shown(groups)}")
    schemes = [scheme for name, group in groups.items() for scheme in _schemes(name, group, settings.get("format"))]
    if not schemes:
        raise _NotReadError("of which no group has weights")
    grains = tuple(dict.fromkeys(grain for grain, _ in schemes))
    if len([grain for grain in grains if grain.columns is not None]) > 1:
        raise _NotReadError(f"with several sizes of blocks ({', '.join(map(str, grains))})")
    has_exponents = any(format_ == _MXFP8 for _, format_ in schemes)
    return Float8(grains, stored, rounds_to_scales=True, has_exponents=has_exponents)


_READERS = {"fp8": _fp8, "modelopt": _modelopt, "compressed-tensors": _compressed_tensors}


def _refuse_changes_of_other_kinds(settings: Mapping[str, Any]) -> None:
    sparsity = settings.get("sparsity_config") or {}
    sparse_format = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if sparse_format != "dense":
        raise _NotReadError(f"with sparsity_config in format {shown(sparse_format)}")
    if settings.get("transform_config"):
        raise _NotReadError("with a transform_config, whose rotations belong to the computation")


def _schemes(name: str, group: Any, format_of_all: Any) -> Iterator[tuple[Grain, str]]:
    """Yields how the weights of a group share scales, and its format; nothing if its weights are not quantized."""
    if not isinstance(group, dict) or not isinstance(group.get("weights", {}), dict | None):
        raise _NotReadError(f"with config_groups {shown(name)}: {shown(group)}")
    weights = group.get("weights")
    if weights is None:
        return
    format_ = group.get("format") or format_of_all
    if format_ not in _FLOAT_FORMATS:
        holds = f" ({_OTHER_FORMATS[format_]})" if str(format_) in _OTHER_FORMATS else ""
        raise _NotReadError(f"in format {shown(format_)}{holds}")
    _refuse_others(weights, "type", ("float",))
    _refuse_others(weights, "num_bits", (8,))
    _refuse_others(weights, "symmetric", (None, True))
    _refuse_others(weights, "dynamic", (None, False))
    yield _grain(weights), format_


def _grain(weights: Mapping[str, Any]) -> Grain:
    """How values share scales; the names are those of ``QuantizationStrategy`` in compressed-tensors."""
    _refuse_others(weights, "strategy", ("tensor", "channel", "block", "group"))
    match weights["strategy"]:
        case "tensor":
            return Grain()
        case "channel":
            return Grain(rows=1)
        case "block":
            return _block(weights, "block_structure")
    size = weights.get("group_size")
    if type(size) is not int or size < 1:
        raise _NotReadError(f"with group_size {shown(size)}")
    return Grain(1, size)


def _block(settings: Mapping[str, Any], key: str) -> Grain:
    block = settings.get(key)
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _NotReadError(f"with {key} {shown(block)}")
    return Grain(*block)


def _refuse_others(settings: Mapping[str, Any], key: str, read: tuple[Any, ...]) -> None:
    if settings.get(key) not in read:
        raise _NotReadError(f"with {key} {shown(settings.get(key))}")


def _method(settings: Any) -> Any:
    return settings.get("quant_method") if isinstance(settings, dict) else None


def _type_of(config: Mapping[str, Any]) -> StorageType:
    for settings in _levels(config):
        dtype = settings.get("dtype") or settings.get("torch_dtype")
        if dtype is not None:
            return _TYPES.get(str(dtype).removeprefix("torch."), StorageType.BF16)
    return StorageType.BF16


def _not_read(path: Path, settings: Any, problem: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"{path}: quantization_config says that the weights are quantized already ({_described(settings)}"
        f"{problem and ', '}{problem}), which is not read; {GIVE_THE_ORIGINAL}"
    )


def _quantization(config: Mapping[str, Any]) -> Any:
    for settings in _levels(config):
        for key in _KEYS:
            if settings.get(key) is not None:
                return settings[key]
    return None


def _levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The settings of the whole model, and those of the language model inside of it."""
    text_config = config.get("text_config")
    return (config, text_config) if isinstance(text_config, dict) else (config,)


def _described(settings: Any) -> str:
    if not isinstance(settings, dict):
        return f"quantization_config is {shown(settings)}"
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return f"quant_method {shown(method)}" if method is not None else "it names no quant_method"
