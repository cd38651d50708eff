"""Reads ``config.json`` into a :class:`~compressors.model.description.spec.ModelSpec`.

All other code asks that description for a model's settings; only the ids of special tokens are read elsewhere, by
:mod:`compressors.model.config.special_tokens`.

transformers' configurations are not used for it, because every process that opens a model would have to import them;
``compressors.model.config.config_check`` compares the two before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.registry import family_for, supported_families
from compressors.model.files.json_file import read_json
from compressors.model.names import shown

__all__ = [
    "EXPERT_COUNT_KEYS",
    "WITHOUT_EFFECT",
    "is_inside_of_more",
    "language_model_config",
    "model_settings",
    "read_spec",
    "transformers_config",
]

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Settings of which a MoE model has one."""

WITHOUT_EFFECT = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
    }
)
"""Settings that serve training alone, or that :mod:`compressors.model.config.special_tokens` reads."""


def read_spec(folder: Path) -> ModelSpec:
    """Reads ``config.json``.

    Raises:
        InputError: the file is missing, is not JSON, or a value is missing or of the wrong type.
        UnsupportedError: the model is dense, its family is unknown, or a setting is one we cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder} has no config.json: give the folder of a Hugging Face checkpoint, a hub id, or a GGUF file"
        )
    family, settings = model_settings(read_json(path), path)
    assert family.read is not None, "families in the registry are read"
    return family.read(settings)


def model_settings(config: Mapping[str, Any], path: Path) -> tuple[Family, Settings]:
    """The family of a ``config.json``, and the settings of its language model.

    Args:
        config: the values.
        path: the file that they are from, for messages.

    Raises:
        InputError: they name no type.
        UnsupportedError: the model is dense, its family is unknown, or the language model is of another family.
    """
    settings = Settings(config, path)
    model_type = settings.text("model_type")
    if model_type not in supported_families() and not any(key in settings for key in EXPERT_COUNT_KEYS):
        raise UnsupportedError(
            f"{path}: {model_type!r} is a dense model (no expert count); this tool compresses MoE models"
        )
    family = family_for(model_type, where=path)
    if not is_inside_of_more(settings.raw):
        return family, settings
    inside = settings.objects(_INSIDE)
    if (inner_type := inside.text("model_type", family.model_type)) != family.model_type:
        raise UnsupportedError(
            f"{inside.named('model_type')} is {shown(inner_type)}, but the language model inside a {model_type} is a "
            f"{family.model_type}"
        )
    return family, inside


_INSIDE = "text_config"


def is_inside_of_more(config: Mapping[str, Any]) -> bool:
    """True if a ``config.json`` describes a multimodal model with a language model inside that can be read."""
    model_type = config.get("model_type")
    return any(family.whole_model_type == model_type for family in supported_families().values() if model_type)


_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")
"""Settings of a multimodal model that also count for the language model inside, and go before its own."""


def language_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``config.json`` of the language model alone; one that is not multimodal stays as it is."""
    if not is_inside_of_more(config):
        return dict(config)
    family = family_for(config["model_type"])
    of_whole = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None}
    names = {"model_type": family.model_type, "architectures": [family.architecture]}
    return {**config.get(_INSIDE, {}), **of_whole, **names}


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' object for the language model that a ``config.json`` describes, as ``AutoConfig`` makes it.

    Raises:
        ValueError: the installed transformers does not know the model; it raises other errors where it refuses a value.
    """
    from transformers import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"it does not know the model type {shown(model_type)}: pip install --upgrade transformers")
    return CONFIG_MAPPING[model_type].from_dict(_with_numbers(dict(config))).get_text_config()


def _with_numbers(value: Any) -> Any:
    """A copy in which a number that JSON has not, such as ``{"__float__": "Infinity"}``, is one."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_numbers(entry) for key, entry in value.items()}
    return [_with_numbers(entry) for entry in value] if isinstance(value, list) else value
