"""Explains why a folder's tensors are not those that ``config.json`` promises, judging by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.model.names import shown
from compressors.model.sources.hugging_face.float8 import GIVE_THE_ORIGINAL

__all__ = ["CLASSIFIER_HEAD", "is_classifier", "likely_cause", "with_prefix"]

_PREFIX = "model."  # begins every name but the head's (transformers: base_model_prefix)
_BASE_NAMES = re.compile(r"(embed_tokens|norm|layers)\.")
_NOTES = ("quantize_config.json", "hf_quant_config.json", "quant_config.json", "quant_model_description.json")
_QUANTIZED = re.compile(
    r".*(\.(qweight|qzeros|g_idx|scales|absmax|SCB|W_q|weight_packed|weight_scale|weight_zero_point|input_scale|codes)"
    r"|\.weight[._](scale_inv|quant_state.*|absmax|quant_map|nested_absmax|shape)|_(blocks|scales))"
)
_ADAPTED = re.compile(r".*\.(lora_[AB]|base_layer|lora_magnitude_vector|modules_to_save)\b.*")
CLASSIFIER_HEAD = r"(score|classifier|qa_outputs|v_head|value_head|reward_head)\..*"
"""A regular expression for the names of heads for other tasks than text."""
_FIRST_NORM = re.compile(r"(?P<prefix>.*?)layers\.0\.input_layernorm\.weight")


def with_prefix(name: str, others: Sequence[str] = ()) -> str:
    """Returns a language model's name for a tensor, independent of how it was saved.

    Args:
        name: the tensor's name in a file, perhaps saved from the model without its head.
        others: the beginnings of names in a model that has the language model inside.
    """
    for other in others:
        if name.startswith(other):
            return _PREFIX + name.removeprefix(other)
    return _PREFIX + name if _BASE_NAMES.match(name) else name


def is_classifier(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Returns why a checkpoint is a classifier, not a language model; None if it is not, or has both heads."""
    if "lm_head.weight" in names:
        return None
    architecture = _architecture(config)
    head = next((name for name in names if re.fullmatch(CLASSIFIER_HEAD, name)), None)
    if head is None and not re.search(r"For(Sequence|Token)Classification|ForQuestionAnswering|Reward", architecture):
        return None
    has = f" but {shown(head)}" if head else ""
    return (
        f"this is a {architecture or 'classifier'} checkpoint: it has no lm_head{has}, and does not write text; give "
        "the language model that it was trained from (base_model of its model card)"
    )


def likely_cause(
    folder: Path, config: Mapping[str, Any], names: Collection[str], missing: str, *, is_quantized: bool
) -> str | None:
    """Explains why a tensor is missing or of another kind, and names a next step; None if nothing is known.

    Args:
        folder: the checkpoint.
        config: its ``config.json``.
        names: the names of its tensors.
        missing: the first tensor that is missing or wrong.
        is_quantized: True if ``config.json`` says how the weights are quantized.
    """
    note = next((name for name in _NOTES if (folder / name).is_file()), None)
    quantized = next((name for name in names if _QUANTIZED.fullmatch(name)), None)
    if not is_quantized and (note is not None or quantized is not None):
        sign = note or f"tensor {shown(quantized)}"
        return f"the weights are quantized already ({sign}, though config.json has no quantization_config); " + (
            GIVE_THE_ORIGINAL
        )
    adapted = next((name for name in names if _ADAPTED.fullmatch(name)), None)
    if adapted is not None:
        return (
            f"an adapter is in the weights, not merged (tensor {shown(adapted)}): merge it (PEFT: merge_and_unload, "
            "then save_pretrained)"
        )
    prefix = next((match["prefix"] for name in names if (match := _FIRST_NORM.fullmatch(name))), _PREFIX)
    if prefix not in (_PREFIX, ""):
        return (
            f"the tensors' names begin with {shown(prefix)}, as parts of a larger model's do, where transformers looks "
            f"for {_PREFIX}: save the language model alone (load it with AutoModelForCausalLM, then save_pretrained)"
        )
    only_head = missing == "model.embed_tokens.weight" and "lm_head.weight" in names
    if only_head and config.get("tie_word_embeddings") is True:
        return (
            "tie_word_embeddings is true, and of the two tensors only lm_head.weight is there, which transformers "
            "takes for both: load it with AutoModelForCausalLM and save it again (save_pretrained)"
        )
    if missing == "lm_head.weight":
        return (
            f"this is {_architecture(config) or 'a checkpoint'} without lm_head.weight, and tie_word_embeddings is not "
            "true: transformers would fill the head with random numbers; give the checkpoint of the whole language "
            "model (saved from AutoModelForCausalLM)"
        )
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return shown(architectures[0]) if isinstance(architectures, list) and architectures else ""
