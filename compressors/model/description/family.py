"""The description of an architecture: how its configuration is read, and how the two containers write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressors.model.description.tensors import TensorSpec

if TYPE_CHECKING:
    from compressors.model.config.gguf_keys import GgufKeys
    from compressors.model.config.settings import Settings
    from compressors.model.description.spec import LayerSpec, ModelSpec

__all__ = ["ConfigValues", "DenseForm", "Family", "GgufFamily", "GgufValue", "SkippedPart"]

GgufValue = str | int | float | bool | tuple[int, ...]
"""A value of a GGUF file's metadata: whole numbers are uint32, and floats are float32.

A tuple is an array of int32 or of booleans, mostly with an entry for each layer.
"""

ConfigValues = Mapping[str, Any]
"""Settings of ``config.json``."""


@dataclass(frozen=True)
class GgufFamily:
    """The family in llama.cpp (``src/llama-arch.cpp``, ``src/models/``, ``conversion/`` of llama.cpp).

    Attributes:
        architecture: llama.cpp's name.
        keys: gives the keys under the architecture's name, except those of the rotary scaling.
        refusal: says which part of a model llama.cpp's graph, with its fixed assumptions, cannot compute; None: none.
        takes_rope_factors: its graph divides the rotary angles by a tensor of the file.
        scales_attention: its graph multiplies the products of queries and keys for a longer context.
        absent: gives the values that llama.cpp takes for keys that a file leaves out, where they are the family's own.
        settings: makes settings of ``config.json`` of the keys of a file, the inverse of ``keys``; None where the file
            is of another family with this architecture. Without the function no file is read.
        switches_rope: a key tells its graph whether queries and keys are turned.
        mixes_layers: its graph takes layers with experts and layers without in any order.
        takes_states_back: while a layer for MTP drafts, llama.cpp keeps a copy of the recurrent states for each drafted
            token (``llm_arch_supports_rs_rollback`` in ``src/llama-arch.cpp``).
    """

    architecture: str
    keys: Callable[[ModelSpec], Mapping[str, GgufValue]]
    refusal: Callable[[ModelSpec], str | None] = lambda _spec: None
    takes_rope_factors: bool = False
    scales_attention: bool = False
    absent: Callable[[ModelSpec], Mapping[str, GgufValue]] = lambda _spec: {}
    settings: Callable[[GgufKeys], ConfigValues | None] | None = None
    switches_rope: bool = False
    mixes_layers: bool = False
    takes_states_back: bool = False


@dataclass(frozen=True)
class SkippedPart:
    """Tensors of a checkpoint that are skipped.

    Attributes:
        pattern: a regular expression that the whole name matches; a group called ``layer`` matches only numbers
            behind the model's last layer.
        name: their name, for ``inspect`` and the plan.
        in_projector: True if llama.cpp keeps them in a file of their own, a projector (``--mmproj``).
    """

    pattern: str
    name: str
    in_projector: bool = False

    def takes(self, name: str, n_layers: int) -> bool:
        """True for the name of a tensor that is skipped in a model of so many layers."""
        match = re.fullmatch(self.pattern, name)
        return match is not None and int(match.groupdict().get("layer", n_layers)) >= n_layers


@dataclass(frozen=True)
class DenseForm:
    """The dense architecture that differs from a MoE family in nothing but the feed-forward.

    It computes what the MoE model does when each layer has one expert, which every token chooses with weight 1.

    Attributes:
        family: the dense architecture; it reads no checkpoint.
        tensors: the three matrices of its feed-forward, which are those of the one expert.
    """

    family: Family
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: its name in ``config.json``.
        architecture: transformers' class.
        edited: changes a ``config.json`` so that it describes a model of this architecture: counts, lists by layer.
        settings: gives the settings of ``config.json`` that describe a model, by key, except those of the rotary
            embedding and of windows.
        gguf: the architecture in llama.cpp.
        read: makes the description of a model from its ``config.json``; None: it is only written.
        skipped: parts of checkpoints that are left out.
        dense: its counterpart without experts; None: there is none.
        whole_model_type: ``model_type`` of multimodal models that contain one of this architecture, with its settings
            in ``text_config``; None: there are no such models.
        prefixes: the beginnings of tensor names in such models, in place of ``model.``.
        refusal: says which part of a model transformers' class cannot have; None: none.
        mtp: describes the layer for predicting one more token that checkpoints have behind the decoder layers, as
            llama.cpp runs it (``LLM_GRAPH_TYPE_DECODER_MTP``); None: there is none that it runs.
        why_no_mtp: says why llama.cpp cannot use such layers of the checkpoints; None: it can, or they have none.
        has_own_tokenizer: transformers takes its own tokenizer class for it, whatever the files name
            (``MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`` in ``transformers/models/auto/tokenization_auto.py``).
    """

    model_type: str
    architecture: str
    edited: Callable[[ModelSpec, ConfigValues], dict[str, Any]]
    settings: Callable[[ModelSpec], ConfigValues]
    gguf: GgufFamily
    read: Callable[[Settings], ModelSpec] | None = None
    skipped: tuple[SkippedPart, ...] = ()
    dense: DenseForm | None = None
    whole_model_type: str | None = None
    prefixes: tuple[str, ...] = ()
    refusal: Callable[[ModelSpec], str | None] = lambda _spec: None
    mtp: Callable[[ModelSpec], LayerSpec] | None = None
    why_no_mtp: str | None = None
    has_own_tokenizer: bool = False
