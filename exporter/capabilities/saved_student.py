"""The rule of a saved student: a checkpoint that stock transformers loads."""

from __future__ import annotations

from compressors.model.description.spec import ModelSpec
from exporter.capabilities.rules import Container, Feature, Rule

__all__ = ["RULES"]


def _different_layers(spec: ModelSpec) -> str | None:
    if spec.is_uniform:
        return None
    return (
        f"a checkpoint has one number of experts and one expert width for all layers; these have "
        f"{spec.described_sizes}, which transformers could not load: leave --save-student out"
    )


def _class(spec: ModelSpec) -> str | None:
    family = spec.written.family
    refusal = family.refusal(spec.written)
    return None if refusal is None else f"{family.architecture} {refusal}: leave --save-student out"


RULES = (
    Rule(
        Container.STUDENT,
        Feature.DIFFERENT_LAYERS,
        "one number of experts and one width for all layers that have experts, and no layer without a feed-forward",
        _different_layers,
    ),
    Rule(Container.STUDENT, Feature.MTP, "with `--keep-mtp`; transformers ignores it", lambda _spec: None),
    Rule(Container.STUDENT, Feature.GRAPH, "what transformers' class of the family can have", _class),
)
