"""Compresses the model layer by layer: decides about its experts, and writes the tensors that change."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from safetensors.torch import save_file

from compressors.calibration.statistics import StatisticsCollector, save_statistics
from compressors.model.running.arithmetic import dtype_of
from compressors.model.running.mtp import advance_with_mtp
from compressors.model.running.streaming import StreamedModel, TokenGroup
from compressors.model.sources.student import ExpertMap, LayerMap, Student
from compressors.shrink.layerwise import LayerTarget, LayerwiseCompression
from exporter.file_names import EXPERT_MAP, OVERLAY, STATISTICS
from exporter.stages.inputs import memory_limit, teacher_statistics, token_blocks, use_threads
from exporter.stages.student.layer_targets import layer_targets
from exporter.work.stage import StageContext

__all__ = ["compress"]


def compress(context: StageContext) -> None:
    """Writes the expert map, an overlay for each layer that changed, and, if experts changed, their statistics."""
    use_threads(context.plan)
    tokens_BT = token_blocks(context.work).calibration
    layers, changed = _compressed(context, tokens_BT)
    mtp = layers.pop() if context.plan.teacher_spec.mtp is not None else None
    experts = ExpertMap(context.plan.teacher_spec.n_experts, tuple(layers), mtp)
    context.file(EXPERT_MAP).write_text(json.dumps(experts.to_json()), encoding="utf-8")
    if changed:
        _write_statistics(context, tokens_BT)


def _compressed(context: StageContext, tokens_BT: torch.Tensor) -> tuple[list[LayerMap], bool]:
    """Compresses all layers; returns the map of each, and whether any expert is no longer one of the teacher's."""
    plan = context.plan
    choice, source = plan.recipe.compress, plan.open_source()
    statistics = teacher_statistics(plan, context.work)
    limit, device = memory_limit(context), torch.device(plan.device)

    def open_teacher() -> StreamedModel:
        return StreamedModel(Student.teacher(source), limit=limit, device=device)

    sample_BT = tokens_BT[: choice.sample_blocks]
    targets: Sequence[LayerTarget] = layer_targets(choice, source.spec, statistics, open_teacher, sample_BT)
    compression = LayerwiseCompression(
        source,
        targets,
        statistics,
        tokens_BT,
        n_sample_blocks=choice.sample_blocks,
        sequential=choice.sequential,
        limit=limit,
        dtype=dtype_of(plan.recipe.arithmetic),
        device=device,
    )
    layers, changed = [], False
    with context.progress.bar("layers", len(targets)) as advance:
        for number, layer in enumerate(compression.run()):
            layers.append(layer.map)
            if layer.overlay:
                save_file(layer.overlay, context.file(OVERLAY, layer=number))
                changed = True
            advance(1)
    return layers, changed


def _write_statistics(context: StageContext, tokens_BT: torch.Tensor) -> None:
    """Writes the new experts' statistics on the calibration text, for the importance of their weights' columns."""
    plan = context.plan
    overlays = OVERLAY.all_within(context.output)
    student = Student.load(plan.open_source(), context.file(EXPERT_MAP), overlays)
    collector = StatisticsCollector(student.spec)
    model = StreamedModel(student, limit=memory_limit(context), device=torch.device(plan.device))
    group = TokenGroup(tokens_BT, [collector.observe], dtype_of(plan.recipe.arithmetic))
    states = model.first_states([group])
    with context.progress.bar("layers", len(student.spec.blocks)) as advance:
        for index in advance_with_mtp(model, [group], states, range(len(student.spec.blocks))):
            save_statistics(collector.take(index), context.file(STATISTICS), index)
            advance(1)
