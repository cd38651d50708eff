"""A rule of the table: something that a container cannot hold, and the sentence that refuses a model for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from compressors.model.description.spec import ModelSpec

__all__ = ["Container", "Feature", "Rule"]


class Container(StrEnum):
    """A format that models are written in; the values of the first two are those of ``--formats``."""

    GGUF = "gguf"
    ONNX = "onnx"
    STUDENT = "student"

    @property
    def label(self) -> str:
        """The name in tables."""
        return _LABELS[self]


_LABELS = {Container.GGUF: "GGUF", Container.ONNX: "ONNX", Container.STUDENT: "saved student"}


class Feature(StrEnum):
    """A part of a model that a container may be unable to hold; the values name it in tables."""

    MIXERS = "mixers"
    HEADS = "sizes of heads"
    WINDOWS = "sliding windows"
    ROPE = "rotary embeddings"
    ROUTING = "routing rules"
    EXPERT_FUNCTION = "functions of experts"
    BIASES = "biases"
    SHARED_EXPERT = "a shared expert"
    DENSE_LAYERS = "layers with a dense feed-forward beside layers with experts"
    DIFFERENT_LAYERS = "layers with different experts, or without any"
    SHARED_BASES = "experts that share a base, with an adapter each"
    SIZE = "numbers of experts and layers"
    SCALARS = "factors of embeddings, logits and what layers add"
    MTP = "a layer that predicts further tokens (MTP)"
    GRAPH = "the computation as a whole"


@dataclass(frozen=True)
class Rule:
    """One entry of the table.

    Attributes:
        container: the format.
        feature: the part of a model that the rule is about.
        limit: the part of the feature that the container can hold, for the documentation.
        refusal: says why a model cannot be held; None: it can, as far as this rule goes.
    """

    container: Container
    feature: Feature
    limit: str
    refusal: Callable[[ModelSpec], str | None]
