"""Reads ``config.json`` into a :class:`~compressors.model.description.shape.MoeShape`, once; nobody else reads it.

``AutoConfig`` of transformers is the truth: what is absent takes its class's default, null is refused where it refuses
null, and of two spellings the one counts that it takes. It is not used itself, because every process that opens a
model would have to import transformers; ``compressors.model.description.config_check`` compares the two before any
work.
"""

from __future__ import annotations

from pathlib import Path

from compressors.model.description.rope_config import read_rope
from compressors.model.description.settings import Settings
from compressors.model.description.shape import MoeShape
from compressors.model.description.special_tokens import configured_tokens
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families.table import FAMILIES, Family, family_for
from compressors.model.files.json_file import read_json
from compressors.model.names import shown

__all__ = ["read_shape"]

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ATTENTION_KINDS = ("full_attention", "sliding_attention")


def read_shape(folder: Path) -> MoeShape:
    """Reads ``config.json`` once.

    Raises:
        InputError: the file is missing, is not JSON, or a value is missing or of the wrong type.
        UnsupportedError: the model is dense, its family is unknown, or a setting is one we cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint, or a hub id")
    return _ConfigReader(Settings(read_json(path), path)).shape()


class _ConfigReader:
    """Knows which settings make a shape, and which a family must have."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._family = self._known_family()

    def shape(self) -> MoeShape:
        """The described model; see :func:`read_shape` for the errors."""
        self._refuse_what_the_family_cannot_do()
        self._refuse_what_no_family_can_do()
        family, keys = self._family, self._family.config_keys
        hidden_size = self._count("hidden_size")
        n_heads = self._count("num_attention_heads")
        n_kv_heads = self._count("num_key_value_heads", n_heads)
        head_dim = self._count("head_dim", max(1, hidden_size // n_heads))
        trained_context = self._count("max_position_embeddings")
        window = self._window()
        self._check_heads(n_heads, n_kv_heads, head_dim)
        vocab_size = self._count("vocab_size")
        tokens = configured_tokens(self._settings.path.parent, vocab_size)
        shape = MoeShape(
            model_type=family.model_type,
            n_layers=self._count("num_hidden_layers"),
            hidden_size=hidden_size,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            n_experts=self._count(keys.other_n_experts if keys.other_n_experts in self._settings else keys.n_experts),
            top_k=self._count("num_experts_per_tok"),
            expert_width=self._count(keys.expert_width),
            vocab_size=vocab_size,
            context_length=trained_context if window is None else min(trained_context, window),
            rms_norm_eps=self._settings.number("rms_norm_eps", family.defaults["rms_norm_eps"]),
            rope=read_rope(
                self._settings, head_dim=head_dim, trained_context=trained_context, default_theta=family.rope_theta
            ),
            tied_embeddings=self._settings.flag("tie_word_embeddings", default=False),
            normalize_top_k=self._normalize_top_k(),
            bos_token_id=tokens.bos,
            eos_token_ids=tokens.ends,
            pad_token_id=tokens.pad,
            window=window,
        )
        if shape.top_k > shape.n_experts:
            raise InputError(
                f"{self._settings.path}: num_experts_per_tok is {shape.top_k}, but there are only {shape.n_experts} "
                "experts"
            )
        return shape

    def _known_family(self) -> Family:
        model_type, path = self._settings.text("model_type"), self._settings.path
        if model_type not in FAMILIES and not any(key in self._settings for key in _EXPERT_COUNT_KEYS):
            raise UnsupportedError(
                f"{path}: {model_type!r} is a dense model (no expert count); this tool compresses MoE models"
            )
        return family_for(model_type, where=path)

    def _refuse_what_the_family_cannot_do(self) -> None:
        for key, allowed in self._family.required_settings.items():
            value = self._settings.raw.get(key, allowed[0])
            if value not in allowed:
                raise UnsupportedError(
                    f"{self._settings.named(key)} is {value!r}; {self._family.model_type} is supported only with "
                    f"{' or '.join(repr(item) for item in allowed)}"
                )

    def _refuse_what_no_family_can_do(self) -> None:
        """Settings of transformers itself that change what a layer computes, whatever the family."""
        settings = self._settings
        if not settings.raw.get("is_causal", True):
            raise UnsupportedError(
                f"{settings.named('is_causal')} is {shown(settings.raw['is_causal'])}: attention to later tokens "
                "is not supported, because neither container can generate with it"
            )
        for key, what in (("per_layer_config", "settings of single layers"), ("text_config", "a model inside a model")):
            if settings.raw.get(key) is not None:
                raise UnsupportedError(
                    f"{settings.named(key)}: {what} cannot be represented; give the checkpoint of a "
                    f"{self._family.architecture}"
                )
        kinds = settings.raw.get("layer_types")
        n_layers = self._count("num_hidden_layers")
        if kinds is not None and not _are_kinds(kinds, n_layers):
            raise UnsupportedError(
                f"{settings.named('layer_types')} must name {' or '.join(_ATTENTION_KINDS)} for each of the "
                f"{n_layers} layers of num_hidden_layers, not {shown(kinds)}"
            )

    def _check_heads(self, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        path = self._settings.path
        if n_heads % n_kv_heads:
            raise InputError(
                f"{path}: num_attention_heads is {n_heads}, which num_key_value_heads {n_kv_heads} does not divide; "
                "transformers cannot run such a model either"
            )
        if head_dim % 2:
            raise InputError(
                f"{path}: heads of {head_dim} values (head_dim, or hidden_size / num_attention_heads) cannot be turned "
                "by a rotary embedding, which takes them in pairs"
            )

    def _window(self) -> int | None:
        """Tokens that attention reaches back over, itself included; None: all of them."""
        family = self._family
        if not family.always_windowed and not self._settings.flag("use_sliding_window", default=False):
            return None
        if self._settings.raw.get("sliding_window", family.defaults.get("sliding_window")) is None:
            return None
        return self._count("sliding_window")

    def _normalize_top_k(self) -> bool:
        key = self._family.config_keys.normalize_top_k
        return True if key is None else self._settings.flag(key, default=False)

    def _count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; where it is absent, the family's default, else ``default``."""
        default = self._family.defaults.get(key, default)
        if key in self._family.nullable and self._settings.raw.get(key, 0) is None and default is not None:
            return default
        return self._settings.count(key, default)


def _are_kinds(value: object, n_layers: int) -> bool:
    return isinstance(value, list) and len(value) == n_layers and all(kind in _ATTENTION_KINDS for kind in value)
