"""Qwen3.5-MoE and Qwen3.6-MoE: as Qwen3-Next, with inputs apart. On the hub it is the part for text of a larger model.

A student is saved as a checkpoint of the language model alone: of the vision part nothing is read, and transformers
would fill it with random numbers. (transformers loads either with ``AutoModelForCausalLM``, and llama.cpp's converter
reads either, with ``--no-mtp``.)
"""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.settings import Settings
from compressors.model.description.family import Family, GgufFamily, GgufValue, SkippedPart
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.description.transforms import TiledHeads
from compressors.model.families.shared import gated_delta

__all__ = ["FAMILY"]

_DEFAULTS = {
    **gated_delta.DEFAULTS,
    "vocab_size": 248320,
    "num_hidden_layers": 40,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
_CHANNELS = TiledHeads("G", "N", "v", before=("K", "K"))
_VALUES = TiledHeads("G", "N", "v")
_HEADS = TiledHeads("G", "N")
_COLUMNS = TiledHeads("G", "N", "v", of_inputs=True)
_INPUTS = (
    gated_delta.matrix(Role.MIXER_INPUT, "in_proj_qkv", ("X", "D"), "attn_qkv", _CHANNELS, is_first=True),
    gated_delta.matrix(Role.MIXER_GATE, "in_proj_z", ("Y", "D"), "attn_gate", _VALUES),
    gated_delta.matrix(Role.MIXER_BETA, "in_proj_b", ("N", "D"), "ssm_beta", _HEADS),
    gated_delta.matrix(Role.MIXER_ALPHA, "in_proj_a", ("N", "D"), "ssm_alpha", _HEADS),
)


def _read(file: Settings) -> ModelSpec:
    settings = FamilySettings(file, FAMILY, _DEFAULTS)
    settings.require("mlp_only_layers", [], None)
    experts = gated_delta.routed(settings, normalizes=True)
    return gated_delta.model(settings, experts, _INPUTS, channels=_CHANNELS, heads=_HEADS, columns=_COLUMNS)


def _keys(spec: ModelSpec) -> Mapping[str, GgufValue]:
    assert spec.rope is not None, "some layer attends"
    return gated_delta.gguf_keys(spec) | {"rope.dimension_sections": _sections(spec.rope.width)}


def _sections(width: int) -> tuple[int, ...]:
    """The number of pairs that turn by time, by height, by width, and by none of these.

    The pairs take turns, as in the hub's models: 11, 11 and 10 of 32. For text the first three are the same position,
    and the fourth is 0 (``llm_graph_input_pos::set_input`` in llama.cpp's ``src/llama-graph.cpp``).
    """
    n_pairs = width // 2
    return *((n_pairs + 2 - place) // 3 for place in range(3)), 0


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    read=_read,
    edited=gated_delta.edited,
    settings=gated_delta.settings,
    gguf=GgufFamily("qwen35moe", _keys, gated_delta.refusal, settings=gated_delta.from_keys, takes_states_back=True),
    skipped=(gated_delta.MTP, SkippedPart(r"(model\.)?visual\..*", "the part that sees images", in_projector=True)),
    whole_model_type="qwen3_5_moe",
    prefixes=("model.language_model.",),
    mtp=gated_delta.mtp,
    has_own_tokenizer=True,
)
