"""Qwen3-Next: gated delta layers, whose inputs lie together by key head, and gated attention in every fourth layer."""

from __future__ import annotations

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.gguf_keys import GgufKeys
from compressors.model.config.settings import Settings
from compressors.model.description.family import ConfigValues, Family, GgufFamily
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.tensors import GgufTensor, TensorSpec
from compressors.model.description.transforms import UngroupedRows
from compressors.model.families.shared import gated_delta
from compressors.model.families.shared.gated_delta import DELTA, GGUF

__all__ = ["FAMILY"]

_DEFAULTS = {
    **gated_delta.DEFAULTS,
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "num_experts_per_tok": 10,
    "num_experts": 512,
}
_OF_A_KEY_HEAD = ("k", "k", "r", "r")  # rows of queries, keys, values and gates
_INPUTS = (
    TensorSpec(
        Role.MIXER_INPUT,
        f"{DELTA}in_proj_qkvz.weight",
        ("M", "D"),
        GgufTensor(f"{GGUF}attn_qkv.weight", UngroupedRows("G", _OF_A_KEY_HEAD, (0, 1, 2))),
        gguf_rest=(GgufTensor(f"{GGUF}attn_gate.weight", UngroupedRows("G", _OF_A_KEY_HEAD, (3,))),),
    ),
    gated_delta.matrix(Role.MIXER_BETA_ALPHA, "in_proj_ba", ("B", "D"), "ssm_ba"),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("mlp_only_layers", [], None)
    settings.require("decoder_sparse_step", 1)
    settings.ignore("intermediate_size")  # of layers without experts
    experts = gated_delta.routed(settings, normalizes=settings.flag("norm_topk_prob", default=True))
    return gated_delta.model(settings, experts, _INPUTS)


def _settings(spec: ModelSpec) -> ConfigValues:
    (normalizes,) = {layer.routed.routing.normalizes for layer in spec.layers if layer.routed is not None}
    return gated_delta.settings(spec) | {"norm_topk_prob": normalizes}


def _from_gguf(keys: GgufKeys) -> ConfigValues:
    return {**gated_delta.from_keys(keys), "norm_topk_prob": True}


FAMILY = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    read=_read,
    edited=gated_delta.edited,
    settings=_settings,
    gguf=GgufFamily("qwen3next", gated_delta.gguf_keys, gated_delta.refusal, settings=_from_gguf),
    skipped=(gated_delta.MTP,),
    mtp=gated_delta.mtp,
)
