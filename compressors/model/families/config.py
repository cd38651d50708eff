"""Reads ``config.json`` into a :class:`~compressors.model.description.spec.ModelSpec`, once; nobody else reads it.

transformers' ``AutoConfig`` is not used, because every process that opens a model would have to import transformers;
``compressors.model.families.config_check`` compares the two before any work.
"""

from __future__ import annotations

from pathlib import Path

from compressors.model.description.settings import Settings
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.registry import family_for, supported_families
from compressors.model.files.json_file import read_json

__all__ = ["read_spec"]

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_spec(folder: Path) -> ModelSpec:
    """Reads ``config.json``.

    Raises:
        InputError: the file is missing, is not JSON, or a value is missing or of the wrong type.
        UnsupportedError: the model is dense, its family is unknown, or a setting is one we cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint, or a hub id")
    settings = Settings(read_json(path), path)
    model_type = settings.text("model_type")
    if model_type not in supported_families() and not any(key in settings for key in _EXPERT_COUNT_KEYS):
        raise UnsupportedError(
            f"{path}: {model_type!r} is a dense model (no expert count); this tool compresses MoE models"
        )
    read = family_for(model_type, where=path).read
    assert read is not None, "families in the registry are read"
    return read(settings)
