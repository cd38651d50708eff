"""A dense student: each layer's experts condensed into one feed-forward, which every token goes through.

It is a MoE block of one expert: a softmax over one logit gives gate 1 whatever the router says. So student, streaming,
statistics and training need to know nothing about it, and only files differ: they hold a plain feed-forward, in the
architecture of the family's dense counterpart (:attr:`compressors.model.description.spec.ModelSpec.written`). The
method is :class:`compressors.shrink.condense.Condense`.
"""

from __future__ import annotations

from compressors.model.description.routing import Score
from compressors.model.description.spec import LayerSpec, ModelSpec, MoeSize
from compressors.model.errors import UnsupportedError
from compressors.model.families.registry import supported_families

__all__ = ["check_dense", "dense_size"]


def dense_size(teacher: ModelSpec) -> MoeSize:
    """The size of each layer's one expert: as wide as all experts that a token used."""
    return MoeSize(1, teacher.top_k * teacher.expert_width)


def check_dense(teacher: ModelSpec) -> None:
    """Refuses a teacher that no dense architecture matches, or whose experts cannot become one feed-forward.

    Raises:
        UnsupportedError: its family has no dense counterpart (the message lists the families with one), or a layer has
            a part without a definition in a dense student.
    """
    for index, layer in enumerate(teacher.layers):
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise UnsupportedError(
                f"--student dense: layer {index} {obstacle}, for which a dense student has no definition; leave "
                "--student dense out, and give --method or --experts to make experts fewer"
            )
    if teacher.family.dense is None:
        possible = ", ".join(sorted(name for name, family in supported_families().items() if family.dense is not None))
        raise UnsupportedError(
            f"--student dense: no dense architecture matches {teacher.model_type} in everything but the experts; "
            f"there is one for {possible}"
        )


def _obstacle(layer: LayerSpec) -> str | None:
    """The part of a layer that one feed-forward, with weight 1 for every token, cannot replace; None: there is none.

    One expert has weight 1 where the weights come from a softmax.
    """
    routed = layer.routed
    if routed is None:
        return "has no routed experts"
    if routed.shared is not None:
        return "has a shared expert"
    if routed.routing.score is Score.SIGMOID:
        return "has a router whose scores are sigmoids"
    if routed.routing.n_groups > 1:
        return "has a router that chooses groups of experts first"
    return "multiplies the weights of experts by a constant" if routed.routing.scale != 1.0 else None
