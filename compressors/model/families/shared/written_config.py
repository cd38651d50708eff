"""Settings of ``config.json`` that many families share: those that describe a model, and those of a student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compressors.model.description.family import ConfigValues
from compressors.model.description.feed_forward import Dense
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import UnsupportedError
from compressors.model.families.shared.parts import grouped_query
from compressors.model.families.shared.parts import routed as first_routed

__all__ = [
    "attention_kinds",
    "dense_edited",
    "dense_settings",
    "dense_width",
    "moe_edited",
    "n_shared_experts",
    "usual_settings",
]


def n_shared_experts(spec: ModelSpec) -> int:
    """The number of routed experts that the shared one is as wide as; 0 if there is none.

    Raises:
        UnsupportedError: its width is not a multiple of theirs.
    """
    routed = first_routed(spec)
    if routed.shared is None:
        return 0
    number, rest = divmod(routed.shared.width, routed.width)
    if rest:
        raise UnsupportedError(
            f"{spec.family.architecture} has a shared expert as wide as a number of routed ones; {routed.shared.width} "
            f"is not a multiple of {routed.width}: choose a width that divides it"
        )
    return number


def dense_width(spec: ModelSpec) -> dict[str, Any]:
    """The setting of the width of dense layers; none where all layers have experts."""
    dense = next((layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, Dense)), None)
    return {} if dense is None else {"intermediate_size": dense.width}


def attention_kinds(spec: ModelSpec) -> list[str]:
    """The kind of each layer as ``layer_types`` names them, of a model whose layers all attend."""
    return ["full_attention" if layer.mixer.window is None else "sliding_attention" for layer in spec.layers]


def usual_settings(
    spec: ModelSpec, *, n_experts: str, width: str, normalizes: str | None, top_k: str = "num_experts_per_tok"
) -> dict[str, Any]:
    """The settings of ``config.json`` that describe a model of equal layers, by key.

    Args:
        spec: the model.
        n_experts: the key of the number of experts.
        width: the key of their width.
        normalizes: the key of the flag that says whether weights are normalised; None: there is none.
        top_k: the key of the number of experts of a token.
    """
    mixer = grouped_query(spec)
    found: dict[str, Any] = {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        n_experts: spec.n_experts,
        top_k: spec.top_k,
        width: spec.expert_width,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
    }
    rules = {layer.routed.routing.normalizes for layer in spec.layers if layer.routed is not None}
    if normalizes is not None and len(rules) == 1:
        found[normalizes] = rules.pop()
    return found | {"head_dim": mixer.head_dim}


def moe_edited(
    spec: ModelSpec, config: ConfigValues, *counts: str, other_spelling: str | None = None
) -> dict[str, Any]:
    """A ``config.json`` with a student's counts.

    The source's entry about quantization goes, as the student is not quantized.

    Args:
        spec: the student.
        config: the source's settings.
        counts: the keys of the family's settings that may differ in a student.
        other_spelling: another key of the number of experts, which is dropped.
    """
    described = spec.family.settings(spec)
    others = _edited(spec, config, absent={*counts, other_spelling})
    return others | {key: described[key] for key in counts}


_ONLY_WITH_EXPERTS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "output_router_logits",
        "decoder_sparse_step",
        "mlp_only_layers",
    }
)


def dense_settings(spec: ModelSpec) -> dict[str, Any]:
    """The settings that describe a dense counterpart, by key."""
    mixer, width = grouped_query(spec), max(layer.sizes.get("F", 0) for layer in spec.layers)
    return {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.n_kv_heads,
        "head_dim": mixer.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "vocab_size": spec.vocab_size,
        "intermediate_size": width,
    }


def dense_edited(spec: ModelSpec, config: ConfigValues) -> dict[str, Any]:
    """Returns the ``config.json`` of a dense counterpart, without anything about experts.

    Settings are written out where another class of transformers may have another default.
    """
    ends = spec.eos_token_ids
    return {
        **_edited(spec, config, absent=_ONLY_WITH_EXPERTS),
        **dense_settings(spec),
        **({} if spec.rope is None else {"rope_scaling": None, "rope_parameters": spec.rope.in_config()}),
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(ends) if len(ends) > 1 else (*ends, None)[0],
        "pad_token_id": spec.pad_token_id,
        "model_type": spec.family.model_type,
        "architectures": [spec.family.architecture],
    }


def _edited(spec: ModelSpec, config: ConfigValues, absent: Iterable[str | None]) -> dict[str, Any]:
    """The settings without the dropped ones, and with the number of layers."""
    gone = {*absent, "quantization_config", "compression_config"}
    edited = {key: value for key, value in config.items() if key not in gone}
    if edited.get("layer_types") is not None:
        edited["layer_types"] = edited["layer_types"][: spec.n_layers]
    edited["num_hidden_layers"] = spec.n_layers
    edited["tie_word_embeddings"] = spec.tied_embeddings  # the weights may have had a head of their own
    return edited
