"""The teacher's one pass: statistics and targets on calibration text, log-probabilities and routing on the others."""

from __future__ import annotations

import json

from compressors.calibration import Splits, read_splits, tokenize
from compressors.model.checkpoint import Checkpoint
from compressors.model.errors import InputError
from compressors.model.recorder import RoutingRecorder
from compressors.model.streaming import StreamedModel, TokenGroup
from compressors.model.student import Student
from compressors.statistics import StatisticsCollector, save_statistics
from compressors.teacher import top_targets, write_log_probs
from exporter.stage import StageContext
from exporter.stages.artifacts import Blocks, Calibration, use_threads
from validate.backend import scored_positions
from validate.evaluation import perplexity

__all__ = ["run"]


def run(context: StageContext) -> None:
    """Writes :class:`~exporter.stages.artifacts.Calibration` from the checkpoint and the texts."""
    plan = context.plan
    use_threads(plan)
    checkpoint = Checkpoint(plan.source)
    text = plan.recipe.text
    splits = read_splits(plan.calibration, plan.heldout)
    _refuse_changed_inputs(context, checkpoint, splits)
    calibration, selection, heldout = tokenize(splits, checkpoint.folder)
    blocks = Blocks(
        calibration.spread(text.calibration_blocks).tokens_BT,
        selection.spread(text.selection_blocks).tokens_BT,
        heldout.leading(text.heldout_chunks_per_file).tokens_BT,
    )
    files = Calibration(context.output)
    model = StreamedModel(Student.teacher(checkpoint), check_finite=True)
    statistics, routing = StatisticsCollector(model.shape), RoutingRecorder(model.shape)
    groups = [
        TokenGroup(blocks.calibration, [statistics.observe]),
        TokenGroup(blocks.selection),
        TokenGroup(blocks.heldout, [routing.observe]),
    ]
    with context.progress.bar("layers", model.shape.n_layers) as advance:
        calibrated, selected, held = model.stream(groups, advance)
    scored = scored_positions(blocks.heldout.shape[1])
    blocks.save(files.blocks)
    save_statistics(statistics.layers, files.statistics)
    top_targets(model, calibrated).save(files.targets)
    write_log_probs(model, blocks.selection, selected, scored, files.selection_log_probs)
    likelihoods = write_log_probs(model, blocks.heldout, held, scored, files.heldout_log_probs)
    routing.routing().save(files.routing)
    used = {"calibration": blocks.calibration, "selection": blocks.selection, "heldout": blocks.heldout}
    texts = {
        name: {"sha256": split.sha256, "documents": split.n_documents, "blocks": len(used[name])}
        for name, split in vars(splits).items()
    }
    teacher_perplexity, teacher_error = perplexity(likelihoods.numpy())
    summary = {"text": texts, "teacher": {"perplexity": teacher_perplexity, "perplexity_error": teacher_error}}
    files.summary.write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _refuse_changed_inputs(context: StageContext, checkpoint: Checkpoint, splits: Splits) -> None:
    """A run that goes on after an interruption must find what it was planned for."""
    plan = context.plan
    calibration = splits.calibration.sha256 == plan.recipe.text.calibration_sha256
    if not calibration or checkpoint.identity() != plan.recipe.source.identity:
        changed = plan.source if calibration else plan.calibration
        raise InputError(f"{changed} has changed since this run was planned; remove {context.work.folder}, start again")
