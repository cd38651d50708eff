"""The frozen, typed description of a MoE model. No raw ``config.json`` dictionary travels further than this module.

Letters in names of arrays, here and everywhere:
    L layers   E experts   K experts per token (top-k)   T tokens   D hidden size   F expert width   V vocabulary
    H attention heads   B token blocks
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError, UnsupportedError
from compressors.model.families import DENSE_GGUF_NAMES, GGUF_NAMES, Family, QkNorm, Role, family_for

__all__ = ["NO_MOE", "MoeShape", "MoeSize", "read_shape"]

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoeSize:
    """The experts of one layer."""

    n_experts: int
    expert_width: int


NO_MOE = MoeSize(0, 0)
"""The size of a layer without a MoE sub-layer."""


@dataclass(frozen=True)
class MoeShape:
    """Everything about a model that its computation and its containers depend on, apart from the weights.

    Where layers differ, ``n_experts``, ``top_k`` and ``expert_width`` are the largest of any layer.
    """

    model_type: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int
    top_k: int
    expert_width: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    tied_embeddings: bool
    normalize_top_k: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sizes: tuple[MoeSize, ...] | None = None  # by layer, where layers differ

    @property
    def family(self) -> Family:
        """The architecture's row in the table of families."""
        return family_for(self.model_type)

    def with_experts(self, n_experts: int) -> MoeShape:
        """The same model with another number of experts in every layer; top-k never exceeds the experts left."""
        return self.with_sizes([MoeSize(n_experts, self.expert_width)] * self.n_layers)

    def with_sizes(self, sizes: Sequence[MoeSize]) -> MoeShape:
        """The same model with as many layers as there are sizes, and their experts."""
        n_experts = max(size.n_experts for size in sizes)
        return replace(
            self,
            n_layers=len(sizes),
            n_experts=n_experts,
            top_k=min(self.top_k, n_experts),
            expert_width=max(size.expert_width for size in sizes),
            sizes=None if len(set(sizes)) == 1 else tuple(sizes),
        )

    def layer(self, index: int) -> MoeShape:
        """A model whose layers are all like this one."""
        return self if self.sizes is None else self.with_sizes([self.sizes[index]] * self.n_layers)

    def layer_roles(self, layer: int) -> tuple[Role, ...]:
        """Roles of one decoder layer, experts left out; without a MoE sub-layer it has no router, and no norm of it."""
        roles = self.family.layer_roles
        if self.layer(layer).has_moe:
            return roles
        return tuple(role for role in roles if role not in (Role.MOE_NORM, Role.ROUTER))

    @property
    def has_moe(self) -> bool:
        """Whether every layer (of a shape that :meth:`layer` gave: this one) has experts."""
        return self.n_experts > 0

    @property
    def is_dense(self) -> bool:
        """Whether files hold a dense feed-forward in each layer, in the architecture of the family's dense counterpart.

        They do when no layer has more than one expert: every token chooses it, and its gate, a softmax over one logit,
        is 1 whatever the router says. (A shape that :meth:`layer` gave tells about a model of such layers alone.)
        """
        return self.n_experts == 1 and self.family.dense is not None

    @property
    def stored_roles(self) -> tuple[Role, ...]:
        """Roles whose tensors files hold: a tied head is the embedding, and a dense model needs no router."""
        absent = {Role.HEAD} if self.tied_embeddings else set()
        if self.is_dense:
            absent.add(Role.ROUTER)
        return tuple(role for role in self.family.roles if role not in absent)

    def stored_name(self, role: Role, layer: int | None = None, expert: int | None = None) -> str:
        """What a Hugging Face checkpoint of this model calls a tensor."""
        dense = self.family.dense if self.is_dense else None
        names = self.family.names if dense is None or role not in dense.names else dense.names
        return names[role].format(layer=layer, expert=expert)

    def gguf_name(self, role: Role, layer: int | None = None) -> str:
        """What llama.cpp calls a tensor of this model; all experts of a layer are one."""
        names = DENSE_GGUF_NAMES if self.is_dense and role.is_expert else GGUF_NAMES
        return names[role].format(layer=layer)

    def onnx_name(self, role: Role, layer: int | None = None) -> str:
        """What our ONNX graphs call a weight; all experts' gate and up projections of a layer are one."""
        if not role.is_expert or self.is_dense:
            return self.stored_name(role, layer)
        fused = self.family.fused_down if role is Role.EXPERT_DOWN else self.family.fused_gate_up
        return fused.format(layer=layer)

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A ``config.json`` of this model's family with this model's expert count, in one spelling, and top-k.

        A dense model's is of the dense counterpart, and says nothing about experts.
        """
        keys, dense = self.family.config_keys, self.family.dense
        others = {key: value for key, value in config.items() if key not in (keys.n_experts, keys.saved_n_experts)}
        if "layer_types" in others:  # all alike, or the family would have been refused
            others["layer_types"] = others["layer_types"][: self.n_layers]
        others["num_hidden_layers"] = self.n_layers
        if self.is_dense and dense is not None:
            return {key: value for key, value in others.items() if key not in self.family.moe_settings} | {
                "model_type": dense.model_type,
                "architectures": [dense.architecture],
                dense.width_key: self.expert_width,
                **dense.settings,
            }
        return others | {
            keys.n_experts: self.n_experts,
            keys.expert_width: self.expert_width,
            "num_experts_per_tok": self.top_k,
        }

    @property
    def described_sizes(self) -> str:
        """The different sizes of layers, for messages: ``16 experts of width 128, 12 experts of width 96``."""
        layers = [self.layer(index) for index in range(self.n_layers)]
        sizes = (
            f"{layer.n_experts} experts of width {layer.expert_width}" if layer.has_moe else "no experts"
            for layer in layers
        )
        return ", ".join(dict.fromkeys(sizes))

    @property
    def query_norm_width(self) -> int:
        """Values that one norm of the queries runs over; 0 if the family has none."""
        return self._qk_norm_width(self.n_heads)

    @property
    def key_norm_width(self) -> int:
        """Values that one norm of the keys runs over; 0 if the family has none."""
        return self._qk_norm_width(self.n_kv_heads)

    def _qk_norm_width(self, n_heads: int) -> int:
        heads_normed_together = {QkNorm.NONE: 0, QkNorm.PER_HEAD: 1, QkNorm.WHOLE: n_heads}
        return heads_normed_together[self.family.qk_norm] * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_width

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return self.dense_layer_parameters + self.n_experts * self.expert_parameters

    @property
    def dense_layer_parameters(self) -> int:
        """Parameters of one decoder layer without its experts: attention, norms and router."""
        query = self.n_heads * self.head_dim
        key_value = self.n_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        n_norms = 2 if self.has_moe else 1
        norms = n_norms * self.hidden_size + self.query_norm_width + self.key_norm_width
        return attention + norms + self.n_experts * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        layers = [self.layer(index) for index in range(self.n_layers)]
        in_layers = sum(layer.layer_parameters for layer in layers)
        if self.is_dense:  # without the routers
            in_layers -= sum(layer.n_experts * self.hidden_size for layer in layers)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return in_layers + embeddings + self.hidden_size


def read_shape(folder: Path) -> MoeShape:
    """Reads ``config.json`` once.

    Raises:
        InputError: the file is missing, is not JSON, or a value is missing or of the wrong type.
        UnsupportedError: the model is dense, its family is unknown, or a setting is one we cannot represent.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint, or a hub id")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): download the file again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no JSON object: download the file again")
    return _ConfigReader(raw, path).shape()


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
            vocab_size=self._count("vocab_size"),
            context_length=context_length,
            rms_norm_eps=self._number("rms_norm_eps"),
            rope_theta=self._rope_theta(),
            tied_embeddings=self._flag("tie_word_embeddings", default=False),
            normalize_top_k=self._normalize_top_k(family),
            bos_token_id=self._token("bos_token_id"),
            eos_token_ids=self._tokens("eos_token_id"),
            pad_token_id=self._token("pad_token_id"),
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

    def _tokens(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in tokens):
            raise InputError(f"{self._path}: {key} must be a token id or a list of them, not {value!r}")
        return tuple(tokens)

    def _token(self, key: str) -> int | None:
        tokens = self._tokens(key)
        return tokens[0] if tokens else None
