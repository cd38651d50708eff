"""The settings of ``config.json`` as one family reads them: with transformers' defaults, and refusals by name.

``AutoConfig`` of transformers is the truth: an absent setting takes its class's default, null is refused where it
refuses null, and of two spellings the one that it takes counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.config.rope_settings import RopeRule, read_rope
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family
from compressors.model.description.rope import Rope
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.names import shown

__all__ = ["ATTENTION_KINDS", "FamilySettings"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
ATTENTION_KINDS = (_FULL, _SLIDING)
"""The kinds of layers that most families have."""

_MODELS_IN_MODELS = (("per_layer_config", "settings of single layers"), ("text_config", "a model inside a model"))


class FamilySettings:
    """Reads one family's settings.

    Args:
        settings: the settings of the file.
        family: the family.
        defaults: transformers' defaults of settings that a file may leave out.
        nullable: settings whose null means the same to transformers as their absence.
    """

    def __init__(
        self, settings: Settings, family: Family, defaults: Mapping[str, Any], nullable: Collection[str] = ()
    ) -> None:
        self.settings = settings
        self.family = family
        self._defaults = defaults
        self._nullable = nullable

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.settings.path.parent

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; where it is absent, the family's default, else ``default``."""
        default = self._defaults.get(key, default)
        if key in self._nullable and self.settings.get(key, 0) is None and default is not None:
            self.settings.note(key, default)
            return default
        return self.settings.count(key, default)

    def count_or_null(self, key: str) -> int | None:
        """A positive whole number, or null; where it is absent, the family's default."""
        if self.settings.get(key, self._defaults.get(key)) is not None:
            return self.count(key)
        self.settings.note(key, None)
        return None

    def whole_number(self, key: str) -> int:
        """A whole number that may be zero; where it is absent, the family's default."""
        if self.settings.get(key, self._defaults.get(key)) != 0:
            return self.count(key)
        self.settings.note(key, 0)
        return 0

    def kinds(self, key: str, kinds: Collection[str]) -> list[str] | None:
        """The kind of each layer; None where the list is absent.

        Args:
            key: the key of the list.
            kinds: the kinds that layers may be of.

        Raises:
            UnsupportedError: the list has other kinds, or another length than there are layers.
        """
        found: list[str] | None = self.settings.get(key)
        if found is None:
            return None
        n_layers = self.count("num_hidden_layers")
        if not _are_kinds(found, kinds, n_layers):
            raise UnsupportedError(
                f"{self.settings.named(key)} must name {' or '.join(kinds)} for each of the {n_layers} layers of "
                f"num_hidden_layers, not {shown(found)}"
            )
        return found

    def number(self, key: str) -> float:
        """A positive number; where it is absent, the family's default."""
        return self.settings.number(key, self._defaults.get(key))

    def number_or_null(self, key: str) -> float | None:
        """A positive number, or null; absence is the same."""
        number = self.settings.number_or_null(key)
        self.settings.note(key, number)
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        return self.settings.flag(key, default=default)

    def require(self, key: str, *allowed: object) -> None:
        """Refuses any other value than these; the first one counts where the setting is absent.

        Raises:
            UnsupportedError: the setting has another value.
        """
        value = self.settings.get(key, allowed[0])
        self.settings.note(key, allowed[0] if value is None else value)  # null is allowed where it means the first
        if value not in allowed:
            self.settings.refuse(
                UnsupportedError(
                    f"{self.settings.named(key)} is {value!r}; {self.family.model_type} is supported only with "
                    f"{' or '.join(repr(item) for item in allowed)}"
                )
            )

    def ignore(self, *keys: str) -> None:
        """Names settings that change nothing in this family."""
        self.settings.asked.update(keys)

    def refuse_what_no_family_can_do(
        self, kinds: Collection[str] = ATTENTION_KINDS, *, understood: Collection[str] = ()
    ) -> None:
        """Refuses settings common to all of transformers that change the computation of a layer.

        Args:
            kinds: the kinds of layers that the family has.
            understood: those of these settings that the family reads by itself.

        Raises:
            UnsupportedError: there is one; the message names it.
        """
        settings = self.settings
        settings.note("is_causal", True)
        if not settings.get("is_causal", True):
            raise UnsupportedError(
                f"{settings.named('is_causal')} is {shown(settings.raw['is_causal'])}: attention to later tokens "
                "is not supported, because neither container can generate with it"
            )
        for key, what in _MODELS_IN_MODELS:
            if key not in understood and settings.get(key) is not None:
                raise UnsupportedError(
                    f"{settings.named(key)}: {what} cannot be represented; give the checkpoint of a "
                    f"{self.family.architecture}"
                )
        self.kinds("layer_types", kinds)

    def heads(self, n_kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int, int]:
        """Attention heads, key-value heads, and the values of a head.

        Args:
            n_kv_heads: key-value heads, where another setting than the usual one has them.
            head_dim: values of a head, likewise.

        Raises:
            InputError: transformers could not run a model with these numbers.
        """
        n_heads = self.count("num_attention_heads")
        if n_kv_heads is None:
            n_kv_heads = self.count("num_key_value_heads", n_heads)
        if head_dim is None:
            head_dim = self.count("head_dim", max(1, self.count("hidden_size") // n_heads))
        path = self.settings.path
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
        return n_heads, n_kv_heads, head_dim

    def window(self, switch: str | None = None) -> int | None:
        """Tokens that attention reaches back over, itself included; None: all of them.

        Args:
            switch: the setting without which ``sliding_window`` does not count; None: it counts by itself.
        """
        if switch is not None and not self.settings.flag(switch, default=False):
            return None
        if self.settings.get("sliding_window", self._defaults.get("sliding_window")) is None:
            return None
        return self.count("sliding_window")

    def layer_windows(self, default: Sequence[str]) -> list[int | None]:
        """The window of each layer by its kind in ``layer_types``; ``default`` has the kinds if there is no list."""
        kinds = self.settings.get("layer_types")
        kinds = list(default) if kinds is None else kinds
        self.settings.note("layer_types", kinds)
        if _SLIDING not in kinds:
            self.ignore("sliding_window")
            return [None] * len(kinds)
        window = self.window()
        if window is None:
            raise InputError(
                f"{self.settings.named('sliding_window')} must be a number of tokens: layers have a window"
            )
        return [window if kind == _SLIDING else None for kind in kinds]

    def rope(self, head_dim: int, rule: RopeRule) -> Rope:
        """The rotary embedding of ``head_dim`` values, a head or a part of one; ``rule`` is the family's."""
        trained_context = self.count("max_position_embeddings")
        return read_rope(self.settings, rule, head_dim=head_dim, trained_context=trained_context)

    def top_k(self, n_experts: int, *keys: str) -> int:
        """Experts of each token.

        Args:
            n_experts: the number of experts.
            keys: spellings of the setting, as :meth:`count_of` takes them; none: the usual one.

        Raises:
            InputError: there are fewer experts.
        """
        keys = keys or ("num_experts_per_tok",)
        top_k = self.count_of(*keys)
        if top_k > n_experts:
            raise InputError(f"{self.settings.path}: {keys[-1]} is {top_k}, but there are only {n_experts} experts")
        return top_k

    def count_of(self, *keys: str) -> int:
        """The count under the first of these keys that is present; the last one may be absent."""
        there = [key for key in keys if key in self.settings]
        count = self.count(there[0] if there else keys[-1])
        for key in keys:
            self.settings.note(key, count)
        return count


def _are_kinds(value: object, kinds: Collection[str], n_layers: int) -> bool:
    return isinstance(value, list) and len(value) == n_layers and all(kind in kinds for kind in value)
