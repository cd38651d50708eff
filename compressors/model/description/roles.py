"""The roles of a model's tensors, independent of their names on disk."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Role"]


class Role(StrEnum):
    """The role of a tensor. The value names it in messages; the order is that of tensors in files.

    A comment gives the shape, output features first, in the letters of :mod:`compressors.model.description.spec`.
    """

    TOKEN_EMBEDDING = "token embedding"  # [V, D]
    FINAL_NORM = "final norm"  # [D]
    HEAD = "head"  # [V, D], absent when tied to the embedding
    ATTENTION_NORM = "attention norm"  # [D]
    QUERY = "query"  # [Q, D], with output gates [P, D]
    QUERY_BIAS = "query bias"  # [Q]
    KEY = "key"  # [K, D]
    KEY_BIAS = "key bias"  # [K]
    VALUE = "value"  # [K, D]
    VALUE_BIAS = "value bias"  # [K]
    ATTENTION_GATE = "attention gate"  # [Q, D]: the sigmoids of its products multiply the output
    QUERY_A = "query's first matrix"  # in latent attention: [A, D]
    QUERY_A_NORM = "query's inner norm"  # [A]
    QUERY_B = "query's second matrix"  # [Q, A]
    KEY_VALUE_A = "keys' and values' first matrix"  # [R, D]
    KEY_VALUE_A_NORM = "keys' and values' inner norm"  # [C]
    KEY_VALUE_B = "keys' and values' second matrix"  # [U, C]
    ATTENTION_OUTPUT = "attention output"  # [D, Q], in latent attention [D, O]
    ATTENTION_OUTPUT_BIAS = "attention output bias"  # [D]
    ATTENTION_OUTPUT_NORM = "attention output norm"  # [D], of what attention adds to the hidden state
    SINKS = "attention sinks"  # [H]: one more logit of each head, which takes a share of the attention and adds nothing
    QUERY_NORM = "query norm"  # see QkNorm
    KEY_NORM = "key norm"
    MIXER_INPUT = "mixer's input"  # of a gated delta rule [X, D], with its gates [M, D]; of Mamba-2 [M, D]
    # of a short convolution [3X, D]
    MIXER_GATE = "mixer's gate"  # [Y, D]
    MIXER_BETA_ALPHA = "mixer's strength and decay"  # both of the following in one, by key head: [B, D]
    MIXER_BETA = "mixer's strength"  # [N, D]
    MIXER_ALPHA = "mixer's decay"  # [N, D]
    CONVOLUTION = "convolution"  # [X, 1, W]
    CONVOLUTION_BIAS = "bias of the convolution"  # [X]
    DECAY_LOGARITHM = "logarithm of the decay"  # [N]
    DECAY_BIAS = "bias of the decay"  # [N]
    MIXER_SKIP = "mixer's skip"  # [N]: factors of the values that go past the states
    MIXER_NORM = "mixer's norm"  # [v], of Mamba-2 [Y]
    MIXER_OUTPUT = "mixer's output"  # [D, Y], of a short convolution [D, X]
    MOE_NORM = "MoE norm"  # [D], in front of any feed-forward
    MOE_OUTPUT_NORM = "MoE output norm"  # [D], of what any feed-forward adds to the hidden state
    ROUTER_NORM = "router's norm"  # [D], of a router that norms the hidden state itself and divides it by the root of D
    ROUTER = "router"  # [E, D]
    ROUTER_BIAS = "router bias"  # [E], part of the logits
    SELECTION_BIAS = "selection bias"  # [E], added to the scores for the choice, and not for the weights
    EXPERT_SCALE = "experts' scales"  # [E], which multiply the weights
    EXPERTS_INPUT = "experts' input"  # [I, D], makes what the routed experts read, where that is not the hidden state
    EXPERT_GATE = "expert gate"  # [F, D] for each expert; in a space of their own [F, I]
    EXPERT_UP = "expert up"  # [F, D] or [F, I] for each expert
    EXPERT_DOWN = "expert down"  # [D, F] or [I, F] for each expert
    EXPERT_GATE_UP_BIAS = "experts' gate and up biases"  # [E, 2F]
    EXPERT_DOWN_BIAS = "experts' down biases"  # [E, D]
    EXPERTS_OUTPUT = "experts' output"  # [D, I], of the sum of the routed experts alone
    EXPERTS_OUTPUT_NORM = "experts' output norm"  # [D], of the sum of the routed experts alone
    SHARED_NORM = "shared expert's norm"  # [D], in front of it, where MOE_NORM is in front of the routed experts alone
    SHARED_ROUTER = "shared expert's router"  # [1, D]
    SHARED_GATE_UP = "shared expert's gate and up"  # both of the following in one: [2S, D]
    SHARED_GATE = "shared expert's gate"  # [S, D]
    SHARED_UP = "shared expert's up"  # [S, D]
    SHARED_DOWN = "shared expert's down"  # [D, S]
    SHARED_OUTPUT_NORM = "shared expert's output norm"  # [D]
    DENSE_GATE = "feed-forward's gate"  # [F, D], in a layer without experts
    DENSE_UP = "feed-forward's up"  # [F, D]
    DENSE_DOWN = "feed-forward's down"  # [D, F]
    LAYER_SCALE = "layer's scale"  # [1], multiplies the hidden state that leaves the layer
    # of a layer that predicts one more token (MTP), beside those that a decoder layer has:
    MTP_PROJECTION = "MTP projection"  # [D, 2D], of the next token's embedding and the hidden state, each normed
    MTP_EMBEDDING_NORM = "MTP norm of the embedding"  # [D]
    MTP_STATE_NORM = "MTP norm of the hidden state"  # [D]
    MTP_OUTPUT_NORM = "MTP output norm"  # [D], in front of the head
    MTP_EMBEDDING = "MTP embedding"  # [V, D]; without it, the model's
    MTP_HEAD = "MTP head"  # [V, D]; without it, the model's
    ROPE_FACTORS = "rope factors"  # in GGUF files only: made from the rotary embedding

    @property
    def is_expert(self) -> bool:
        """True if every routed expert of a layer has a tensor of this role."""
        return self in _EXPERT_ROLES

    @property
    def is_global(self) -> bool:
        """True if the model has one tensor of this role, not one for each layer."""
        return self in _GLOBAL_ROLES

    @property
    def is_of_mtp(self) -> bool:
        """True if a layer that predicts one more token has the tensor, and no decoder layer."""
        return self in _MTP_ROLES

    @property
    def is_feed_forward(self) -> bool:
        """True if the tensor goes when a layer loses its feed-forward; a layer's other tensors are the mixer's."""
        return self in _FEED_FORWARD_ROLES


_EXPERT_ROLES = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
_GLOBAL_ROLES = frozenset({Role.TOKEN_EMBEDDING, Role.FINAL_NORM, Role.HEAD, Role.ROPE_FACTORS})
_MTP_ROLES = frozenset(
    {
        Role.MTP_PROJECTION,
        Role.MTP_EMBEDDING_NORM,
        Role.MTP_STATE_NORM,
        Role.MTP_OUTPUT_NORM,
        Role.MTP_EMBEDDING,
        Role.MTP_HEAD,
    }
)
_FEED_FORWARD_ROLES = _EXPERT_ROLES | {
    Role.MOE_NORM,
    Role.MOE_OUTPUT_NORM,
    Role.ROUTER_NORM,
    Role.ROUTER,
    Role.ROUTER_BIAS,
    Role.SELECTION_BIAS,
    Role.EXPERT_SCALE,
    Role.EXPERT_GATE_UP_BIAS,
    Role.EXPERT_DOWN_BIAS,
    Role.EXPERTS_INPUT,
    Role.EXPERTS_OUTPUT,
    Role.EXPERTS_OUTPUT_NORM,
    Role.SHARED_NORM,
    Role.SHARED_ROUTER,
    Role.SHARED_GATE_UP,
    Role.SHARED_GATE,
    Role.SHARED_UP,
    Role.SHARED_DOWN,
    Role.SHARED_OUTPUT_NORM,
    Role.DENSE_GATE,
    Role.DENSE_UP,
    Role.DENSE_DOWN,
}
