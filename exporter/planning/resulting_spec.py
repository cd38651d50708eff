"""A student's description from the sizes of its experts and the layers that go; it needs no recipe."""

from __future__ import annotations

from collections.abc import Sequence

from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.shrink.dense import dense_size

__all__ = ["condensed_size", "layers_with_experts", "resulting_spec"]


def layers_with_experts(spec: ModelSpec) -> tuple[int, ...]:
    """The layers that have routed experts; no others are dropped or changed."""
    return tuple(index for index, layer in enumerate(spec.layers) if layer.routed is not None)


def resulting_spec(
    teacher: ModelSpec,
    sizes: Sequence[MoeSize],
    *,
    drop_blocks: int = 0,
    drop_moe_layers: int = 0,
    mtp: MoeSize | None = None,
) -> ModelSpec:
    """The description of a student whose last layers with experts are those that go.

    Args:
        teacher: the original.
        sizes: the experts of each layer that keeps some.
        drop_blocks: the number of layers with experts that go whole.
        drop_moe_layers: the number of those left that lose their experts.
        mtp: the experts of the layer that predicts one more token; None: it goes.
    """
    with_experts = layers_with_experts(teacher)
    n_left = len(with_experts) - drop_blocks
    size_of = dict(zip(with_experts, [*sizes, *[NO_MOE] * drop_moe_layers], strict=False))
    left = [layer for layer in range(teacher.n_layers) if layer not in with_experts[n_left:]]
    return teacher.with_sizes([size_of.get(layer, NO_MOE) for layer in left], left, mtp)


def condensed_size(teacher: ModelSpec, width: int) -> MoeSize:
    """The size of the one expert that a layer's experts of this width become."""
    return dense_size(teacher.with_sizes([MoeSize(teacher.n_experts, width)] * teacher.n_layers))
