"""Parts that many families share: how attention is read, and the tensors of attention and experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.rope_settings import RopeRule
from compressors.model.config.special_tokens import configured_tokens
from compressors.model.description.feed_forward import Dense, FeedForward, LostModule, Routed
from compressors.model.description.mixers import GroupedQuery, Mixer, QkNorm
from compressors.model.description.roles import Role
from compressors.model.description.spec import LayerSpec, ModelSpec
from compressors.model.description.tensors import Fused, GgufTensor, Kind, NormKind, TensorSpec
from compressors.model.description.transforms import SAME, PlusOne, Transform
from compressors.model.errors import UnsupportedError

__all__ = [
    "attention",
    "attention_matrices",
    "attention_tensors",
    "bias_tensors",
    "dense_tensors",
    "expert_tensors",
    "fused_expert_tensors",
    "grouped_query",
    "layer",
    "leading_dense_tensors",
    "model",
    "n_dense",
    "norm",
    "norms",
    "qk_norm_tensors",
    "refuse_without_experts",
    "routed",
    "routed_in_mlp",
    "router_tensor",
    "selection_bias_tensor",
    "shared_expert_tensors",
]

_LAYER = "model.layers.{layer}."

_EMBEDDING = TensorSpec(
    Role.TOKEN_EMBEDDING, "model.embed_tokens.weight", ("V", "D"), GgufTensor("token_embd.weight"), Kind.TABLE
)
_HEAD = TensorSpec(Role.HEAD, "lm_head.weight", ("V", "D"), GgufTensor("output.weight"), Kind.TABLE)


def model(
    settings: FamilySettings,
    layers: Sequence[LayerSpec],
    *,
    final_norm: NormKind = NormKind.PLAIN,
    tied_by_default: bool = False,
    epsilon: str = "rms_norm_eps",
    embedding_scale: float = 1.0,
    logit_divisor: float = 1.0,
    logit_cap: float | None = None,
) -> ModelSpec:
    """A model with the usual embedding, final norm and head.

    Files are written for as many tokens as the model was trained for, or for the window if attention has one in
    every layer.

    Args:
        settings: the family's settings.
        layers: the decoder layers.
        final_norm: how the scales of the final norm are made of its tensor.
        tied_by_default: the head is the embedding where the file does not say.
        epsilon: the key of the epsilon of norms.
        embedding_scale: the factor of the embedding's rows.
        logit_divisor: the number that logits are divided by.
        logit_cap: the limit of logits; None: there is none.
    """
    vocab_size = settings.count("vocab_size")
    tokens = configured_tokens(settings.folder, vocab_size)
    trained, windows = settings.count("max_position_embeddings"), [layer.mixer.window for layer in layers]
    return ModelSpec(
        family=settings.family,
        hidden_size=settings.count("hidden_size"),
        vocab_size=vocab_size,
        context_length=trained if None in windows else min(trained, *(window for window in windows if window)),
        rms_norm_eps=settings.number(epsilon),
        tied_embeddings=settings.flag("tie_word_embeddings", default=tied_by_default),
        tensors=(
            _EMBEDDING,
            norm(Role.FINAL_NORM, "model.norm.weight", ("D",), "output_norm.weight", final_norm),
            _HEAD,
        ),
        layers=tuple(layers),
        bos_token_id=tokens.bos,
        eos_token_ids=tokens.ends,
        pad_token_id=tokens.pad,
        embedding_scale=embedding_scale,
        logit_divisor=logit_divisor,
        logit_cap=logit_cap,
    )


def layer(
    settings: FamilySettings,
    mixer: Mixer,
    feed_forward: FeedForward | None,
    tensors: Iterable[TensorSpec],
    *,
    residual_scale: float = 1.0,
) -> LayerSpec:
    """A decoder layer; its tensors are put into the order of their roles.

    Args:
        settings: the family's settings.
        mixer: the part that lets positions look at earlier ones.
        feed_forward: the part that follows the mixer; None: there is none.
        tensors: all tensors of the layer, in any order.
        residual_scale: the factor of the outputs of mixer and feed-forward.
    """
    order = list(Role)
    in_order = sorted(tensors, key=lambda tensor: order.index(tensor.role))
    if isinstance(feed_forward, Routed):
        feed_forward = _with_names(feed_forward, {tensor.role: tensor for tensor in in_order})
    return LayerSpec(mixer, feed_forward, settings.count("hidden_size"), tuple(in_order), residual_scale=residual_scale)


def _with_names(routed: Routed, tensors: Mapping[Role, TensorSpec]) -> Routed:
    """Returns the experts with the names that the tensors of their layer have."""
    bias, scale = tensors.get(Role.SELECTION_BIAS), tensors.get(Role.EXPERT_SCALE)
    return replace(
        routed,
        router_module=tensors[Role.ROUTER].submodule,
        selection_bias=None if bias is None else bias.in_layer,
        expert_scale=None if scale is None else scale.in_layer,
        router_has_norm=Role.ROUTER_NORM in tensors,
    )


def attention(
    settings: FamilySettings,
    qk_norm: QkNorm = QkNorm.NONE,
    *,
    rope: RopeRule | None = None,
    window_switch: str | None = None,
    has_kinds: bool = False,
    scale: float | None = None,
) -> GroupedQuery:
    """Grouped-query attention.

    Args:
        settings: the family's settings.
        qk_norm: the norms of queries and keys.
        rope: how the family's class reads the rotary embedding; None: with the usual base, for whole heads.
        window_switch: the setting without which ``sliding_window`` does not count; None: it counts by itself.
        has_kinds: layers are of different kinds, whose windows :meth:`FamilySettings.layer_windows` reads.
        scale: the factor of the products of queries and keys; None: it follows from the size of the heads.
    """
    n_heads, n_kv_heads, head_dim = settings.heads()
    return GroupedQuery(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rope=settings.rope(head_dim, RopeRule() if rope is None else rope),
        scale=1 / math.sqrt(head_dim) if scale is None else scale,
        qk_norm=qk_norm,
        window=None if has_kinds else settings.window(window_switch),
    )


routed_in_mlp = partial(Routed, experts_module="mlp.experts", block=(LostModule("mlp"),))
"""Routed experts in the modules where most of transformers' layers have them; :func:`layer` puts the router's in."""


def refuse_without_experts(settings: FamilySettings, are_dense: Sequence[bool], said_by: str) -> None:
    """Refuses a model that has experts in no layer.

    Args:
        settings: the family's settings.
        are_dense: says of each layer whether it is dense.
        said_by: the setting that says so.

    Raises:
        UnsupportedError: all layers are dense.
    """
    if all(are_dense):
        raise UnsupportedError(
            f"{settings.settings.path}: {said_by} leaves none of the {len(are_dense)} layers of num_hidden_layers with "
            "experts; only models with experts are supported"
        )


def norms(kind: NormKind = NormKind.PLAIN, feed_forward: str = "ffn_norm") -> tuple[TensorSpec, ...]:
    """The norms in front of the mixer and of the feed-forward.

    Args:
        kind: how their scales are made from the tensors.
        feed_forward: the GGUF name of the norm in front of the feed-forward.
    """
    after, before = "post_attention_layernorm.weight", "input_layernorm.weight"
    return (
        norm(Role.ATTENTION_NORM, f"{_LAYER}{before}", ("D",), "blk.{layer}.attn_norm.weight", kind),
        norm(Role.MOE_NORM, f"{_LAYER}{after}", ("D",), f"blk.{{layer}}.{feed_forward}.weight", kind),
    )


def norm(role: Role, name: str, shape: tuple[str, ...], gguf: str, kind: NormKind = NormKind.PLAIN) -> TensorSpec:
    """A norm; GGUF files hold the scales themselves."""
    transform = SAME if kind is NormKind.PLAIN else PlusOne()
    return TensorSpec(role, name, shape, GgufTensor(gguf, transform), Kind.NORM, norm=kind)


def routed(spec: ModelSpec) -> Routed:
    """The experts of the first layer that has some."""
    return next(layer.routed for layer in spec.layers if layer.routed is not None)


def n_dense(spec: ModelSpec) -> int:
    """The number of dense layers."""
    return sum(isinstance(layer.feed_forward, Dense) for layer in spec.layers)


def grouped_query(spec: ModelSpec, index: int | None = None) -> GroupedQuery:
    """The grouped-query attention of a layer; with ``index`` None, of the first layer that has some."""
    if index is None:
        return next(layer.mixer for layer in spec.layers if isinstance(layer.mixer, GroupedQuery))
    mixer = spec.layers[index].mixer
    assert isinstance(mixer, GroupedQuery)
    return mixer


def attention_tensors(rotary: Transform = SAME) -> tuple[TensorSpec, ...]:
    """The four matrices of grouped-query attention, and the norms in front of it and of the feed-forward.

    Args:
        rotary: llama.cpp's transform of the rows of queries and keys.
    """
    return (*norms(), *attention_matrices(rotary))


def attention_matrices(rotary: Transform = SAME, queries: str = "Q") -> tuple[TensorSpec, ...]:
    """The four matrices of grouped-query attention.

    Args:
        rotary: llama.cpp's transform of the rows of queries and keys.
        queries: the letter of the rows of queries.
    """
    attention, gguf = f"{_LAYER}self_attn.", "blk.{layer}.attn_"
    query = TensorSpec(Role.QUERY, f"{attention}q_proj.weight", (queries, "D"), GgufTensor(f"{gguf}q.weight", rotary))
    key = TensorSpec(Role.KEY, f"{attention}k_proj.weight", ("K", "D"), GgufTensor(f"{gguf}k.weight", rotary))
    value = TensorSpec(Role.VALUE, f"{attention}v_proj.weight", ("K", "D"), GgufTensor(f"{gguf}v.weight"))
    output = GgufTensor(f"{gguf}output.weight")
    return (
        query,
        replace(key, shares_input_of=Role.QUERY),
        replace(value, shares_input_of=Role.QUERY),
        TensorSpec(Role.ATTENTION_OUTPUT, f"{attention}o_proj.weight", ("D", "Q"), output),
    )


def qk_norm_tensors(qk_norm: QkNorm, kind: NormKind = NormKind.PLAIN) -> tuple[TensorSpec, ...]:
    """The norms of queries and keys; ``kind`` says how their scales are made from the tensors."""
    query, key = ("h", "h") if qk_norm is QkNorm.PER_HEAD else ("Q", "K")
    attention, gguf = f"{_LAYER}self_attn.", "blk.{layer}.attn_"
    return (
        norm(Role.QUERY_NORM, f"{attention}q_norm.weight", (query,), f"{gguf}q_norm.weight", kind),
        norm(Role.KEY_NORM, f"{attention}k_norm.weight", (key,), f"{gguf}k_norm.weight", kind),
    )


def bias_tensors() -> tuple[TensorSpec, ...]:
    """The biases of queries, keys and values."""
    attention, gguf = f"{_LAYER}self_attn.", "blk.{layer}.attn_"
    rows = ((Role.QUERY_BIAS, "q", "Q"), (Role.KEY_BIAS, "k", "K"), (Role.VALUE_BIAS, "v", "K"))
    return tuple(
        TensorSpec(role, f"{attention}{name}_proj.bias", (size,), GgufTensor(f"{gguf}{name}.bias"), Kind.VECTOR)
        for role, name, size in rows
    )


def router_tensor(name: str = "mlp.gate.weight", module: str = "mlp.gate.weight") -> TensorSpec:
    """The router.

    Args:
        name: its name on the hub, inside the layer.
        module: its name inside transformers' layer.
    """
    gguf = GgufTensor("blk.{layer}.ffn_gate_inp.weight")
    return TensorSpec(Role.ROUTER, _LAYER + name, ("E", "D"), gguf, Kind.ROUTER, module=module, experts_axis=0)


def selection_bias_tensor(
    name: str = "mlp.gate.e_score_correction_bias", module: str | None = None, shape: tuple[str, ...] = ("E",)
) -> TensorSpec:
    """The bias that is added to scores for the choice.

    Args:
        name: its name on the hub, inside the layer.
        module: its name inside transformers' layer, where that is another.
        shape: its shape in letters.
    """
    return TensorSpec(
        Role.SELECTION_BIAS,
        _LAYER + name,
        shape,
        GgufTensor("blk.{layer}.exp_probs_b.bias"),
        Kind.SELECTION,
        module=module,
        experts_axis=shape.index("E"),
    )


def expert_tensors(
    gate: str = "mlp.experts.{expert}.gate_proj.weight",
    up: str = "mlp.experts.{expert}.up_proj.weight",
    down: str = "mlp.experts.{expert}.down_proj.weight",
    module: str = "mlp.experts",
) -> tuple[TensorSpec, ...]:
    """The matrices of each expert; the names are the hub's, and transformers' module of all, inside the layer."""
    fused, blk = f"{_LAYER}{module}.", "blk.{layer}.ffn_"
    fused_gate, fused_up = (Fused(f"{fused}gate_up_proj", part, n_parts=2) for part in range(2))
    gate_gguf, up_gguf, down_gguf = (GgufTensor(f"{blk}{name}_exps.weight") for name in ("gate", "up", "down"))
    in_shape, out_shape = ("F", "D"), ("D", "F")
    return (
        TensorSpec(Role.EXPERT_GATE, _LAYER + gate, in_shape, gate_gguf, fused=fused_gate),
        TensorSpec(Role.EXPERT_UP, _LAYER + up, in_shape, up_gguf, fused=fused_up, shares_input_of=Role.EXPERT_GATE),
        TensorSpec(Role.EXPERT_DOWN, _LAYER + down, out_shape, down_gguf, fused=Fused(f"{fused}down_proj")),
    )


def fused_expert_tensors(gate_up: Fused, down: Fused) -> tuple[TensorSpec, ...]:
    """The matrices of each expert in a family whose files never hold an expert by itself.

    Args:
        gate_up: how they hold gate and up together, without the parts.
        down: how they hold down.
    """
    whole = (replace(gate_up, part=0, n_parts=2), replace(gate_up, part=1, n_parts=2), down)
    return tuple(
        replace(tensor, fused=replace(fused, is_only_form=True))
        for tensor, fused in zip(expert_tensors(), whole, strict=True)
    )


def shared_expert_tensors(module: str, gate: str | None = None) -> tuple[TensorSpec, ...]:
    """The matrices of a shared expert.

    Args:
        module: the expert inside transformers' layer.
        gate: the linear function whose sigmoid multiplies its output; None: there is none.
    """
    matrices = _feed_forward_tensors(
        module, Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN, width="S", gguf="_shexp"
    )
    if gate is None:
        return matrices
    router = GgufTensor("blk.{layer}.ffn_gate_inp_shexp.weight")
    return (TensorSpec(Role.SHARED_ROUTER, f"{_LAYER}{gate}.weight", ("1", "D"), router, Kind.VECTOR), *matrices)


def leading_dense_tensors() -> tuple[TensorSpec, ...]:
    """The matrices of the feed-forward of a dense layer in a model whose other layers have experts."""
    return _feed_forward_tensors("mlp", Role.DENSE_GATE, Role.DENSE_UP, Role.DENSE_DOWN)


def dense_tensors() -> tuple[TensorSpec, ...]:
    """The matrices of a dense counterpart's feed-forward, which are those of its only expert."""
    return _feed_forward_tensors("mlp", Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


def _feed_forward_tensors(
    module: str, gate: Role, up: Role, down: Role, *, width: str = "F", gguf: str = ""
) -> tuple[TensorSpec, ...]:
    """The matrices of a feed-forward that every token goes through.

    Args:
        module: the feed-forward inside transformers' layer.
        gate: the role of its gate.
        up: the role of its up.
        down: the role of its down.
        width: the letter of the number of its neurons.
        gguf: the end of its matrices' names in GGUF.
    """
    within = _LAYER + module
    gate_gguf, up_gguf, down_gguf = (
        GgufTensor(f"blk.{{layer}}.ffn_{name}{gguf}.weight") for name in ("gate", "up", "down")
    )
    return (
        TensorSpec(gate, f"{within}.gate_proj.weight", (width, "D"), gate_gguf),
        TensorSpec(up, f"{within}.up_proj.weight", (width, "D"), up_gguf, shares_input_of=gate),
        TensorSpec(down, f"{within}.down_proj.weight", ("D", width), down_gguf),
    )
