"""The layer that predicts one more token (multi-token prediction), which some models have behind their decoder layers.

It is a decoder layer whose input is made of the hidden state behind the model's final norm, and of the embedding of the
token that the model predicts from it: each is normed, and a matrix takes both. Behind another norm the head gives the
logits of the token after that one. llama.cpp drafts with it (``LLM_GRAPH_TYPE_DECODER_MTP``, ``--spec-type
draft-mtp``); nothing that the model computes depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from compressors.model.description.roles import Role

__all__ = ["MTP_MODULES", "MTP_PART"]

MTP_PART = "layers for predicting several tokens at once (MTP)"
"""The name of the part of a checkpoint, for ``inspect`` and the plan."""

MTP_MODULES: Mapping[Role, str] = {
    Role.MTP_PROJECTION: "mtp_projection",
    Role.MTP_EMBEDDING_NORM: "mtp_embedding_norm",
    Role.MTP_STATE_NORM: "mtp_state_norm",
    Role.MTP_OUTPUT_NORM: "mtp_output_norm",
}
"""The modules that such a layer has beside those of transformers' decoder layer; transformers itself has none."""
