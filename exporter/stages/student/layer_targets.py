"""Turns the recipe's ``compress`` choice into a target for each layer, by the teacher's statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.description.spec import NO_MOE, ModelSpec, MoeSize
from compressors.model.running.streaming import StreamedModel
from compressors.shrink.allocation import allocate_globally, super_experts
from compressors.shrink.condense import Condense
from compressors.shrink.criteria import Criterion
from compressors.shrink.drop import block_similarities, moe_similarities, most_similar, window_similarities
from compressors.shrink.layerwise import LayerTarget
from compressors.shrink.moe_block import Method
from compressors.shrink.prune import Prune
from compressors.shrink.registry import LIGHT_MOE, METHODS, made
from compressors.shrink.replace import bases_by_layer
from compressors.shrink.replace.light_moe import LightMoE
from compressors.shrink.replace.selection import replaced_by_layer
from compressors.shrink.slim.width import SlimWidth
from exporter.planning.compression import by_layer
from exporter.planning.recipe import CompressChoice
from exporter.planning.resulting_spec import condensed_size, layers_with_experts

__all__ = ["layer_targets", "placed_by_statistics"]


def layer_targets(
    choice: CompressChoice,
    teacher: ModelSpec,
    statistics: Sequence[LayerStatistics],
    open_teacher: Callable[[], StreamedModel],
    tokens_BT: torch.Tensor,
) -> list[LayerTarget]:
    """Returns the target of each layer that stays; the last is that of the layer for MTP, where the teacher has one.

    Args:
        choice: the recipe's choice.
        teacher: the source.
        statistics: the teacher's statistics by layer, those of the layer for MTP last.
        open_teacher: opens the teacher, if its states are needed.
        tokens_BT: the sample for these states.

    Raises:
        InputError: super-experts are protected, and more of them than experts are kept.
    """
    layers = _layers_left(choice, teacher, statistics, open_teacher, tokens_BT)
    candidates = [layer for layer in layers if layer in layers_with_experts(teacher)]
    similarities = moe_similarities([statistics[layer] for layer in candidates])
    dropped = most_similar(similarities, choice.drop_moe_layers, "MoE layers")
    with_moe = [layer for number, layer in enumerate(candidates) if number not in dropped]
    counts = _counts(choice, teacher, [statistics[layer] for layer in with_moe])
    decoder_layers = statistics[: teacher.n_layers] if choice.protect_super_experts else ()
    protected = super_experts(decoder_layers) if choice.protect_super_experts else [frozenset[int]()] * teacher.n_layers
    widths = by_layer(choice.width, len(with_moe), teacher.expert_width)
    edits = _edits(choice, [statistics[layer] for layer in with_moe])
    targets = {
        layer: LayerTarget(
            layer,
            condensed_size(teacher, width) if choice.student == "dense" else MoeSize(count, width),
            (*_methods(choice, teacher, count, width, protected[layer]), *edit),
            keeps_parts=choice.apart,
        )
        for layer, count, width, edit in zip(with_moe, counts, widths, edits, strict=True)
    }
    found = [targets.get(layer, LayerTarget(layer, NO_MOE)) for layer in layers]
    if teacher.mtp is not None:
        size = MoeSize(counts[-1], widths[-1])
        methods = _methods(choice, teacher, size.n_experts, size.expert_width, frozenset())
        edit = () if choice.edit == LIGHT_MOE.name else _edits(choice, statistics[-1:])[0]
        found.append(LayerTarget(teacher.n_layers, size, (*methods, *edit)))
    return found


def _layers_left(
    choice: CompressChoice,
    teacher: ModelSpec,
    statistics: Sequence[LayerStatistics],
    open_teacher: Callable[[], StreamedModel],
    tokens_BT: torch.Tensor,
) -> list[int]:
    candidates = layers_with_experts(teacher)
    if choice.drop_blocks and choice.consecutive_blocks:
        scores, n_layers = window_similarities(open_teacher(), tokens_BT, choice.drop_blocks), choice.drop_blocks
        windows = [first for first in range(len(scores)) if {*range(first, first + n_layers)} <= {*candidates}]
        (best,) = most_similar(scores[windows], 1, "windows")
        dropped: Sequence[int] = range(windows[best], windows[best] + n_layers)
    else:
        similarities = block_similarities([statistics[layer] for layer in candidates])
        dropped = [candidates[number] for number in most_similar(similarities, choice.drop_blocks, "blocks")]
    return [layer for layer in range(teacher.n_layers) if layer not in dropped]


def _counts(choice: CompressChoice, teacher: ModelSpec, statistics: Sequence[LayerStatistics]) -> Sequence[int]:
    score = _score(choice)
    if choice.allocation == "global" and isinstance(choice.experts, int) and score is not None:
        scores = [score(layer) for layer in statistics]
        shares = [scores_E / scores_E.sum() for scores_E in scores]  # norms grow with the depth of most models
        return allocate_globally(shares, choice.experts * len(statistics), teacher.top_k)
    return by_layer(choice.experts, len(statistics), teacher.n_experts)


def _score(choice: CompressChoice) -> Criterion | None:
    return None if choice.method == "none" else METHODS[choice.method].score


def _methods(
    choice: CompressChoice, teacher: ModelSpec, n_experts: int, width: int, protected: frozenset[int]
) -> Sequence[Method]:
    methods: list[Method] = []
    if n_experts < teacher.n_experts:
        fewer = made(choice.method, n_experts)
        methods.append(replace(fewer, protected=protected) if isinstance(fewer, Prune) else fewer)
    if width < teacher.expert_width:
        methods.append(SlimWidth(width))
    if choice.student == "dense":
        methods.append(Condense())
    return methods


def _edits(choice: CompressChoice, statistics: Sequence[LayerStatistics]) -> Sequence[tuple[Method, ...]]:
    """The method that rewrites the experts of each layer, if one does."""
    if choice.edit_size is None:
        return [()] * len(statistics)
    if choice.edit != LIGHT_MOE.name:
        return [(made(choice.edit, choice.edit_size),)] * len(statistics)
    placed = placed_by_statistics(choice, statistics)
    assert isinstance(placed.replaced, tuple) and isinstance(placed.bases, tuple), "statistics have decided"
    return [
        (LightMoE(count, n_bases, choice.edit_size),) if count else ()
        for count, n_bases in zip(placed.replaced, placed.bases, strict=True)
    ]


def placed_by_statistics(choice: CompressChoice, statistics: Sequence[LayerStatistics]) -> CompressChoice:
    """The choice with numbers of replaced experts and of bases for each layer, by the statistics of these layers.

    A choice that has them already, or replaces no experts, stays as it is.
    """
    if choice.edit != LIGHT_MOE.name or isinstance(choice.replaced, tuple):
        return choice
    counts = replaced_by_layer(statistics, choice.n_replaced, choice.n_bases)
    bases = bases_by_layer(counts, choice.n_bases)
    return choice.model_copy(update={"replaced": tuple(counts), "bases": tuple(bases)})
