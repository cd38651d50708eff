"""The frozen, typed description of a MoE model, which :mod:`compressors.model.description.config` reads.

Letters in names of arrays, here and everywhere:
    L layers   E experts   K experts per token (top-k)   T tokens   D hidden size   F expert width   V vocabulary
    H attention heads   B token blocks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressors.model.description.rope import Rope
from compressors.model.families.table import DENSE_GGUF_NAMES, GGUF_NAMES, Family, QkNorm, Role, family_for

__all__ = ["NO_MOE", "MoeShape", "MoeSize"]


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
    context_length: int  # tokens that files are written for; where attention has a window, no more than that
    rms_norm_eps: float
    rope: Rope
    tied_embeddings: bool
    normalize_top_k: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sizes: tuple[MoeSize, ...] | None = None  # by layer, where layers differ
    window: int | None = None  # tokens that attention reaches back over, itself included; None: all

    @property
    def family(self) -> Family:
        """The architecture's row in the table of families."""
        return family_for(self.model_type)

    @property
    def rope_theta(self) -> float:
        """The base of the rotary embedding."""
        return self.rope.theta

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
        """The name of a tensor in a Hugging Face checkpoint of this model."""
        dense = self.family.dense if self.is_dense else None
        names = self.family.names if dense is None or role not in dense.names else dense.names
        return names[role].format(layer=layer, expert=expert)

    @property
    def gguf_architecture(self) -> str:
        """llama.cpp's name of the model's architecture."""
        dense = self.family.dense if self.is_dense else None
        return self.family.gguf.architecture if dense is None else dense.gguf_architecture

    def gguf_name(self, role: Role, layer: int | None = None) -> str:
        """The name of a tensor in llama.cpp; all experts of a layer are one."""
        names = DENSE_GGUF_NAMES if self.is_dense and role.is_expert else GGUF_NAMES
        return names[role].format(layer=layer)

    def onnx_name(self, role: Role, layer: int | None = None) -> str:
        """The name of a weight in our ONNX graphs; all experts' gate and up projections of a layer are one."""
        if not role.is_expert or self.is_dense:
            return self.stored_name(role, layer)
        fused = self.family.fused_down if role is Role.EXPERT_DOWN else self.family.fused_gate_up
        return fused.format(layer=layer)

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A ``config.json`` of this model's family with this model's expert count, in one spelling, and top-k.

        A dense model's is of the dense counterpart, and says nothing about experts. What is written is not quantized as
        the source may be.
        """
        keys, dense = self.family.config_keys, self.family.dense
        absent = (keys.n_experts, keys.other_n_experts, "quantization_config")
        others = {key: value for key, value in config.items() if key not in absent}
        if others.get("layer_types") is not None:
            others["layer_types"] = others["layer_types"][: self.n_layers]
        others["num_hidden_layers"] = self.n_layers
        others["tie_word_embeddings"] = self.tied_embeddings  # the weights may have had a head of their own
        if self.is_dense and dense is not None:
            kept = {key: value for key, value in others.items() if key not in self.family.moe_settings}
            return {
                **dense.settings,
                **kept,
                **self._written_out(),
                "model_type": dense.model_type,
                "architectures": [dense.architecture],
                dense.width_key: self.expert_width,
            }
        return others | {
            keys.n_experts: self.n_experts,
            keys.expert_width: self.expert_width,
            "num_experts_per_tok": self.top_k,
        }

    def _written_out(self) -> dict[str, Any]:
        """Settings to write out, because another class of transformers has other defaults for them."""
        return {
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_parameters": self.rope.in_config(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else (*self.eos_token_ids, None)[0],
            "pad_token_id": self.pad_token_id,
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
