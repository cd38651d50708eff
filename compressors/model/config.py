"""Reads ``config.json`` into a :class:`~compressors.model.shape.MoeShape`, once; no raw dictionary travels further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families import Family, family_for
from compressors.model.json_file import read_json
from compressors.model.shape import MoeShape
from compressors.model.special_tokens import configured_tokens

__all__ = ["read_shape"]

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_shape(folder: Path) -> MoeShape:
    """Reads ``config.json`` once.

    Raises:
        InputError: the file is missing, is not JSON, or a value is missing or of the wrong type.
        UnsupportedError: the model is dense, its family is unknown, or a setting is one we cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint, or a hub id")
    return _ConfigReader(read_json(path), path).shape()


class _ConfigReader:
    """Takes typed values out of ``config.json`` and names the key when one is wrong."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def shape(self) -> MoeShape:
        """The described model; see :func:`read_shape` for the errors."""
        model_type = self._text("model_type")
        if not any(key in self._raw for key in _EXPERT_COUNT_KEYS):
            raise UnsupportedError(
                f"{self._path}: {model_type!r} is a dense model (no expert count); this tool compresses MoE models"
            )
        family = family_for(model_type, where=self._path)
        self._refuse_what_the_family_cannot_do(family)
        keys = family.config_keys
        hidden_size = self._count("hidden_size")
        n_heads = self._count("num_attention_heads")
        context_length = self._count("max_position_embeddings")
        vocab_size = self._count("vocab_size")
        tokens = configured_tokens(self._path.parent, vocab_size)
        shape = MoeShape(
            model_type=family.model_type,
            n_layers=self._count("num_hidden_layers"),
            hidden_size=hidden_size,
            n_heads=n_heads,
            n_kv_heads=self._count("num_key_value_heads", default=n_heads),
            head_dim=self._count("head_dim", default=hidden_size // n_heads),
            n_experts=self._count(keys.n_experts if keys.n_experts in self._raw else keys.saved_n_experts),
            top_k=self._count("num_experts_per_tok"),
            expert_width=self._count(keys.expert_width),
            vocab_size=vocab_size,
            context_length=context_length,
            rms_norm_eps=self._number("rms_norm_eps"),
            rope_theta=self._rope_theta(),
            tied_embeddings=self._flag("tie_word_embeddings", default=False),
            normalize_top_k=self._normalize_top_k(family),
            bos_token_id=tokens.bos,
            eos_token_ids=tokens.ends,
            pad_token_id=tokens.pad,
        )
        if shape.top_k > shape.n_experts:
            raise InputError(
                f"{self._path}: num_experts_per_tok is {shape.top_k}, but there are only {shape.n_experts} experts"
            )
        return shape

    def _refuse_what_the_family_cannot_do(self, family: Family) -> None:
        for key, allowed in family.required_settings.items():
            value = self._raw.get(key, allowed[0])
            if value not in allowed:
                raise UnsupportedError(
                    f"{self._path}: {key} is {value!r}; {family.model_type} is supported only with "
                    f"{' or '.join(repr(item) for item in allowed)}"
                )
        rope = self._settings("rope_parameters") or self._settings("rope_scaling")
        rope_type = rope.get("rope_type", rope.get("type"))  # older configs say "type"
        if rope_type not in (None, "default"):
            raise UnsupportedError(
                f"{self._path}: rope scaling of type {rope_type!r} is not supported; "
                "set rope_scaling to null to use the model at its original context length"
            )

    def _normalize_top_k(self, family: Family) -> bool:
        if family.config_keys.normalize_top_k is None:
            return True
        return self._flag(family.config_keys.normalize_top_k, default=False)

    def _rope_theta(self) -> float:
        """transformers' default differs from family to family, so there is none here."""
        nested = self._settings("rope_parameters")
        return (_ConfigReader(nested, self._path) if "rope_theta" in nested else self)._number("rope_theta")

    def _value(self, key: str, default: Any = None) -> Any:
        value = self._raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self._path} lacks {key!r}: the model cannot be read without it")
        return value

    def _settings(self, key: str) -> Mapping[str, Any]:
        value = self._raw.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"{self._path}: {key} must be an object of settings, not {value!r}")
        return value

    def _text(self, key: str) -> str:
        value = self._value(key)
        if not isinstance(value, str):
            raise InputError(f"{self._path}: {key} must be a text, not {value!r}")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self._path}: {key} must be a positive whole number, not {value!r}")
        return value

    def _number(self, key: str) -> float:
        value = self._value(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{self._path}: {key} must be a positive number, not {value!r}")
        return float(value)

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self._path}: {key} must be true or false, not {value!r}")
        return value
