"""The teacher's one pass: statistics and targets on calibration text, predictions and routing on the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from compressors.calibration.splits import Splits, block_length_of, load_tokenizer, read_splits, tokenize
from compressors.model.config.config_check import check_against_transformers
from compressors.model.errors import InputError
from compressors.model.parallel import is_first
from compressors.model.running.arithmetic import dtype_of
from compressors.model.sources.hugging_face.finite import check_vocabulary_is_finite
from compressors.model.sources.source import Source
from exporter.file_names import BLOCKS, LAST_WORDS, SUMMARY
from exporter.stages.inputs import Blocks, memory_limit, use_threads
from exporter.stages.teacher.teacher_pass import TeacherPass
from exporter.work.input_state import refuse_changed_texts
from exporter.work.snapshot import Snapshot
from exporter.work.stage import StageContext
from validate.metrics.bootstrap import perplexity_interval
from validate.metrics.cloze import find_last_words, save_last_words
from validate.metrics.statistics import perplexity

__all__ = ["calibrate"]


def calibrate(context: StageContext) -> None:
    """Writes token blocks, and the teacher's statistics and predictions on them."""
    plan = context.plan
    use_threads(plan)
    checkpoint = plan.open_source()
    check_against_transformers(checkpoint.config, checkpoint.config_path, checkpoint.spec)
    text = plan.recipe.text
    splits = read_splits(plan.calibration, plan.heldout)
    _refuse_changed_inputs(context, checkpoint, splits)
    calibration, selection, heldout = tokenize(
        splits, checkpoint.tokenizer_folder, block_length_of(checkpoint.spec.context_length), text.blocks
    )
    measured = heldout.leading(text.heldout_chunks_per_file)
    learned = calibration.spread(text.calibration_blocks)
    blocks = Blocks(
        learned.tokens_BT,
        selection.spread(text.selection_blocks).tokens_BT[: plan.selection_blocks],
        measured.tokens_BT,
    )
    if is_first():
        check_vocabulary_is_finite(checkpoint)  # now, instead of in a writer hours later
    dtype = dtype_of(plan.recipe.arithmetic)
    limit, device = memory_limit(context), torch.device(plan.device)
    teacher = TeacherPass(
        checkpoint,
        blocks,
        context.file,
        dtype,
        limit,
        device,
        layer_inputs=plan.keeps_layer_inputs,
        targets=plan.keeps_targets,
    )
    with context.progress.bar("layers", len(checkpoint.spec.blocks)) as advance:
        for n_done in teacher.run_layers(Snapshot(context.output / "snapshot")):
            advance(n_done)
    likelihoods = teacher.write_predictions()
    if is_first():
        blocks.save(context.file(BLOCKS))
        summary = _summary(splits, blocks, measured.domains_B, likelihoods)
        if text.mix:
            summary["text"]["calibration"]["blocks_by_file"] = dict(Counter(learned.domains_B))
        context.file(SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
        last_words = find_last_words(blocks.heldout.numpy(), load_tokenizer(checkpoint.tokenizer_folder))
        save_last_words(last_words, context.file(LAST_WORDS))


def _summary(splits: Splits, blocks: Blocks, domains_B: Sequence[str], likelihoods_N: torch.Tensor) -> dict[str, Any]:
    """The figures of texts and teacher for the report."""
    texts = {
        name: {"sha256": split.sha256, "documents": split.n_documents, "blocks": len(vars(blocks)[name])}
        for name, split in vars(splits).items()
    }
    value, error = perplexity(likelihoods_N.numpy())
    interval = perplexity_interval(likelihoods_N.numpy(), len(blocks.heldout))
    teacher = {"perplexity": value, "perplexity_error": error, "perplexity_interval": interval}
    return {"text": texts, "heldout_domains": domains_B, "teacher": teacher}


def _refuse_changed_inputs(context: StageContext, checkpoint: Source, splits: Splits) -> None:
    """A run that goes on after an interruption must find what it was planned for."""
    plan = context.plan
    what_to_do = f"put it back, or remove {context.work.folder} and start again"
    refuse_changed_texts(plan.recipe.text, plan.calibration, plan.heldout, what_to_do, splits)
    if checkpoint.identity() != plan.recipe.source.identity:
        raise InputError(f"{plan.source} has changed since this run was planned; {what_to_do}")
