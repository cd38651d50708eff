"""Families that are refused for a known reason: mostly, a runtime would not compute what was written of them."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["REASONS"]

REASONS: Mapping[str, str] = {
    "phimoe": "llama.cpp computes another model from its files (a norm without the mean for LayerNorm, a softmax over "
    "the two best experts for the sparse mixer, another factor of attention), and ONNX Runtime's kernel on the CPU "
    "does not heed use_sparse_mixer",
    "flex_olmo": "llama.cpp has no architecture for it: its norms stand behind attention and experts",
    "jamba": "ONNX Runtime has no operator on the CPU for the scan of its Mamba-1 layers",
    "mellum": "llama.cpp's logits differ from transformers' after the first token, for a reason that is not known",
    **dict.fromkeys(
        ("bailing_moe", "bailing_moe_v2"),
        "transformers has no class for it, and code that comes with a model is never run",
    ),
}
"""By ``model_type``: the reason, in half a sentence."""
